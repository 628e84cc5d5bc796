"""Which worker gets a command, who is stuck, and when deaths are a storm."""

from decoding import DecodingConfig, SamplingParams
from server.messages import Command, GenerateCommand, ReadyEvent, StepStatsEvent
from server.pending import Pending, Stream
from server.placement import STORM_DEATHS, STORM_SECONDS, Placement, WorkerState
from server.reservations import Reservation
from tests.server.fakes import ready_event


class Transport:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[Command] = []

    def start(self) -> None: ...
    def send(self, command: Command) -> None:
        self.sent.append(command)

    async def stop(self) -> None: ...
    def replace(self) -> None: ...
    def kill(self) -> None: ...


def worker(name: str, ready: ReadyEvent | None) -> WorkerState:
    return WorkerState(name, Transport(), ready=ready)


def pending(name: str, n: int = 1) -> Pending:
    command = GenerateCommand(id=name, prompt_ids=[1], params=SamplingParams(), config=DecodingConfig(), n=n)
    return Pending(command, Stream(Reservation(n, n), {name}), "tiny", 0.0)


def placement(*, ready: bool = True) -> Placement:
    placed = Placement()
    placed.workers += [worker(name, ready_event("") if ready else None) for name in ("0", "1")]
    return placed


def stats(num_running: int) -> StepStatsEvent:
    return StepStatsEvent(
        method=None,
        num_sequences=0,
        num_tree_nodes=0,
        prefill_tokens=0,
        prefill_seconds=0.0,
        decode_seconds=0.0,
        num_running=num_running,
        num_waiting=0,
        cache_usage={},
    )


def held(placed: Placement) -> list[list[str]]:
    return [list(each.commands) for each in placed.workers]


def test_the_worker_with_the_most_free_rows_gets_it() -> None:
    placed = placement()
    for each in (pending("a", 3), pending("b"), pending("c"), pending("d"), pending("e")):
        placed.place(each, 0.0)
    assert held(placed) == [["a", "e"], ["b", "c", "d"]]


def test_what_a_death_left_goes_in_front_of_what_waits() -> None:
    placed = placement()
    placed.workers[1].ready = None
    first, second, third = pending("a"), pending("b"), pending("c")
    placed.place(first, 0.0)
    placed.place(second, 0.0)
    victims = placed.workers[0].lose(0.0)
    assert [each.worker for each in victims] == [None, None]
    placed.place(third, 0.0)
    placed.place_again(victims, 0.0)
    placed.workers[1].ready = ready_event("")
    placed.dispatch(0.0)
    assert held(placed) == [[], ["a", "b", "c"]]


def test_what_waits_can_be_given_up() -> None:
    placed = placement(ready=False)
    leaving, staying = pending("a"), pending("b")
    placed.place(leaving, 0.0)
    placed.place(staying, 0.0)
    placed.forget(leaving)
    placed.workers[0].ready = ready_event("")
    placed.dispatch(0.0)
    assert held(placed) == [["b"], []]


def test_a_worker_is_stuck_when_it_has_work_and_says_nothing() -> None:
    placed = placement()
    busy = placed.workers[0]
    each = pending("a")
    placed.place(each, 100.0)
    assert list(placed.stuck(129.0, 30.0, 900.0)) == []
    assert list(placed.stuck(131.0, 30.0, 900.0)) == [busy]
    busy.note_step(stats(1), 130.0)
    assert list(placed.stuck(159.0, 30.0, 900.0)) == []
    assert list(placed.stuck(161.0, 30.0, 900.0)) == [busy]


def test_a_worker_is_stuck_when_it_loads_for_ever() -> None:
    """Each stage of loading, and each new start after a death, has all the time again."""
    placed = placement(ready=False)
    loading, other = placed.workers
    loading.note_loading(100.0)
    other.ready = ready_event("")
    assert list(placed.stuck(999.0, 30.0, 900.0)) == []
    assert list(placed.stuck(1001.0, 30.0, 900.0)) == [loading]
    loading.lose(1001.0)
    assert list(placed.stuck(1900.0, 30.0, 900.0)) == []
    assert list(placed.stuck(1902.0, 30.0, 900.0)) == [loading]


def test_a_worker_that_waits_for_the_end_of_a_text_is_not_stuck() -> None:
    placed = placement()
    each = pending("a")
    placed.place(each, 0.0)
    each.begun = True
    placed.workers[0].note_step(stats(0), 1.0)
    assert list(placed.stuck(1000.0, 30.0, 900.0)) == []


def test_five_deaths_in_a_minute_are_a_storm() -> None:
    placed = Placement()
    assert [placed.note_death(float(now)) for now in range(STORM_DEATHS)] == [False] * 4 + [True]
    slow = Placement()
    step = STORM_SECONDS / (STORM_DEATHS - 1) + 1
    assert not any(slow.note_death(number * step) for number in range(12))


def test_a_machine_whose_workers_die_together_is_no_storm() -> None:
    placed = Placement()
    placed.workers = [WorkerState(str(number), Transport()) for number in range(8)]
    together = [placed.note_death(now) for now in (0.0, 1.0) for _ in range(8)]
    assert together == [False] * 16
    assert placed.note_death(2.0)
