"""Runs inside lm-eval's environment: log-likelihoods of a local task against a plain forward pass.

Usage: lm_eval_task.py URL MODEL MODEL_FOLDER WORK_FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

url, model_name, model_folder, work = sys.argv[1:]
TOLERANCE = 1e-3
TABLES = ("songs", "teams", "games", "books", "cities")
COLUMNS = ("score", "cost", "year", "size")
TASK = """task: tiny_sql
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path) -> None:
    data = folder / "data.jsonl"
    with data.open("w") as lines:
        for table in TABLES:
            for column in COLUMNS:
                document = {
                    "question": f"t:{table}(id,{column},team)|q:largest {column}?|",
                    "choices": [
                        f"select {function}({column}) from {table};" for function in ("max", "min", "sum")
                    ],
                    "answer": 0,
                }
                lines.write(json.dumps(document) + "\n")
    (folder / "tiny_sql.yaml").write_text(TASK.format(data=data))


def plain_log_likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return float(sum(log_probs[place, token] for place, token in zip(places, continuation, strict=True)))


write_task(Path(work))
client = LocalCompletionsAPI(
    base_url=f"{url}/v1/completions",
    model=model_name,
    tokenizer=model_folder,
    tokenized_requests=True,
    num_concurrent=4,
    max_length=512,
    batch_size=4,
)
results = simple_evaluate(
    model=client,
    tasks=["tiny_sql"],
    task_manager=TaskManager(include_path=work, include_defaults=False),
    log_samples=True,
)
target = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
worst, count = 0.0, 0
for sample in results["samples"]["tiny_sql"]:
    for (context, continuation), (response,) in zip(
        (sample["arguments"][key] for key in sample["arguments"])
        if isinstance(sample["arguments"], dict)
        else sample["arguments"],
        sample["resps"],
        strict=True,
    ):
        ids = client._encode_pair(context, continuation)
        worst = max(worst, abs(plain_log_likelihood(target, *ids) - float(response[0])))
        count += 1
accuracy = results["results"]["tiny_sql"]["acc,none"]
print(f"{count} log-likelihoods, largest difference {worst:.2e}, accuracy {accuracy:.2f}")
assert count == len(TABLES) * len(COLUMNS) * 3
assert worst < TOLERANCE
