"""Seconds of passes: whose they are, and that a GPU is asked only when a step is over."""

import time
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

from decoding import DecodingConfig, Engine, SamplingParams, Sequence
from decoding.config import METHODS
from decoding.timing import PassTimer, StepTimer, finish_queued, timed
from tests.decoding.tiny import llama_pair


def sequence(name: str, method: str, prompt: list[int], max_tokens: int = 8) -> Sequence:
    config = DecodingConfig(method=method, num_speculative_tokens=3, beam_width=2)  # type: ignore[arg-type]
    return Sequence(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0), config)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_says_which_model_ran_for_whom(method: str) -> None:
    engine = Engine(llama_pair(), max_num_seqs=4, prefill_chunk=4)
    for name in "ab":
        # Long enough that neither ends before the other's prompt, whose chunks wait by the clock, is there.
        engine.add(sequence(name, method, [ord(name) - ord("a"), 2, 3, 4, 5, 6, 7], max_tokens=40))
    target, draft = method != "draft", method not in ("target", "mtjd")
    roles = {role for role, runs in (("target", target), ("draft", draft)) if runs}
    seen = []
    while engine.has_work():
        started = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started
        times = engine.last_step.forward_times
        assert sum(each.seconds for each in times) <= seconds
        assert all(each.seconds > 0 and each.num_passes > 0 and each.method == method for each in times)
        seen += times
    for phase in ("prefill", "decode"):
        assert {each.role for each in seen if each.phase == phase} == roles
    # 6 tokens are cached of each prompt, in chunks of 4: two passes of every model.
    for name in "ab":
        mine = [each for each in seen if each.phase == "prefill" and each.sequence_ids == (name,)]
        passes = {role: sum(each.num_passes for each in mine if each.role == role) for role in roles}
        assert passes == dict.fromkeys(roles, 2)
    assert ("a", "b") in {tuple(sorted(each.sequence_ids)) for each in seen if each.phase == "decode"}


def test_passes_per_step_of_the_tree_methods() -> None:
    engine = Engine(llama_pair(), max_num_seqs=2)
    engine.add(sequence("a", "mmtad", [1, 2, 3]))
    engine.step()
    decode = {each.role: each.num_passes for each in engine.last_step.forward_times if each.phase == "decode"}
    assert decode == {"target": 1, "draft": 3}, "one verification, a draft pass per depth"
    assert engine.last_step.preset == "mmtad-3x2"


def test_prompts_that_the_cache_held() -> None:
    engine = Engine(llama_pair(), max_num_seqs=4)
    for name in "abc":
        engine.add(sequence(name, "target", [1, 2, 3, 4]))
    engine.step()
    assert (engine.last_step.prefill_tokens, engine.last_step.cached_prompt_tokens) == (3, 6)
    engine.step()
    assert (engine.last_step.prefill_tokens, engine.last_step.cached_prompt_tokens) == (0, 0)


def test_a_step_charges_nothing_of_the_one_before() -> None:
    timer = PassTimer(torch.device("cpu"))
    step = StepTimer({"target": timer})
    with timer.passing():
        pass
    step.begin()
    assert step.end() == ()
    with timer.passing():
        pass
    step.charge("decode", "target", ("a",))
    step.begin()
    assert step.end() == ()


class FakeEvent:
    """A mark on a stream whose kernels are done only when somebody waits for them."""

    recorded: ClassVar[list["FakeEvent"]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.done = False

    def record(self) -> None:
        self.recorded.append(self)

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.done
        return 5.0 * (self.recorded.index(end) - self.recorded.index(self))


@pytest.fixture
def _fake_events(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    yield
    FakeEvent.recorded.clear()


@pytest.mark.usefixtures("_fake_events")
def test_a_gpu_is_not_waited_for_before_the_end_of_a_step() -> None:
    timer = PassTimer(torch.device("cuda"))
    step = StepTimer({"draft": timer})
    step.begin()
    for _ in range(2):
        with timer.passing():
            pass
    step.charge("decode", "mtad", ("a", "b"))
    assert not any(event.done for event in FakeEvent.recorded)
    (time_,) = step.end()
    assert (time_.role, time_.num_passes, time_.sequence_ids) == ("draft", 2, ("a", "b"))
    assert time_.seconds == pytest.approx(0.010)


def test_timed() -> None:
    result, seconds = timed(sorted, [2, 1])
    assert result == [1, 2]
    assert 0 <= seconds < 1


def test_only_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "cuda:1"):
        finish_queued(torch.device(name))
    assert waited == [torch.device("cuda:1")]
