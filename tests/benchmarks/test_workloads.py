"""Workloads are reproducible, and wrapped exactly as the chat route wraps them."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.workloads import WORKLOADS, chat_ids, load_prompts

TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def test_chat_has_a_hundred_different_prompts() -> None:
    prompts = load_prompts("chat")
    assert len(prompts) == len({p.id for p in prompts}) == len({p.prompt for p in prompts}) == 100
    assert all(prompt.prompt == prompt.prompt.strip() != "" for prompt in prompts)


@pytest.mark.parametrize("name", WORKLOADS)
def test_seed_decides_the_order_and_limit_a_prefix(name: str) -> None:
    assert load_prompts(name, 5, seed=1) == load_prompts(name, 9, seed=1)[:5]
    assert load_prompts(name, seed=1) != load_prompts(name, seed=2)
    assert sorted(p.id for p in load_prompts(name, seed=1)) == sorted(
        p.id for p in load_prompts(name, seed=2)
    )
    assert load_prompts(name, 0) == []


@pytest.mark.parametrize("limit", [-1, 101])
def test_limit_outside_the_workload_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match="limit must be between 0 and 100"):
        load_prompts("chat", limit)


def test_unknown_workload_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="no workload 'poems'; there are: .*chat"):
        load_prompts("poems")


def test_chat_ids_follow_the_template() -> None:
    vocabulary = {word: index for index, word in enumerate(["<s>", "user", "hello", "there"])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)
    assert chat_ids(tokenizer, "hello there") == [0, 1, 2, 3, 0]
