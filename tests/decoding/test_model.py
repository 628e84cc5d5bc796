"""What a model computes with its cache equals a stock forward over the whole text, to 1e-10 in float64."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding.model import CausalModel
from decoding.token_tree import TokenTree
from tests.decoding.checkpoints import VOCAB_SIZE, random_model
from tests.decoding.test_token_tree import random_tree, walk
from tests.decoding.tiny import VOCAB, causal, make_pair, plain, tiny_gpt2, tiny_llama

PROMPTS = [[5, 1, 7], [2, 2, 9, 4, 11, 6, 3, 8], [20]]
ROWS = slice(0, 3)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.log_softmax(-1), expected, rtol=0, atol=1e-10)


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def model(request: Any) -> CausalModel:
    """Grouped heads with rotary positions, and plain heads with learned ones."""
    return causal(request.param(), max_model_len=140)


def prefilled(model: CausalModel, prompts: list[list[int]] = PROMPTS) -> Tensor:
    """Fill the first rows with `prompts` but their last tokens, the roots; returns the lengths."""
    model.cache.lengths[: len(prompts)] = [0] * len(prompts)
    for row, prompt in enumerate(prompts):
        if len(prompt) > 1:
            model.prefill(row, prompt[:-1])
    return torch.tensor([len(prompt) - 1 for prompt in prompts])


def tree_of(rng: random.Random, prompts: list[list[int]] = PROMPTS) -> tuple[TokenTree, list[list[int]]]:
    tree, parents = random_tree(rng, len(prompts), width=3, depth=3)
    tree.token_ids[:, 0] = torch.tensor([prompt[-1] for prompt in prompts])
    return tree, parents


@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 5], [7, 1]])
def test_proof_05_chunked_prefill_equals_whole(model: CausalModel, sizes: list[int]) -> None:
    text = PROMPTS[1]
    model.cache.lengths[0] = start = 0
    logits = torch.empty(0)
    for size in sizes:
        logits = model.prefill(0, text[start : start + size], keep=size)
        close(logits, plain(model, text)[start : start + size])
        start += size
    assert model.cache.lengths[0] == len(text)


@pytest.mark.parametrize("seed", range(4))
def test_proof_05_tree_row_equals_its_chain(model: CausalModel, seed: int) -> None:
    """Every node of three ragged rows; guards positions, the ancestor mask and the columns of nodes."""
    lengths = prefilled(model)
    tree, parents = tree_of(random.Random(seed))
    logits = model.forward(ROWS, lengths, tree)
    for row, prompt in enumerate(PROMPTS):
        for node in range(tree.num_nodes):
            path = [int(tree.token_ids[row, each]) for each in walk(parents[row], node)]
            close(logits[row, node], plain(model, prompt + path)[-1])


@pytest.mark.parametrize("seed", range(3))
def test_window_narrower_than_the_tree_goes_by_position(seed: int) -> None:
    """A node's column lies behind its position: a window counted in columns would see too far."""
    model = causal(random_model("mistral", sliding_window=2), vocab_size=VOCAB_SIZE)
    lengths = prefilled(model)
    tree, parents = tree_of(random.Random(seed))
    logits = model.forward(ROWS, lengths, tree).log_softmax(-1)
    for row, prompt in enumerate(PROMPTS):
        for node in range(tree.num_nodes):
            path = [int(tree.token_ids[row, each]) for each in walk(parents[row], node)]
            torch.testing.assert_close(logits[row, node], plain(model, prompt + path)[-1], rtol=0, atol=1e-4)


def test_level_by_level_equals_the_whole_tree(model: CausalModel) -> None:
    """A draft runs one level after the other; earlier nodes are read from the cache."""
    lengths = prefilled(model)
    tree, _ = tree_of(random.Random(5))
    whole = model.forward(ROWS, lengths, tree)
    for first, count in ((0, 1), (1, 3), (4, 3), (7, 3)):
        part = model.forward(ROWS, lengths, tree, first=first, count=count)
        close(part, whole[:, first : first + count].log_softmax(-1))


@pytest.mark.parametrize("seed", range(3))
def test_committed_path_goes_on_as_if_it_had_been_prefilled(model: CausalModel, seed: int) -> None:
    """Guards a commit of the wrong path or to the wrong columns, for paths of every length."""
    lengths = prefilled(model)
    rng = random.Random(seed)
    tree, parents = tree_of(rng)
    model.forward(ROWS, lengths, tree)
    nodes = torch.tensor([0, rng.randrange(1, 7), rng.randrange(7, 10)])
    path = tree.path(nodes, 3)
    model.commit(ROWS, lengths, path)
    committed = lengths + 1 + (path > 0).sum(1)
    model.cache.lengths[:3] = committed.tolist()
    logits = model.forward(ROWS, committed, TokenTree.of_roots(torch.tensor([3, 4, 5]), 1))
    for row, prompt in enumerate(PROMPTS):
        accepted = [int(tree.token_ids[row, each]) for each in walk(parents[row], int(nodes[row]))]
        close(logits[row, 0], plain(model, [*prompt, *accepted, 3 + row])[-1])


def test_catch_up_runs_the_missing_last_column(model: CausalModel) -> None:
    """The last committed column holds rubbish; a row that has none must not look at one."""
    lengths = prefilled(model)
    for row, length in enumerate(lengths.tolist()):
        if length:
            model.cache.storage[:, :, row, :, length - 1] = 1e3
    last = torch.tensor([(prompt[-2] if len(prompt) > 1 else prompt[-1], prompt[-1]) for prompt in PROMPTS])
    logits = model.catch_up(ROWS, lengths, last)
    for row, prompt in enumerate(PROMPTS):
        close(logits[row], plain(model, prompt)[-1])


@pytest.mark.parametrize("length", [59, 60, 63, 64, 65, 127, 128])
def test_buckets_change_nothing(model: CausalModel, length: int) -> None:
    """A live length rounded down, or up into another row's columns, shows at a bucket's edge."""
    rng = random.Random(length)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)], [3, 4], [5]]
    lengths = prefilled(model, prompts)
    tree, parents = tree_of(rng, prompts)
    logits = model.forward(ROWS, lengths, tree)
    for row, prompt in enumerate(prompts):
        path = [int(tree.token_ids[row, each]) for each in walk(parents[row], 9)]
        close(logits[row, 9], plain(model, prompt + path)[-1])


def test_pass_over_some_rows_leaves_the_others(model: CausalModel) -> None:
    lengths = prefilled(model)
    before = model.cache.storage.clone()
    tree, _ = tree_of(random.Random(1))
    model.forward(slice(1, 2), lengths[1:2], TokenTree(**{k: getattr(tree, k)[1:2] for k in tree.__slots__}))
    for row in (0, 2):
        assert torch.equal(model.cache.storage[:, :, row], before[:, :, row])


def test_logits_are_cut_to_the_shared_vocabulary() -> None:
    """Padded embedding rows of one model must never be drawn."""
    model = causal(tiny_llama(), vocab_size=20)
    lengths = prefilled(model)
    assert model.forward(ROWS, lengths, TokenTree.of_roots(torch.tensor([1, 2, 3]), 1)).shape == (3, 1, 20)


def test_half_precision_logits_become_float32() -> None:
    model = causal(tiny_llama().bfloat16())
    assert model.prefill(0, [1, 2]).dtype == torch.float32
    assert model.cache.storage.dtype == torch.bfloat16


def test_pair_says_what_it_holds() -> None:
    target = tiny_llama()
    pair = make_pair(target, tiny_gpt2())
    assert pair.has_draft
    assert list(pair.models) == ["target", "draft"]
    assert pair.device == torch.device("cpu")
    alone = make_pair(target)
    assert not alone.has_draft
    assert list(alone.models) == ["target"]
    weights = sum(weight.numel() * 8 for weight in target.parameters())
    assert alone.memory_bytes == weights + alone.target.cache.num_bytes
    assert pair.memory_bytes > alone.memory_bytes
