"""Attribution: every microjoule goes to a request or to idle time, and a lost sensor leaves a gap."""

import random
from collections import Counter

import pytest

from server.energy import DECODE, PREFILL, SAMPLE_SECONDS, EnergyMeter
from server.energy_source import EnergySourceError, Reading

DEVICES = ("cpu:0", "dram:0")


class Source:
    """Counters that a test sets; `lost` makes them unreadable."""

    name = "scripted"
    devices = DEVICES

    def __init__(self, refresh_seconds: float = 0.1) -> None:
        self.refresh_seconds = refresh_seconds
        self.totals = dict.fromkeys(DEVICES, 0)
        self.lost = False

    def read(self) -> Reading:
        if self.lost:
            raise EnergySourceError("gone")
        return dict(self.totals)


class Bench:
    """A meter with its clock and counters."""

    def __init__(self, refresh_seconds: float = 0.1) -> None:
        self.source, self.now = Source(refresh_seconds), 0.0
        self.meter = EnergyMeter(self.source, lambda: self.now)

    def spend(self, seconds: float, microjoules: int) -> None:
        self.now += seconds
        for device in DEVICES:
            self.source.totals[device] += microjoules


def test_an_interval_is_split_by_forward_time() -> None:
    bench = Bench()
    bench.meter.open("a", "mmtad")
    bench.meter.open("b", "target")
    bench.meter.note(PREFILL, 0.2, ["a"])
    bench.meter.note(DECODE, 0.4, ["a", "b", "b", "b"])
    bench.spend(1.0, 1000)
    assert bench.meter.sample_if_due()
    event = bench.meter.take()
    assert event.raw == {"cpu:0": 1000, "dram:0": 1000}
    assert event.idle == {"cpu:0": 400, "dram:0": 400}
    assert {(method, phase): used for method, phase, used in event.attributed} == {
        ("mmtad", PREFILL): 400,
        ("mmtad", DECODE): 200,
        ("target", DECODE): 600,
    }
    usage = bench.meter.close("a")
    assert usage is not None
    assert (usage.prefill_microjoules, usage.decode_microjoules) == (400, 200)
    assert (usage.source, usage.devices) == ("scripted", list(DEVICES))
    assert bench.meter.take().raw == {}


def test_attributed_and_idle_are_raw_over_ten_thousand_random_intervals() -> None:
    rng = random.Random(7)
    bench = Bench()
    running: list[str] = []
    raw: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    attributed = used_by_requests = 0
    for number in range(10_000):
        if rng.random() < 0.3 or not running:
            running.append(str(number))
            bench.meter.open(running[-1], rng.choice(["target", "mtad", "mmtad"]))
        for _ in range(rng.randrange(4)):
            ids = rng.sample(running, rng.randint(1, min(4, len(running))))
            bench.meter.note(rng.choice([PREFILL, DECODE]), rng.random() * 0.2, ids)
        bench.spend(rng.random() * 0.3, rng.randrange(10**6))
        bench.meter.sample()
        if rng.random() < 0.3:
            usage = bench.meter.close(running.pop(rng.randrange(len(running))))
            assert usage is not None
            used_by_requests += usage.prefill_microjoules + usage.decode_microjoules
        event = bench.meter.take()
        raw.update(event.raw)
        idle.update(event.idle)
        attributed += sum(used for _, _, used in event.attributed)
        assert min(event.idle.values()) >= 0
        assert raw.total() == attributed + idle.total()
    assert dict(raw) == bench.source.totals
    left = [bench.meter.close(each) for each in running]
    used_by_requests += sum(u.prefill_microjoules + u.decode_microjoules for u in left if u is not None)
    assert used_by_requests == attributed > 0


def test_a_lost_sensor_leaves_a_gap_and_nothing_is_made_up() -> None:
    bench = Bench()
    bench.meter.open("through", "mmtad")
    bench.spend(1, 100)
    bench.meter.sample()
    bench.source.lost = True
    bench.meter.note(DECODE, 1, ["through"])
    bench.spend(1, 5000)
    bench.meter.sample()
    event = bench.meter.take()
    assert not event.available
    assert event.raw == {"cpu:0": 100, "dram:0": 100}
    bench.source.lost = False
    bench.spend(1, 7000)
    bench.meter.sample()
    bench.meter.open("after", "mmtad")
    bench.meter.note(DECODE, 1, ["through", "after"])
    bench.spend(1, 60)
    bench.meter.sample()
    event = bench.meter.take()
    assert event.available
    assert event.raw == {"cpu:0": 60, "dram:0": 60}
    assert bench.meter.close("through") is None
    usage = bench.meter.close("after")
    assert usage is not None
    assert usage.decode_microjoules == 60


def test_a_request_within_a_gap_has_no_joules() -> None:
    """Also one that is over before the next reading is due."""
    bench = Bench()
    bench.source.lost = True
    bench.spend(1, 100)
    bench.meter.sample()
    bench.meter.open("short", "mmtad")
    bench.meter.note(DECODE, 0.01, ["short"])
    assert bench.meter.close("short") is None


@pytest.mark.parametrize(
    ("refresh", "seconds", "limited"), [(0.1, 0.5, True), (0.1, 2, False), (0.001, 0.5, False)]
)
def test_short_requests_say_that_the_counter_is_coarse(refresh: float, seconds: float, limited: bool) -> None:
    bench = Bench(refresh)
    bench.meter.open("a", "target")
    bench.meter.note(DECODE, seconds, ["a"])
    bench.spend(seconds, 1000)
    bench.meter.sample()
    usage = bench.meter.close("a")
    assert usage is not None
    assert usage.resolution_limited is limited


@pytest.mark.parametrize(("refresh", "used"), [(0.001, 2000), (0.1, None)])
def test_without_a_reading_joules_are_not_known(refresh: float, used: int | None) -> None:
    """A counter finer than the timer is read at the end of a request, a coarse one is not."""
    bench = Bench(refresh)
    bench.meter.open("a", "target")
    bench.meter.note(DECODE, 0.05, ["a"])
    bench.spend(0.05, 1000)
    usage = bench.meter.close("a")
    assert usage is not None
    assert usage.decode_microjoules == used
    assert usage.resolution_limited is (used is None)


def test_a_reading_that_has_not_moved_tells_nothing() -> None:
    """The timer may fall between two refreshes of the counter."""
    bench = Bench(0.1)
    bench.meter.open("a", "target")
    bench.meter.note(DECODE, SAMPLE_SECONDS, ["a"])
    bench.spend(SAMPLE_SECONDS, 0)
    assert bench.meter.sample_if_due()
    usage = bench.meter.close("a")
    assert usage is not None
    assert (usage.prefill_microjoules, usage.decode_microjoules) == (None, None)
    assert usage.resolution_limited


def test_what_ended_counts_by_method_and_unknown_ids_do_not() -> None:
    bench = Bench()
    bench.meter.open("a", "mtad")
    bench.meter.note(DECODE, 0.5, ["a", "never seen"])
    assert bench.meter.close("a") is not None
    assert bench.meter.close("a") is None
    assert not bench.meter.sample_if_due()
    bench.spend(1, 100)
    bench.meter.sample()
    event = bench.meter.take()
    assert event.attributed == [("mtad", DECODE, 100)]
    assert event.idle == {"cpu:0": 50, "dram:0": 50}
