"""What a step of a group is said to have cost, on a device that works behind the host."""

from typing import Any

import pytest

from decoding import Engine, group_step
from tests.decoding.late_device import LateDevice
from tests.decoding.test_adaptive_engine import Scripted, adaptive
from tests.decoding.tiny import drain, llama_pair

GAP_SECONDS, METHOD_SECONDS = 100.0, 1.0


class Noting(Scripted):
    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def note(self, *args: Any) -> None:
        super().note(*args)
        self.seconds.append(args[-1])


def test_what_was_queued_before_is_no_cost_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    device, policy = LateDevice(), Noting()
    close_gaps, to_host, num_gaps = group_step.close_gaps, group_step.to_host, 0

    def closing(draft: Any, rows: slice, sequences: Any) -> None:
        nonlocal num_gaps
        num_gaps += any(sequence.draft_lag for sequence in sequences)
        device.queued += GAP_SECONDS
        close_gaps(draft, rows, sequences)

    def reading(values: Any) -> Any:
        device.queued += METHOD_SECONDS
        device.finish()
        return to_host(values)

    monkeypatch.setattr(group_step, "cost_clock", lambda *_: device.clock)
    monkeypatch.setattr(group_step, "finish_queued", device.finish)
    monkeypatch.setattr(group_step, "close_gaps", closing)
    monkeypatch.setattr(group_step, "to_host", reading)
    engine = Engine(llama_pair(), 2, policy=policy)
    engine.add(adaptive("a", [1, 3], "mmtad", max_tokens=20, ignore_eos=True))
    drain(engine)
    assert num_gaps > 1
    assert policy.seconds == [METHOD_SECONDS] * len(policy.taken)


def test_steps_that_do_not_adapt_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(group_step, "finish_queued", waited.append)
    engine = Engine(llama_pair(), 2)
    engine.add(adaptive("a", [1, 3], "mmtad", max_tokens=5))
    drain(engine)
    assert not waited
