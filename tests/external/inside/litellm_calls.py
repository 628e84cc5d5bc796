"""Runs inside LiteLLM's environment: two providers, whole, streamed, and every kind of error.

Usage: litellm_calls.py URL MODEL
"""

import os
import sys
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing is fetched

import litellm

url, model = sys.argv[1:]
PROMPT = "t:songs(id,score)|q:largest score?|"
ASKED: dict[str, Any] = {
    "api_base": f"{url}/v1",
    "api_key": "none",
    "max_tokens": 40,
    "temperature": 0,
    "num_retries": 0,
}
litellm.drop_params = False

texts = set()
for provider in ("text-completion-openai", "hosted_vllm"):
    name = f"{provider}/{model}"
    body = {"speculative": {"method": "speculative", "num_speculative_tokens": 3}}
    whole = litellm.text_completion(model=name, prompt=PROMPT, extra_body=body, **ASKED)
    text = whole.choices[0].text
    metrics = whole.metrics
    assert metrics["speculative"]["method"] == "speculative", metrics
    stream = litellm.text_completion(model=name, prompt=PROMPT, extra_body=body, stream=True, **ASKED)
    streamed = "".join(chunk.choices[0].text or "" for chunk in stream if chunk.choices)
    assert streamed == text, (streamed, text)
    assert whole.usage.completion_tokens > 0
    texts.add(text)
    print(f"{name}: {text!r}, {whole.usage.completion_tokens} tokens, streamed the same")
    for fields, kind in (
        ({"model": f"{provider}/nope"}, litellm.NotFoundError),
        ({"temperature": 3}, litellm.BadRequestError),
        ({"max_tokens": 10_000}, litellm.ContextWindowExceededError),
    ):
        try:
            litellm.text_completion(**({"model": name, "prompt": PROMPT} | ASKED | fields))
        except kind as error:
            print(f"{name}: {fields} is {type(error).__name__}")
        else:
            raise AssertionError(f"{fields} was not refused")
assert len(texts) == 1, texts
whole = litellm.text_completion(model=f"text-completion-openai/{model}", prompt=[[1, 5, 6]], **ASKED)
assert whole.usage.prompt_tokens == 3
print("token ids: ok")
