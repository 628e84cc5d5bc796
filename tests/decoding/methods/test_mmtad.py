"""MMTAD: the whole beam tree is verified, the longest joint prefix in it is kept."""

import itertools
import math

import pytest
import torch

from decoding import Engine
from tests.decoding.tiny import (
    Text,
    always,
    drain,
    generate,
    llama_pair,
    make_pair,
    plain,
    request,
    scripted_pair,
    tiny_llama,
)

MATCHED = ["draft", "target"]


@pytest.mark.parametrize("reference", MATCHED)
def test_proof_01_never_accepted(reference: str) -> None:
    """The target's token is not even among the draft's beams."""
    q = torch.full((6, 6), 0.2)
    q[:, 2] = 0
    p = torch.eye(6)[2].expand(6, 6)
    text = generate(
        scripted_pair(p, q),
        request("a", [1], "mmtad", temperature=0, max_tokens=5, acceptance_reference=reference),
    )["a"]
    assert text.token_ids == [2] * 5
    assert [output.num_accepted_tokens for output in text.steps] == [0] * 5


@pytest.mark.parametrize("reference", MATCHED)
def test_proof_01_always_accepted(reference: str) -> None:
    pair = make_pair(always(2), always(2, share=0.99), vocab_size=6)
    text = generate(
        pair, request("a", [1], "mmtad", temperature=0, max_tokens=15, acceptance_reference=reference)
    )["a"]
    assert text.token_ids == [2] * 15
    assert [len(output.token_ids) for output in text.steps] == [5, 5, 5]
    assert {(output.num_draft_nodes, output.num_draft_tokens) for output in text.steps} == {(16, 4)}


def test_proof_01_sometimes_accepted() -> None:
    """The draft prefers a wrong token after 3 and knows the right one second; mtad would lose there.

    At 5 it does not know the right token at all.
    """
    cycle = torch.eye(6).roll(1, 1)
    q = cycle * 0.94 + 0.01
    q[3] = torch.tensor([0.5, 0.01, 0.01, 0.01, 0.46, 0.01])
    q[5] = torch.tensor([0.0, 0.0, 0.5, 0.5, 0.0, 0.0])
    fields = {"temperature": 0, "max_tokens": 12}
    mmtad = generate(scripted_pair(cycle, q), request("a", [0], "mmtad", **fields))["a"]
    mtad = generate(scripted_pair(cycle, q), request("a", [0], "mtad", **fields))["a"]
    assert mmtad.token_ids == mtad.token_ids == [token % 6 for token in range(1, 13)]
    assert [output.num_accepted_tokens for output in mmtad.steps] == [4, 0, 4, 0]
    assert [output.num_accepted_tokens for output in mtad.steps] == [3, 1, 3, 1]


@pytest.mark.parametrize("reference", MATCHED)
@pytest.mark.parametrize("temperature", [0, 1])
def test_proof_09_threshold_zero_takes_the_likeliest_node_of_full_depth(
    temperature: float, reference: str
) -> None:
    sequence = request(
        "a",
        [3, 1],
        "mmtad",
        temperature=temperature,
        acceptance_threshold=0,
        acceptance_reference=reference,
        max_tokens=23,
        seed=5,
    )
    text = generate(llama_pair(noise=2.0), sequence)["a"]
    assert [output.num_accepted_tokens for output in text.steps] == [4, 4, 4, 4, 2]


def beam_search(model: object, prompt: list[int], width: int, depth: int) -> tuple[int, ...]:
    """The best block of `depth` tokens that a beam over plain forwards finds."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(depth):
        candidates = []
        for score, tokens in beams:
            log_probs = plain(model, [*prompt, *tokens])[-1].tolist()  # type: ignore[arg-type]
            candidates += [(score + each, (*tokens, token)) for token, each in enumerate(log_probs)]
        beams = sorted(candidates, reverse=True)[:width]
    return beams[0][1]


@pytest.mark.parametrize("method", ["mtad", "mmtad"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.99])
def test_proof_09_draft_equal_to_target_accepts_the_models_own_best_beam(method: str, tau: float) -> None:
    """With q = p and tau < 1 at temperature 0: every block is the beam search of the model itself."""
    pair = make_pair(*(tiny_llama(seed=4, initializer_range=0.2) for _ in range(2)))
    sequence = request(
        "a",
        [3, 1, 4],
        method,
        temperature=0,
        max_tokens=16,
        num_speculative_tokens=3,
        acceptance_threshold=tau,
        acceptance_reference="draft",
    )
    text = generate(pair, sequence)["a"]
    delivered: list[int] = []
    for output in text.steps[:4]:
        block = beam_search(pair.target, [3, 1, 4, *delivered], 4, 3)
        assert tuple(output.token_ids[:3]) == block
        assert len(output.token_ids) == 4
        delivered += output.token_ids
    greedy = [int(plain(pair.target, [3, 1, 4, *delivered[:n]])[-1].argmax()) for n in range(len(delivered))]
    assert delivered != greedy, "the beam must differ from greedy or this shows little"


def test_accepted_block_is_within_tau_of_the_targets_own_best_choices() -> None:
    """The guarantee of the `target` reference, whatever the draft is worth."""
    pair = llama_pair(noise=0.2)
    sequences = [
        request(str(seed), [seed, 2], "mmtad", max_tokens=40, seed=seed, acceptance_threshold=0.2)
        for seed in range(8)
    ]
    texts = generate(pair, *sequences)
    lengths = set()
    for seed in range(8):
        ids, text = [seed, 2], texts[str(seed)]
        log_probs = plain(pair.target, ids + text.token_ids)
        for output in text.steps:
            block = output.token_ids[: output.num_accepted_tokens]
            at = range(len(ids) - 1, len(ids) - 1 + len(block))
            own = sum(log_probs[n, token].item() for n, token in zip(at, block, strict=True))
            best = sum(log_probs[n].max().item() for n in at)
            assert own - best > math.log(0.2) if block else True
            lengths.add(len(block))
            ids += output.token_ids
    assert lengths == {0, 1, 2, 3, 4}


def test_commit_moves_at_most_gamma_columns_per_row() -> None:
    """Never the whole cache: a step moves one column per depth in each model, whatever the length."""
    pair = llama_pair()
    engine = Engine(pair, 8)
    for row in range(8):
        engine.add(
            request(str(row), [row + 1] * 9, "mmtad", num_speculative_tokens=3, max_tokens=20, seed=row)
        )
    while engine.has_work():
        before = [model.cache.columns_moved for model in pair.models.values()]
        engine.step()
        moved = [model.cache.columns_moved for model in pair.models.values()]
        assert all(after - start <= 3 for start, after in zip(before, moved, strict=True))
    assert moved[0] > 0


def test_wider_trees_accept_more() -> None:
    """The mean block grows with W; a tree whose further beams were never judged would stay at W 1."""
    pair = llama_pair(noise=0.4)
    means = []
    for width in (1, 2, 4, 8):
        engine, texts = Engine(pair, 9), dict[str, Text]()
        for seed in range(8):
            engine.add(
                request(
                    str(seed),
                    [seed, seed],
                    "mmtad",
                    temperature=0,
                    max_tokens=40,
                    beam_width=width,
                    num_speculative_tokens=3,
                )
            )
        steps = list(itertools.chain.from_iterable(text.steps for text in drain(engine, texts).values()))
        means.append(sum(len(output.token_ids) for output in steps) / len(steps))
    assert means == sorted(means)
    assert means[-1] > 1.2 * means[0]


def test_reference_is_the_likeliest_beam_of_the_draft() -> None:
    """p = 0.25 of the better beam under p is under tau 0.5 times q = 0.6 of the best beam under q.

    Judged against the worse beam, q = 0.4, it would pass.
    """
    p, q = torch.zeros(4, 4), torch.zeros(4, 4)
    p[:] = torch.tensor([0.0, 0.2, 0.25, 0.55])
    q[:] = torch.tensor([0.0, 0.6, 0.4, 0.0])
    fields = {"num_speculative_tokens": 1, "beam_width": 2, "acceptance_reference": "draft"}
    text = generate(scripted_pair(p, q), request("a", [1], "mmtad", temperature=0, max_tokens=2, **fields))[
        "a"
    ]
    assert text.steps[0].num_accepted_tokens == 0
    assert text.token_ids == [3, 3]
