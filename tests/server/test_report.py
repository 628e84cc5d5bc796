"""What a response says of its energy: a number where it was seen, null where it was not, never 0."""

from typing import Any

import msgspec
import pytest

from decoding import DecodingConfig
from server.admission import Job
from server.messages import EnergyUsage
from server.report import Report
from server.schemas import CompletionRequest
from tests.server.test_metrics import stats


def energy(*microjoules: tuple[int, int] | None, limited: bool = False) -> Any:
    """Of a request whose prompts used so much for prefill and decode; None is not seen."""
    request = CompletionRequest(model="tiny", prompt="x")
    report = Report(Job("a", request, "tiny", DecodingConfig(), 1, [], [], 0.0))
    for used in microjoules:
        prefill, decode = used or (None, None)
        usage = EnergyUsage(
            source="rapl",
            devices=["cpu:0"],
            prefill_microjoules=prefill,
            decode_microjoules=decode,
            resolution_limited=limited or used is None,
        )
        report.stats.append(msgspec.structs.replace(stats(), energy=usage))
    return report.metrics()["energy"]


def test_joules_are_summed_over_prompts() -> None:
    found = energy((1_000_000, 3_000_000), (500_000, 3_500_000))
    assert (found["joules"], found["prefill_joules"], found["joules_per_output_token"]) == (8.0, 1.5, 0.2)
    assert not found["resolution_limited"]


def test_a_coarse_counter_gives_two_digits() -> None:
    assert energy((123_456, 0), limited=True)["joules"] == pytest.approx(0.12)


@pytest.mark.parametrize("seen", [[None], [None, (1, 2)]])
def test_what_no_reading_fell_into_is_null(seen: list[tuple[int, int] | None]) -> None:
    found = energy(*seen)
    assert [found[name] for name in ("joules", "joules_per_output_token", "prefill_joules")] == [None] * 3
    assert found["resolution_limited"]
