"""Averages of how deep proposals survive: of the pair, of one sequence, by family of shapes."""

import random

import pytest

from decoding import DecodingConfig
from decoding.config import Preset
from decoding.survival import MAX_TABLES, Family, PairSurvival, SequenceSurvival

CONFIG = DecodingConfig(adaptive=True)
TREE, SHALLOW, BUDGET = Preset("mmtad", 4, 4), Preset("mmtad", 1, 4), Preset("mmtad", 4, 4, budget=8)
CHAIN = Preset("mmtad", 1, 1)


def sequence(
    pair: PairSurvival, config: DecodingConfig = CONFIG, *, greedy: bool = False
) -> SequenceSurvival:
    return SequenceSurvival(pair, config, greedy=greedy)


def play(survival: SequenceSurvival, shape: Preset, chances: list[float], steps: int, seed: int = 0) -> None:
    generator = random.Random(seed)
    for _ in range(steps):
        survived = next((d for d, chance in enumerate(chances) if generator.random() >= chance), len(chances))
        survival.note(shape, shape.depth, min(survived, shape.depth))


def test_expected_tokens_are_learnt() -> None:
    survival = sequence(PairSurvival())
    play(survival, TREE, [0.6, 0.5, 0.4, 0.3], 3000)
    expected = 1 + 0.6 + 0.6 * 0.5 + 0.6 * 0.5 * 0.4 + 0.6 * 0.5 * 0.4 * 0.3
    assert survival.expected_tokens(TREE, 100) == pytest.approx(expected, rel=0.08)


def test_shallower_trees_of_a_width_are_known_with_the_deep_one() -> None:
    survival = sequence(PairSurvival())
    play(survival, TREE, [0.6, 0.5, 0.4, 0.3], 3000)
    assert survival.expected_tokens(SHALLOW, 100) == pytest.approx(1.6, rel=0.08)
    assert survival.expected_tokens(BUDGET, 100) < survival.expected_tokens(TREE, 100)  # it has fewer nodes


def test_end_of_the_text_cuts_a_step() -> None:
    survival = sequence(PairSurvival())
    whole = survival.expected_tokens(TREE, 5)
    assert survival.expected_tokens(TREE, 1) == 1
    assert 1 < survival.expected_tokens(TREE, 2) < survival.expected_tokens(TREE, 4) < whole
    assert survival.expected_tokens(TREE, 50) == whole
    assert survival.expected_tokens(Preset("mmtad"), 50) == 1


def test_first_guess_is_hopeful_and_soon_given_up() -> None:
    survival = sequence(PairSurvival())
    assert survival.expected_tokens(TREE, 100) > 3.5
    play(survival, TREE, [0.0], 10)
    assert survival.expected_tokens(TREE, 100) < 1.8


def test_what_one_shape_shows_is_believed_of_its_kin() -> None:
    """Four alternatives miss half as often as one; what nobody has reached survives as what lies above it."""
    survival = sequence(PairSurvival())
    play(survival, SHALLOW, [0.8], 3000)
    assert survival.expected_tokens(CHAIN, 100) == pytest.approx(1 + 0.6, rel=0.05)
    assert survival.expected_tokens(TREE, 100) == pytest.approx(1 + 0.8 + 0.8**2 + 0.8**3 + 0.8**4, rel=0.05)
    play(survival, CHAIN, [0.1], 3000, seed=1)
    assert survival.expected_tokens(CHAIN, 100) == pytest.approx(1.1, rel=0.08)  # its own counts for more
    assert survival.expected_tokens(SHALLOW, 100) == pytest.approx(1.8, rel=0.05)


def test_sequences_that_run_hear_what_others_show() -> None:
    pair = PairSurvival()
    idle, busy = sequence(pair), sequence(pair)
    hopeful = idle.expected_tokens(TREE, 100)
    play(busy, CHAIN, [0.0], 8)
    assert idle.expected_tokens(TREE, 100) < hopeful - 1


def test_what_is_known_of_a_pair_has_fewer_editions_the_more_it_is() -> None:
    pair = PairSurvival()
    editions = []
    for _ in range(1024):
        pair.note(Family.of(TREE, CONFIG, greedy=False), 4, 2)
        editions.append(pair.edition)
    assert len(set(editions[:8])) == 4
    assert len(set(editions[512:])) <= 10


def test_a_sequence_starts_from_the_pairs_and_goes_its_own_way() -> None:
    pair = PairSurvival()
    play(sequence(pair), TREE, [0.5] * 4, 500)
    other = sequence(pair)
    assert other.expected_tokens(TREE, 100) == pytest.approx(1.94, rel=0.1)
    play(other, TREE, [1.0] * 4, 60)
    assert other.expected_tokens(TREE, 100) > 3.3
    assert sequence(pair).expected_tokens(TREE, 100) < 2.6


def test_tables_are_apart_by_what_decides_acceptance() -> None:
    pair = PairSurvival()
    play(sequence(pair), TREE, [0.0], 200)
    known = sequence(pair).expected_tokens(TREE, 100)
    for config, greedy in (
        (CONFIG, True),
        (DecodingConfig(adaptive=True, acceptance_threshold=0.1), False),
        (DecodingConfig(adaptive=True, acceptance_reference="draft"), False),
    ):
        assert sequence(pair, config, greedy=greedy).expected_tokens(TREE, 100) > known + 2
    chain = Preset("speculative", 4, 1)
    lossless = [DecodingConfig("speculative", acceptance_threshold=tau) for tau in (0.1, 0.9)]
    assert len({Family.of(chain, config, greedy=False) for config in lossless}) == 1


def test_number_of_tables_is_bounded() -> None:
    pair = PairSurvival()
    for number in range(2 * MAX_TABLES):
        config = DecodingConfig(acceptance_threshold=number / 1000)
        pair.note(Family.of(TREE, config, greedy=False), 4, 0)
    assert len(pair._tables) == MAX_TABLES
