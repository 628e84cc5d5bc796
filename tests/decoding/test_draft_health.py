"""When a draft that fails is turned off."""

from decoding.config import DecodingConfig
from decoding.draft_health import FAILURE_SECONDS, DraftHealth, without_draft
from decoding.sequence import SamplingParams, Sequence


def test_three_failures_in_a_minute_turn_it_off_for_good() -> None:
    health = DraftHealth()
    for now in (0.0, 10.0):
        health.note_failure(now)
        assert health.enabled
    health.note_failure(20.0)
    assert not health.enabled
    health.note_failure(1000.0)
    assert not health.enabled


def test_rare_failures_do_not() -> None:
    health = DraftHealth()
    for number in range(6):
        health.note_failure(number * (FAILURE_SECONDS / 2 + 1))
    assert health.enabled


def test_only_what_the_target_can_continue_is_continued() -> None:
    def sequence(method: str) -> Sequence:
        config = DecodingConfig(method=method)  # type: ignore[arg-type]
        return Sequence("a", [1], SamplingParams(), config)

    proposed, own = sequence("mmtad"), sequence("draft")
    assert without_draft(proposed)
    assert proposed.config.method == "target"
    assert not without_draft(own)
    assert own.config.method == "draft"
