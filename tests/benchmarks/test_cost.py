"""Costs of passes and the speed-ups computed from them."""

from typing import Any

import pytest

from benchmarks.cost import (
    CATCH_UP,
    CostTable,
    draft_passes,
    last_pass,
    measure_costs,
    needed_passes,
    speed_up,
)
from decoding import DecodingConfig
from tests.decoding.tiny import llama_pair

SECONDS = {
    ("target", 1): 0.010,
    ("target", 4): 0.010,
    ("target", 5): 0.012,
    ("target", 17): 0.015,
    ("draft", CATCH_UP): 0.002,
    ("draft", 1): 0.001,
    ("draft", 4): 0.002,
}
COSTS = CostTable(batch=1, context=64, seconds=SECONDS, copy_bandwidth=1e9)


def config(method: str, **fields: Any) -> DecodingConfig:
    return DecodingConfig(method=method, **{"num_speculative_tokens": 4, "beam_width": 4, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "draft", "last"),
    [
        ("target", [], ("target", 1)),
        ("draft", [], ("draft", 1)),
        ("speculative", [("draft", CATCH_UP), *[("draft", 1)] * 3], ("target", 5)),
        ("mtad", [("draft", CATCH_UP), *[("draft", 4)] * 3], ("target", 5)),
        ("mmtad", [("draft", CATCH_UP), *[("draft", 4)] * 3], ("target", 17)),
        ("mtjd", [("target", 1), *[("target", 4)] * 2], ("target", 4)),
        ("multi_candidate", [("draft", CATCH_UP), ("draft", 4), ("draft", 8)], ("target", 29)),
    ],
)
def test_passes_of_a_step(method: str, draft: list[Any], last: tuple[str, int]) -> None:
    assert draft_passes(config(method)) == draft
    assert last_pass(config(method)) == last
    assert {*draft, last} <= needed_passes([config(method)])


def test_speed_up_by_hand() -> None:
    values = speed_up(config("mmtad"), COSTS, 3.0, step=0.026, plain_step=0.011)
    assert values.draft == pytest.approx(0.8)
    assert values.verify == pytest.approx(1.5)
    assert values.host == pytest.approx(0.3)
    assert values.actual == pytest.approx(3.0 * 0.011 / 0.026)
    assert values.bound == pytest.approx(3 / 2.3)
    assert values.free == pytest.approx(3 / 1.8)
    assert values.host_share == pytest.approx(0.3 / 2.6)
    assert speed_up(config("target"), COSTS, 1.0, 0.011, 0.011).actual == pytest.approx(1)


def test_measured_table_holds_every_pass_and_leaves_the_caches_empty() -> None:
    pair = llama_pair()
    wanted = [("target", 1), ("target", 5), ("draft", CATCH_UP)]
    costs = measure_costs(pair, wanted, batch=2, context=30, rounds=2)
    assert set(costs.seconds) == set(wanted)
    assert costs.ratio([("target", 1)]) == 1
    assert costs.copy_bandwidth > 0
    assert {"v_1", "v_5", "c_2", "unit_ms"} <= set(costs.as_json())
    assert not any(pair.target.cache.lengths)
