"""Costs between and beyond what was measured, and how steps correct them."""

import random

import pytest

from decoding.config import Preset
from decoding.cost_curve import CATCH_UP, DRAFT, GAP, TARGET, CostCurve, CostDrift
from decoding.draft_gap import GAP_TOKENS

OFF, CHAIN, TREE = Preset("mmtad"), Preset("mmtad", 1, 1), Preset("mmtad", 4, 4)
CURVE = CostCurve(
    {
        TARGET: {
            1: [(1, 10.0), (2, 12.0), (5, 18.0), (17, 42.0)],
            4: [(1, 14.0), (2, 20.0)],
            16: [(1, 38.0)],
        },
        DRAFT: {1: [(1, 2.0), (4, 3.5)], 4: [(1, 3.0)], 16: [(1, 7.0)]},
        CATCH_UP: {1: [(2, 2.5)], 4: [(2, 3.5)], 16: [(2, 7.5)]},
        GAP: {1: [(GAP_TOKENS, 8.0)], 4: [(GAP_TOKENS, 20.0)], 16: [(GAP_TOKENS, 68.0)]},
    }
)


def test_steps_are_sums_of_passes() -> None:
    assert CURVE.step(OFF, 1) == 10
    assert CURVE.step(CHAIN, 1) == 2.5 + 12
    assert CURVE.step(Preset("mmtad", 2, 2), 1) == 2.5 + 2.5 + 18
    assert CURVE.step(TREE, 1) == 2.5 + 3 * 3.5 + 42
    assert CURVE.step(Preset("mmtad", 4, 4, budget=4), 1) == 2.5 + 3 * 3.5 + 18
    assert CURVE.step(Preset("mtad", 4, 4), 1) == 2.5 + 3 * 3.5 + 18


def test_between_and_beyond_sizes_lines_are_followed() -> None:
    assert [CURVE.step(OFF, rows) for rows in (1, 2, 4, 10, 16, 22)] == pytest.approx(
        [10, 10 + 4 / 3, 14, 26, 38, 50]
    )


def test_what_was_not_measured_at_a_size_costs_what_it_does_at_smaller_ones() -> None:
    """Per row, so never too little on hardware where rows share anything."""
    assert CURVE.seconds(TARGET, 4, 5) == 20 + 4 * (18 - 12)
    assert CURVE.seconds(TARGET, 16, 2) == 38 + 4 * (20 - 14)
    assert CURVE.seconds(DRAFT, 4, 4) == 3 + 4 * 1.5
    assert CURVE.seconds(TARGET, 16, 5) == 38 + 4 * (20 + 4 * 6 - 14)


def test_gaps_cost_whole_passes_and_a_part() -> None:
    assert CURVE.gap(0, 1) == 0
    assert CURVE.gap(GAP_TOKENS, 1) == 8
    assert CURVE.gap(2 * GAP_TOKENS + GAP_TOKENS // 2, 1) == 2 * 8 + 2.5 + 5.5 / 2


def run(drift: CostDrift, shapes: list[Preset], truth: dict[Preset, float], speed: list[float]) -> None:
    for shape, factor in zip(shapes, speed, strict=True):
        drift.note(shape, truth[shape] * factor)


def test_drift_of_a_shape_is_found_whatever_the_machine_does() -> None:
    """Its true cost is 1.4 times the curve's, while the machine becomes three times as slow and recovers."""
    generator = random.Random(1)
    drift = CostDrift()
    shapes = [OFF if number // 16 % 2 else TREE for number in range(1200)]
    speed = [(3.0 if 400 < number < 800 else 1.0) * generator.uniform(0.9, 1.1) for number in range(1200)]
    run(drift, shapes, {OFF: 1.0, TREE: 1.4}, speed)
    assert drift.of(TREE) == pytest.approx(1.4, rel=0.1)
    assert drift.of(OFF) == 1


def test_rare_plain_steps_are_enough() -> None:
    drift = CostDrift()
    shapes = [OFF if number % 64 == 63 else CHAIN for number in range(3000)]
    run(drift, shapes, {OFF: 1.0, CHAIN: 0.7}, [1.0] * 3000)
    assert drift.of(CHAIN) == pytest.approx(0.7, rel=0.1)


def test_a_step_that_was_held_up_changes_little() -> None:
    drift = CostDrift()
    shapes = [OFF, CHAIN] * 100
    run(drift, shapes, {OFF: 1.0, CHAIN: 1.0}, [1.0] * 200)
    drift.note(OFF, 1.0)
    drift.note(CHAIN, 50.0)
    assert drift.of(CHAIN) < 1.1
