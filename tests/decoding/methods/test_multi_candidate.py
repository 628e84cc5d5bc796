"""Multi-candidate decoding: by scripts, token for token at temperature 0; its law is in test_laws."""

import random

import pytest
import torch

from decoding.methods.multi_candidate import MultiCandidate, level_sizes
from tests.decoding.tiny import (
    VOCAB,
    always,
    batch_of,
    generate,
    llama_pair,
    make_pair,
    random_markov,
    request,
    scripted_pair,
)

REPLACEMENT = pytest.mark.parametrize("replacement", [False, True])


@REPLACEMENT
def test_proof_01_never_accepted(replacement: bool) -> None:
    """Every step delivers the recovered token alone; the last levels are cut before drawing."""
    pair = make_pair(always(2, share=1), always(4, share=1), vocab_size=6)
    text = generate(pair, request("a", [1], "multi_candidate", max_tokens=5, replacement=replacement))["a"]
    assert text.token_ids == [2] * 5
    assert [output.num_accepted_tokens for output in text.steps] == [0] * 5
    assert [output.num_draft_tokens for output in text.steps] == [3, 3, 2, 1, 0]
    assert {output.num_draft_nodes for output in text.steps} == {4 + 8 + 16}


@REPLACEMENT
@pytest.mark.parametrize("temperature", [0, 1])
def test_proof_01_always_accepted(temperature: float, replacement: bool) -> None:
    """With q = p the first child always stays, and a bonus follows the whole path."""
    p = random_markov(6, 0)
    sequence = request(
        "a", [1], "multi_candidate", temperature=temperature, max_tokens=12, replacement=replacement
    )
    text = generate(scripted_pair(p, p), sequence)["a"]
    assert [len(output.token_ids) for output in text.steps] == [4, 4, 4]
    assert [output.num_accepted_tokens for output in text.steps] == [3, 3, 3]


def test_proof_01_sometimes_accepted() -> None:
    """The draft's second choice after 3 is the right one, after 5 it does not know it at all.

    A chain would stop at 3; the tree's second child is kept there, at depth 3 it needs its own.
    """
    cycle = torch.eye(6).roll(1, 1)
    q = cycle * 0.94 + 0.01
    q[3] = torch.tensor([0.5, 0.01, 0.01, 0.01, 0.46, 0.01])
    q[5] = torch.tensor([0.0, 0.0, 0.5, 0.5, 0.0, 0.0])
    sequence = request(
        "a", [0], "multi_candidate", temperature=0, max_tokens=12, candidates_per_level=(2, 2, 2, 2)
    )
    text = generate(scripted_pair(cycle, q), sequence)["a"]
    assert text.token_ids == [token % 6 for token in range(1, 13)]
    assert [output.num_accepted_tokens for output in text.steps] == [4, 0, 4, 0]


@REPLACEMENT
def test_proof_04_greedy_equals_target_token_for_token(replacement: bool) -> None:
    """Whatever the tree holds at temperature 0, it is the target's argmax that is written."""
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(20)]
    pair = llama_pair(noise=0.1, eos=(2,), rows=41)
    sequences = [
        request(f"{method} {n}", prompt, method, temperature=0, max_tokens=30, replacement=replacement)
        for n, prompt in enumerate(prompts)
        for method in ("target", "multi_candidate")
    ]
    texts = generate(pair, *sequences)
    for n in range(20):
        expected, found = texts[f"target {n}"], texts[f"multi_candidate {n}"]
        assert found.token_ids == expected.token_ids
        assert found.finish_reason == expected.finish_reason
    accepted = [step.num_accepted_tokens for n in range(20) for step in texts[f"multi_candidate {n}"].steps]
    assert set(accepted) == {0, 1, 2, 3}


def test_nodes_are_numbered_level_by_level() -> None:
    """Children of the j-th node of a level are j * children onwards of the next, scores are joint q."""
    assert level_sizes((4, 2, 2)) == [1, 4, 8, 16]
    q = random_markov(6, 3)
    pair = scripted_pair(q, q)
    assert pair.draft is not None
    batch = batch_of([request("a", [1], "multi_candidate", seed=4), request("b", [2], "multi_candidate")], 6)
    tree, laws = MultiCandidate()._propose(pair.draft, batch, batch.streams)
    assert laws.shape == (2, 13, 6)
    assert tree.parents[0].tolist() == [0] * 5 + [node for node in range(1, 13) for _ in range(2)]
    for row in range(2):
        for node in range(1, 29):
            parent = int(tree.parents[row, node])
            own = laws[row, parent, tree.token_ids[row, node]]
            expected = tree.draft_log_probs[row, parent] + own
            assert tree.draft_log_probs[row, node].item() == pytest.approx(expected.item(), abs=1e-12)
            assert own.item() == pytest.approx(
                q[tree.token_ids[row, parent], tree.token_ids[row, node]].log().item(), abs=1e-12
            )


def test_children_without_replacement_are_distinct_and_fresh_at_every_node() -> None:
    """Noise that was reused at another node or step would make its children the same again."""
    q = torch.full((40, 40), 1 / 40)
    pair = scripted_pair(q, q)
    assert pair.draft is not None
    batch = batch_of([request(str(n), [1], "multi_candidate", seed=n) for n in range(9)], 40)
    tree, _ = MultiCandidate()._propose(pair.draft, batch, batch.streams)
    drawn = set()
    for row in range(9):
        for parent in range(13):
            children = tree.token_ids[row, 1:][tree.parents[row, 1:] == parent].tolist()
            assert len(set(children)) == len(children)
            drawn.add(tuple(children))
    assert len(drawn) > 0.9 * 9 * 13


def test_padding_children_are_never_delivered() -> None:
    """A draft that offers one token for four places: three nodes of probability zero."""
    p, q = random_markov(5, 1, zeros=1), torch.eye(5).roll(1, 1)
    texts = generate(
        scripted_pair(p, q),
        *(request(str(n), [1], "multi_candidate", max_tokens=20, seed=n) for n in range(8)),
    )
    for text in texts.values():
        assert all(p[a, b] > 0 for a, b in zip([1, *text.token_ids], text.token_ids, strict=False))
