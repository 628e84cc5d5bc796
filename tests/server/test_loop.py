"""The worker's loop over a real socket: every command is answered, output merges, counts are right."""

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from decoding import DecodingConfig, FinishReason, Retreat, SamplingParams, SequenceOutput
from server.ledger import Choice
from server.link import MAX_PENDING_STEP_STATS, Outbox, receive_command
from server.loop import WorkerLoop
from server.messages import (
    HEADER_BYTES,
    BadFrameError,
    CancelCommand,
    Command,
    Event,
    FailedEvent,
    FinishCommand,
    FinishedEvent,
    FrameDecoder,
    GenerateCommand,
    SpeculationStep,
    StepEvent,
    StepStatsEvent,
    StopCommand,
    TokenScore,
    encode_frame,
    frame_length,
)
from tests.server.fakes import TIMEOUT, DeviceLostError, ScriptedEngine, constant, ids_of

replies: FrameDecoder[Event] = FrameDecoder(Event)


class Link:
    """The API process's end, blocking: sends commands, reads events."""

    def __init__(self, end: socket.socket, inbox: "queue.SimpleQueue[Command]") -> None:
        self.end = end
        self.inbox = inbox
        end.settimeout(TIMEOUT)

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.inbox.put(command)

    def receive(self) -> Event:
        return replies.decode(self._exactly(frame_length(self._exactly(HEADER_BYTES))))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self.end.recv(count - len(data))
            assert chunk, "end of file"
            data += chunk
        return data

    def until(self, stop: Callable[[Event], bool]) -> list[Event]:
        events = [self.receive()]
        while not stop(events[-1]):
            events.append(self.receive())
        return events

    def answer(self) -> tuple[list[StepEvent], FinishedEvent | FailedEvent]:
        """The events of the next command that ends."""
        events = self.until(lambda event: isinstance(event, FinishedEvent | FailedEvent))
        end = events[-1]
        assert isinstance(end, FinishedEvent | FailedEvent)
        return [event for event in events if isinstance(event, StepEvent) and event.id == end.id], end


@contextmanager
def running(engine: ScriptedEngine) -> Iterator[Link]:
    ours, theirs = socket.socketpair()
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    thread = threading.Thread(target=WorkerLoop(engine, inbox, Outbox(theirs)).run, daemon=True)
    thread.start()
    with ours, theirs:
        yield Link(ours, inbox)
        engine.gate.set()
        inbox.put(StopCommand())
        thread.join(TIMEOUT)
        assert not thread.is_alive()


def generate(name: str = "a", max_tokens: int = 16, **fields: Any) -> GenerateCommand:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    values = {"prompt_ids": [1, 2], "params": params, "config": DecodingConfig(), **fields}
    return GenerateCommand(id=name, **values)


def test_a_command_is_answered_with_tokens_and_an_end() -> None:
    with running(ScriptedEngine()) as link:
        link.send(generate(max_tokens=7, n=2, choice_offset=4))
        steps, end = link.answer()
        assert isinstance(end, FinishedEvent)
        for choice in (4, 5):
            tokens = [token for step in steps if step.choice == choice for token in step.token_ids]
            assert tokens == ids_of("abcdefg")
        assert end.finish_reasons == [FinishReason.LENGTH] * 2
        assert (end.stats.prompt_tokens, end.stats.completion_tokens, end.stats.num_steps) == (2, 14, 6)
        assert end.stats.log_prob_sum == pytest.approx(-7.0)
        steps_of_one = [SpeculationStep(4, accepted, 4, "mmtad-4x4") for accepted in (2, 2, 0)]
        assert end.stats.speculation == steps_of_one * 2
        assert end.stats.queue_seconds >= 0


def test_a_bad_command_fails_alone_and_leaves_nothing() -> None:
    engine = ScriptedEngine()
    with running(engine) as link:
        link.send(generate(max_tokens=1000, n=2), generate("b", max_tokens=3))
        assert isinstance(failed := link.answer()[1], FailedEvent)
        assert failed.code == "invalid_value"
        assert isinstance(link.answer()[1], FinishedEvent)
        assert not engine.has_work()


def test_a_broken_step_fails_its_rows_and_the_loop_goes_on() -> None:
    engine = ScriptedEngine()
    engine.failures.append(RuntimeError("broken"))
    with running(engine) as link:
        engine.gate.clear()
        link.send(generate("a"), generate("b"))
        engine.gate.set()
        ends = [link.answer()[1] for _ in "ab"]
        assert any(isinstance(end, FailedEvent) and end.code == "worker_failed" for end in ends)
        link.send(generate("c"))
        assert isinstance(link.answer()[1], FinishedEvent)


def test_a_lost_device_ends_the_worker() -> None:
    """It would only give errors from now on: whoever watches it starts another."""
    engine = ScriptedEngine()
    engine.failures.append(DeviceLostError())
    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    inbox.put(generate())
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(DeviceLostError):
        WorkerLoop(engine, inbox, Outbox(theirs)).run()


class DraftBreaks(ScriptedEngine):
    """Steps with `draft` rows raise; the other rows can go on."""

    def retreat(self, error: Exception) -> Retreat | None:
        lost = [each.id for each in self._running if each.config.method == "draft"]
        for sequence_id in lost:
            self.cancel(sequence_id)
        return Retreat("draft_failed", lost)


def test_a_broken_draft_ends_only_what_needs_it() -> None:
    engine = DraftBreaks(tokens_per_step=1, hold_after=1)
    with running(engine) as link:
        link.send(generate("a"), generate("b", config=DecodingConfig(method="draft")))
        link.until(lambda event: isinstance(event, StepStatsEvent) and event.num_running == 2)
        engine.failures.append(RuntimeError("broken"))
        engine.gate.set()
        ends = {end.id: end for end in (link.answer()[1], link.answer()[1])}
        assert isinstance(failed := ends["b"], FailedEvent)
        assert failed.code == "worker_failed"
        assert isinstance(ends["a"], FinishedEvent)
        assert ends["a"].finish_reasons == [FinishReason.STOP]


class OneRowBreaks(ScriptedEngine):
    """The row of one sequence gives values that are not numbers, in its first step."""

    def step(self) -> list[SequenceOutput]:
        outputs = super().step()
        for index, output in enumerate(outputs):
            if output.id == "a/0":
                self.cancel(output.id)
                outputs[index] = SequenceOutput(output.id, [], [], finish_reason=FinishReason.ERROR)
        return outputs


def test_a_row_that_is_not_finite_fails_its_command_alone() -> None:
    """Guards against a 200 whose choice ended as `error`, and against rows left behind."""
    engine = OneRowBreaks()
    with running(engine) as link:
        engine.gate.clear()
        link.send(generate("a", n=2), generate("b"))
        engine.gate.set()
        ends = {end.id: end for end in (link.answer()[1] for _ in "ab")}
        assert isinstance(failed := ends["a"], FailedEvent)
        assert failed.code == "numerical_error"
        assert isinstance(ends["b"], FinishedEvent)
        assert not engine.has_work()


def test_cancel_frees_the_rows_and_counts_what_was_delivered() -> None:
    engine = ScriptedEngine(hold_after=1)
    with running(engine) as link:
        link.send(generate(n=2))
        link.until(lambda event: isinstance(event, StepStatsEvent) and event.num_running == 2)
        link.send(CancelCommand(id="a"), CancelCommand(id="unknown"))
        engine.gate.set()
        _, end = link.answer()
        assert isinstance(end, FinishedEvent)
        assert end.finish_reasons == [FinishReason.ABORT] * 2
        assert end.stats.completion_tokens in (6, 12)  # one step each, or the one under way as well
        assert not engine.has_work()
        link.until(lambda event: isinstance(event, StepStatsEvent) and event.num_running == 0)


@pytest.mark.parametrize(
    ("num_tokens", "num_steps", "reason"),
    [
        (0, 0, FinishReason.STOP),
        (1, 1, FinishReason.STOP),
        (3, 1, FinishReason.STOP),
        (4, 2, FinishReason.STOP),
        (6, 2, FinishReason.STOP),
        (8, 3, FinishReason.LENGTH),
        (99, 3, FinishReason.LENGTH),
    ],
)
def test_finish_counts_up_to_its_token(num_tokens: int, num_steps: int, reason: FinishReason) -> None:
    """The choice has run to its end before the caller knows where its text ended."""
    engine = ScriptedEngine()
    with running(engine) as link:
        link.send(generate(max_tokens=8, confirm_end=True))
        link.until(lambda event: isinstance(event, StepEvent) and event.finish_reason is not None)
        link.send(FinishCommand(id="a", choice=0, num_tokens=num_tokens))
        _, end = link.answer()
        assert isinstance(end, FinishedEvent)
        assert end.finish_reasons == [reason]
        assert end.stats.completion_tokens == min(num_tokens, 8)
        assert end.stats.log_prob_sum == -0.5 * min(num_tokens, 8)
        assert end.stats.num_steps == len(end.stats.speculation) == num_steps


def test_finish_ends_a_running_choice_and_no_other() -> None:
    engine = ScriptedEngine(tokens_per_step=1, hold_after=1)
    with running(engine) as link:
        link.send(generate(n=2, max_tokens=6, confirm_end=True))
        link.until(lambda event: isinstance(event, StepEvent))
        link.send(FinishCommand(id="a", choice=0, num_tokens=1))
        link.send(
            FinishCommand(id="a", choice=7, num_tokens=1), FinishCommand(id="x", choice=0, num_tokens=1)
        )
        engine.gate.set()
        link.until(
            lambda event: isinstance(event, StepEvent) and event.choice == 1 and bool(event.finish_reason)
        )
        link.send(FinishCommand(id="a", choice=1, num_tokens=6))
        _, end = link.answer()
        assert isinstance(end, FinishedEvent)
        assert end.finish_reasons == [FinishReason.STOP, FinishReason.LENGTH]
        assert end.stats.completion_tokens == 7
        assert "a/0" in engine.cancelled


def test_sequences_wait_for_rows_in_order() -> None:
    with running(ScriptedEngine(max_num_seqs=1)) as link:
        link.send(generate("a"), generate("b"))
        first, second = link.answer()[1], link.answer()[1]
        assert isinstance(first, FinishedEvent)
        assert isinstance(second, FinishedEvent)
        assert (first.id, second.id) == ("a", "b")
        assert second.stats.queue_seconds > first.stats.queue_seconds


def test_output_merges_while_nobody_reads() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        outbox = Outbox(theirs)
        for number in range(20_000):
            reason = FinishReason.LENGTH if number == 19_999 else None
            outbox.put(StepEvent(id="a", choice=0, token_ids=[number], log_probs=[0.0], finish_reason=reason))
            outbox.put(stats(number))
            outbox.flush(wait=False)
        sender = threading.Thread(target=outbox.flush, kwargs={"wait": True})
        sender.start()
        link = Link(ours, queue.SimpleQueue())
        events = link.until(lambda event: isinstance(event, StepStatsEvent) and event.num_sequences == 19_999)
        sender.join(TIMEOUT)
        steps = [event for event in events if isinstance(event, StepEvent)]
        assert [token for step in steps for token in step.token_ids] == list(range(20_000))
        assert steps[-1].finish_reason is FinishReason.LENGTH
        assert len(steps) < 10_000
        assert len(events) - len(steps) < 10_000 + MAX_PENDING_STEP_STATS


def test_merged_output_keeps_its_log_probs() -> None:
    ours, theirs = socket.socketpair()
    score = TokenScore(-1.0, [(3, -0.5)])
    with ours, theirs:
        outbox = Outbox(theirs)
        first: dict[str, Any] = {"id": "a", "choice": 0, "token_ids": [1], "log_probs": [-0.5]}
        first["draft_positions"] = [0]
        later: dict[str, Any] = {"id": "a", "choice": 0, "token_ids": [2, 6], "log_probs": [-1.5, -0.2]}
        tops = [[(4, -0.1)], [(6, -0.2)]]
        outbox.put(StepEvent(**first, top_log_probs=[[(1, -0.5)]], prompt_log_probs=[score]))
        outbox.put(StepEvent(**later, draft_positions=[0], top_log_probs=tops))
        outbox.flush(wait=True)
        (event,) = Link(ours, queue.SimpleQueue()).until(lambda event: isinstance(event, StepEvent))
    assert event == StepEvent(
        id="a",
        choice=0,
        token_ids=[1, 2, 6],
        log_probs=[-0.5, -1.5, -0.2],
        draft_positions=[0, 1],
        top_log_probs=[[(1, -0.5)], [(4, -0.1)], [(6, -0.2)]],
        prompt_log_probs=[score],
    )


def stats(number: int) -> StepStatsEvent:
    return StepStatsEvent(
        method="mtad",
        num_sequences=number,
        num_tree_nodes=0,
        prefill_tokens=0,
        prefill_seconds=0.0,
        decode_seconds=0.0,
        num_running=0,
        num_waiting=0,
        cache_usage={},
    )


def test_tokens_go_before_the_end_of_their_command() -> None:
    with running(ScriptedEngine(script=constant("a"), tokens_per_step=16)) as link:
        for number in range(50):
            link.send(generate(str(number)))
        ended: set[str] = set()
        while len(ended) < 50:
            event = link.receive()
            if isinstance(event, FinishedEvent):
                ended.add(event.id)
            assert not (isinstance(event, StepEvent) and event.id in ended)


def test_commands_are_read_whole_or_not_at_all() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frame = encode_frame(CancelCommand(id="a"))
        ours.sendall(frame[:3])
        threading.Timer(0.01, ours.sendall, [frame[3:] + frame[:5]]).start()
        assert receive_command(theirs) == CancelCommand(id="a")
        ours.shutdown(socket.SHUT_WR)
        assert receive_command(theirs) is None


@pytest.mark.parametrize(
    "data", [b"\xff" * 8, encode_frame(StepEvent(id="a", choice=0, token_ids=[], log_probs=[]))]
)
def test_bad_commands_raise(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        with pytest.raises(BadFrameError):
            receive_command(theirs)


def test_choice_without_tokens_has_no_step() -> None:
    choice = Choice("a/0", 0)
    choice.record(SequenceOutput("a/0", [], [], finish_reason=FinishReason.LENGTH))
    choice.end(FinishReason.LENGTH)
    assert (choice.step_sizes, choice.speculation) == ([], [])
