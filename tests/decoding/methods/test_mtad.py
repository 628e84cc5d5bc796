"""MTAD: the draft's best beam, and its longest prefix that holds up under the target."""

import math

import pytest
import torch

from decoding import ModelPair
from tests.decoding.tiny import always, generate, llama_pair, make_pair, random_markov, request, scripted_pair

MATCHED = ["draft", "target"]


@pytest.mark.parametrize("reference", MATCHED)
def test_proof_01_never_accepted(reference: str) -> None:
    pair = make_pair(always(2), always(4), vocab_size=6)
    text = generate(
        pair, request("a", [1], "mtad", temperature=0, max_tokens=5, acceptance_reference=reference)
    )["a"]
    assert text.token_ids == [2] * 5
    assert [output.num_accepted_tokens for output in text.steps] == [0] * 5


@pytest.mark.parametrize("reference", MATCHED)
def test_proof_01_always_accepted(reference: str) -> None:
    pair = make_pair(always(2), always(2, share=0.99), vocab_size=6)
    text = generate(
        pair, request("a", [1], "mtad", temperature=0, max_tokens=15, acceptance_reference=reference)
    )["a"]
    assert text.token_ids == [2] * 15
    assert [len(output.token_ids) for output in text.steps] == [5, 5, 5]
    assert {(output.num_draft_nodes, output.num_draft_tokens) for output in text.steps} == {(4, 4)}


def test_proof_01_sometimes_accepted() -> None:
    """The draft knows the cycle 1, 2, 3, 4, 5, 0 but for what follows 3."""
    cycle = torch.eye(6).roll(1, 1) * 0.94 + 0.01
    wrong = cycle.clone()
    wrong[3] = wrong[5]
    text = generate(scripted_pair(cycle, wrong), request("a", [0], "mtad", temperature=0, max_tokens=14))["a"]
    assert text.token_ids == [token % 6 for token in range(1, 15)]
    assert [output.num_accepted_tokens for output in text.steps] == [3, 4, 0, 3]


def joint_recovery() -> ModelPair:
    """From 0: p 0.3 against q 0.9, so depth 1 fails tau 0.5; then p 0.99 against q 0.4, so depth 2 passes."""
    p, q = torch.full((6, 6), 0.0), torch.full((6, 6), 0.0)
    p[0], q[0] = torch.tensor([0, 0.3, 0.35, 0.35, 0, 0]), torch.tensor([0, 0.9, 0.05, 0.05, 0, 0])
    p[1], q[1] = torch.tensor([0, 0, 0.99, 0.01, 0, 0]), torch.tensor([0, 0, 0.4, 0.3, 0.2, 0.1])
    p[2:], q[2:] = torch.eye(6)[5], torch.eye(6)[4]
    return scripted_pair(p, q)


@pytest.mark.parametrize("method", ["mtad", "mmtad"])
def test_ancestor_that_fails_does_not_matter(method: str) -> None:
    """Joint ratio 0.33 at depth 1, 0.825 at depth 2: a rule that stops at the first failure keeps nothing."""
    sequence = request(
        "a",
        [0],
        method,
        temperature=0,
        max_tokens=3,
        num_speculative_tokens=2,
        beam_width=1,
        acceptance_reference="draft",
    )
    text = generate(joint_recovery(), sequence)["a"]
    assert text.steps[0].token_ids == [1, 2, 5]
    assert text.steps[0].num_accepted_tokens == 2


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("reference", MATCHED)
def test_proof_09_threshold_zero_accepts_the_whole_chain(temperature: float, reference: str) -> None:
    """Whatever the target thinks of it, as long as nothing is impossible."""
    sequence = request(
        "a",
        [3, 1],
        "mtad",
        temperature=temperature,
        acceptance_threshold=0,
        acceptance_reference=reference,
        max_tokens=23,
        seed=5,
    )
    text = generate(llama_pair(noise=2.0), sequence)["a"]
    assert [output.num_accepted_tokens for output in text.steps] == [4, 4, 4, 4, 2]
    assert [output.num_draft_tokens for output in text.steps] == [4, 4, 4, 4, 2]


def test_threshold_zero_still_refuses_the_impossible() -> None:
    """A token that the target's own filters exclude has log p = -inf."""
    p, q = random_markov(5, 1), torch.eye(5).roll(1, 1) * 0.9 + 0.02
    p[:, 3] = 0
    text = generate(
        scripted_pair(p / p.sum(1, keepdim=True), q),
        request("a", [1], "mtad", acceptance_threshold=0, max_tokens=40, seed=2),
    )["a"]
    assert 3 not in text.token_ids


@pytest.mark.parametrize("method", ["mtad", "mmtad"])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("reference", MATCHED)
def test_proof_09_infinite_threshold_equals_target(method: str, temperature: float, reference: str) -> None:
    fields = {"temperature": temperature, "max_tokens": 25, "seed": 9, "top_k": 10}
    joint = {"acceptance_threshold": math.inf, "acceptance_reference": reference}
    texts = generate(
        llama_pair(),
        request("target", [3, 1], "target", **fields),
        request("joint", [3, 1], method, **fields, **joint),
    )
    assert texts["joint"].token_ids == texts["target"].token_ids
    assert texts["joint"].log_probs == pytest.approx(texts["target"].log_probs, abs=1e-10)
