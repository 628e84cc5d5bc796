"""The device state of a group: built from its sequences, advanced by a step."""

import math

import torch

from decoding.batch import NO_TOKEN, sequence_end_ids
from tests.decoding.tiny import batch_of, request


def test_batch_holds_what_its_sequences_say() -> None:
    first = request("a", [5, 6, 7], "mmtad", max_tokens=9, seed=-3, choice=2, acceptance_threshold=0)
    second = request("b", [8], "mmtad", max_tokens=2, acceptance_reference="draft", acceptance_threshold=0.5)
    first.output_ids += [1, 2]
    first.num_steps = 4
    batch = batch_of([first, second])
    assert (batch.depth, batch.width) == (4, 4)
    assert batch.lengths.tolist() == [4, 0]
    assert batch.last_tokens.tolist() == [[1, 2], [8, 8]]
    assert batch.roots.tolist() == [2, 8]
    assert batch.steps.tolist() == [4, 0]
    assert batch.remaining.tolist() == [7, 2]
    assert (batch.seeds.tolist(), batch.choices.tolist()) == ([-3, 0], [2, 0])
    assert batch.log_thresholds.tolist() == [-math.inf, torch.tensor(0.5).log().item()]
    assert batch.target_reference.tolist() == [True, False]


def test_limits_leave_one_token_for_the_target() -> None:
    batch = batch_of([request(str(left), [1], max_tokens=left) for left in (1, 2, 4, 5, 9)])
    assert batch.limits.tolist() == [0, 1, 3, 4, 4]


def test_ends_are_each_rows_own() -> None:
    """Guards padding of the shorter lists: it must be no token's id."""
    sequences = [
        request("a", [1], stop_token_ids=(4, 5)),
        request("b", [1], ignore_eos=True),
        request("c", [1], stop_token_ids=(4,), ignore_eos=True),
    ]
    batch = batch_of(sequences, eos=(2,))
    tokens = torch.tensor([[0, 2, 4, 5]]).expand(3, 4)
    assert batch.ends(tokens).tolist() == [
        [False, True, True, True],
        [False] * 4,
        [False, False, True, False],
    ]
    assert (batch.end_ids[1] == NO_TOKEN).all()
    assert [sequence_end_ids(each, (2,)) for each in sequences] == [{2, 4, 5}, set(), {4}]


def test_advance_takes_over_one_and_many_tokens() -> None:
    """After one token the last committed one is the old root, after more it is among the delivered."""
    batch = batch_of([request("a", [5, 6], max_tokens=9), request("b", [7, 8], max_tokens=9)])
    streams = batch.streams
    batch.advance(torch.tensor([[1, 0, 0], [2, 3, 4]]), torch.tensor([1, 3]))
    assert batch.last_tokens.tolist() == [[6, 1], [3, 4]]
    assert batch.lengths.tolist() == [2, 4]
    assert batch.remaining.tolist() == [8, 6]
    assert batch.steps.tolist() == [1, 1]
    assert not (batch.streams == streams).any()


def test_streams_depend_on_seed_choice_and_step() -> None:
    pairs = ((1, 0), (0, 1), (1, 1))
    sequences = [
        request(str(number), [1], seed=seed, choice=choice) for number, (seed, choice) in enumerate(pairs)
    ]
    sequences.append(request("later", [1], seed=1))
    sequences[-1].num_steps = 1
    assert batch_of(sequences).streams.unique().numel() == 4
