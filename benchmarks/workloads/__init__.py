"""The prompts that are measured with, shipped as text: one JSON object per line with `id` and `prompt`."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FOLDER = Path(__file__).parent
WORKLOADS = tuple(sorted(path.stem for path in _FOLDER.glob("*.jsonl")))


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as text, without any chat template."""

    id: str
    prompt: str


def load_prompts(name: str, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """The first `limit` prompts of the workload `name` in the order that `seed` gives.

    So a smaller limit is a prefix of a larger one, and equal arguments give equal prompts.

    Raises:
        ValueError: there is no such workload, or it has fewer prompts than `limit`.
    """
    if name not in WORKLOADS:
        raise ValueError(f"no workload {name!r}; there are: {', '.join(WORKLOADS)}")
    lines = (_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [Prompt(**json.loads(line)) for line in lines]
    if limit is not None and not 0 <= limit <= len(prompts):
        raise ValueError(f"limit must be between 0 and {len(prompts)}, the size of workload {name!r}")
    random.Random(seed).shuffle(prompts)
    return prompts[:limit]


def chat_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """Token ids of `prompt` as one user turn of the tokenizer's chat template, the answer to follow."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template writes every special token that it wants.
    ids: list[int] = tokenizer.encode(str(text), add_special_tokens=False)
    return ids
