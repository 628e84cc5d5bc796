"""Bias, penalties and a minimum length at every node, against the same laws token by token in Python."""

import math
import random
from typing import Any

import pytest
import torch

from decoding import ModelPair, Sequence
from decoding.adjustments import Adjustments
from tests.decoding.laws import ADJUSTING, Logits, adjusted, greedy_text, of_model
from tests.decoding.test_token_tree import random_tree, walk
from tests.decoding.tiny import CPU, LOSSLESS, VOCAB, batch_of, generate, llama_pair, request

ENDS = (2, 7)
GREEDY_METHODS: dict[str, dict[str, Any]] = {"target": {"method": "target"}, **LOSSLESS}


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return llama_pair(eos=(2,))


@pytest.fixture(scope="module")
def logits(pair: ModelPair) -> Logits:
    return of_model(pair.target)


def mixed_rows(rng: random.Random) -> list[Sequence]:
    """A row for every kind of adjustment, and one that has none."""
    rows = []
    for number, fields in enumerate([*ADJUSTING.values(), {}]):
        prompt = [rng.randrange(9) for _ in range(rng.randint(1, 4))]
        rows.append(request(str(number), prompt, max_tokens=30, stop_token_ids=(7,), **fields))
        rows[-1].output_ids += [rng.randrange(9) for _ in range(rng.randrange(4))]
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_proof_08_every_node_of_a_tree_equals_a_plain_loop(seed: int) -> None:
    """Re-parented nodes, rows that differ in everything, all nodes at once and level by level.

    Guards counts taken from siblings or from the root twice, a min_tokens off by one, and one row's
    numbers used for another.
    """
    rng = random.Random(seed)
    sequences = mixed_rows(rng)
    tree, parents = random_tree(rng, len(sequences), width=3, depth=3)
    logits = 3 * torch.randn(len(sequences), 10, 12, dtype=torch.float64)
    before = logits.clone()
    batch = batch_of(sequences, 12, (2,))
    found = batch.adjusted(logits, tree)
    for row, sequence in enumerate(sequences):
        for node in range(10):
            path = [int(tree.token_ids[row, each]) for each in walk(parents[row], node)]
            output = [*sequence.output_ids, *path]
            expected = adjusted(
                logits[row, node].tolist(), sequence.prompt_ids, output, sequence.params, ENDS
            )
            assert found[row, node].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(logits, before)
    for first, count in ((0, 1), (1, 3), (4, 3), (7, 3)):
        part = batch.adjusted(logits[:, first : first + count], tree, first)
        assert torch.equal(part, found[:, first : first + count])


def test_counts_advance_with_what_is_delivered() -> None:
    """Tokens beyond those that count are padding and must not be penalised."""
    rng = random.Random(3)
    sequences = mixed_rows(rng)
    batch = batch_of(sequences, 12, (2,))
    assert batch.adjustments is not None
    delivered = torch.tensor([[rng.randrange(12) for _ in range(4)] for _ in sequences])
    counts = [number % 4 + 1 for number in range(len(sequences))]
    batch.advance(delivered, torch.tensor(counts))
    for sequence, tokens, count in zip(sequences, delivered.tolist(), counts, strict=True):
        sequence.output_ids += tokens[:count]
    batch.adjustments.check_integrity(sequences)
    sequences[0].output_ids.append(3)
    with pytest.raises(AssertionError):
        batch.adjustments.check_integrity(sequences)


def test_rows_that_adjust_nothing_cost_nothing() -> None:
    assert Adjustments.of([request("a", [1])], torch.tensor([[2]]), 12, CPU) is None


def test_row_that_adjusts_nothing_is_untouched_by_its_neighbours() -> None:
    """Bit for bit, or a text would depend on who else is decoded."""
    sequences = [request("a", [1, 4]), request("b", [1, 4], **ADJUSTING["all"])]
    batch = batch_of(sequences, 12)
    tree, _ = random_tree(random.Random(0), 2, width=2, depth=2)
    logits = torch.randn(2, 5, 12)
    found = batch.adjusted(logits, tree)
    assert torch.equal(found[0], logits[0])
    assert not torch.equal(found[1], logits[1])


@pytest.mark.parametrize("stop", [-1, 12, 10**6])
def test_stop_id_outside_the_vocabulary_excludes_nothing(stop: int) -> None:
    """It could index another row's logits, or end the process."""
    batch = batch_of([request("a", [1], min_tokens=3, stop_token_ids=(stop, 5))], 12, (2,))
    tree, _ = random_tree(random.Random(0), 1, width=1, depth=1)
    found = batch.adjusted(torch.zeros(1, 2, 12), tree)
    assert [token for token in range(12) if found[0, 0, token] == -math.inf] == [2, 5]


@pytest.mark.parametrize("fields", ADJUSTING.values(), ids=ADJUSTING)
@pytest.mark.parametrize("method", GREEDY_METHODS.values(), ids=GREEDY_METHODS)
def test_proof_08_greedy_text_equals_a_plain_loop(
    method: dict[str, Any], fields: dict[str, Any], pair: ModelPair, logits: Logits
) -> None:
    """At temperature 0 adjustments still hold, in blocks of several tokens as one by one.

    Guards counts that miss the block's own tokens, or those of earlier steps.
    """
    rng = random.Random(f"{fields}")
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))] for _ in range(6)]
    sequences = [
        request(str(n), prompt, temperature=0, max_tokens=20, **method, **fields)
        for n, prompt in enumerate(prompts)
    ]
    expected = [greedy_text(logits, sequence, (2,)) for sequence in sequences]
    texts = generate(pair, *sequences)
    assert [texts[str(n)].token_ids for n in range(6)] == expected
    if method["method"] != "target":
        accepted = [output.num_accepted_tokens for text in texts.values() for output in text.steps]
        assert sum(accepted) > len(accepted) / 6, "hardly a block was longer than one token"


def test_adjustments_change_these_texts(logits: Logits) -> None:
    """Or the comparison above would prove nothing."""
    plain_text = greedy_text(logits, request("a", [3, 1], temperature=0, max_tokens=20), (2,))
    for name in ("bias", "repetition", "presence and frequency", "all"):
        sequence = request("a", [3, 1], temperature=0, max_tokens=20, **ADJUSTING[name])
        assert greedy_text(logits, sequence, (2,)) != plain_text, name
