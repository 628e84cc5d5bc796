"""Where joules come from: cumulative counters of devices, read by the worker that uses them.

A source is chosen by `--energy-source`: `auto` (a GPU's own counter through NVML or AMD SMI, a CPU's
through the kernel's powercap folder), `none`, or `replay:FILE`, a recording. Where nothing measures there
is no source, and no figure is made up.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import structlog

REPLAY_PREFIX = "replay:"
# Docker hides the host's folder from containers; mounted read-only at the second path it can be read.
POWERCAP_FOLDERS = (Path("/sys/class/powercap"), Path("/host/powercap"))

Reading = dict[str, int]  # microjoules since some start, by device

log = structlog.get_logger("server.energy")


class EnergySourceError(Exception):
    """A source cannot be used; the message is one line that says why."""


class EnergySource(Protocol):
    """Cumulative energy counters of one or more devices.

    `refresh_seconds` is how often the counters change. `read` raises EnergySourceError when a counter
    cannot be read; it may work again later.
    """

    name: str
    devices: tuple[str, ...]
    refresh_seconds: float

    def read(self) -> Reading: ...


class Sample(msgspec.Struct, frozen=True):
    """One line of a recording: counters at `seconds`, null where they could not be read."""

    seconds: float
    microjoules: dict[str, int] | None


class ReplaySource:
    """A recording of counters, played back in real time; at its end it starts again, its totals go on."""

    refresh_seconds = 0.1

    def __init__(self, samples: list[Sample], clock: Callable[[], float] = time.monotonic) -> None:
        self.name = "replay"
        self._samples, self._clock, self._started = samples, clock, clock()
        known = [sample.microjoules for sample in samples if sample.microjoules is not None]
        self.devices = tuple(sorted(known[0]))
        self._lap_seconds = samples[-1].seconds - samples[0].seconds
        self._lap_energy = {device: known[-1][device] - known[0][device] for device in self.devices}

    @classmethod
    def from_file(cls, path: Path) -> "ReplaySource":
        """Raises EnergySourceError."""
        try:
            lines = path.read_bytes().splitlines()
            decoder = msgspec.json.Decoder(Sample)
            samples = [decoder.decode(line) for line in lines if line.strip()]
        except OSError as error:
            raise EnergySourceError(f"{path} cannot be read: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise EnergySourceError(f"{path} is no recording: {error}") from error
        _check_recording(samples, path)
        return cls(samples)

    def read(self) -> Reading:
        laps, offset = divmod(self._clock() - self._started, self._lap_seconds)
        now = self._samples[0].seconds + offset
        sample = next(each for each in reversed(self._samples) if each.seconds <= now)
        if sample.microjoules is None:
            raise EnergySourceError("the recording holds no reading here")
        return {
            device: sample.microjoules[device] + int(laps) * self._lap_energy[device]
            for device in self.devices
        }


def _check_recording(samples: list[Sample], path: Path) -> None:
    known = [sample.microjoules for sample in samples if sample.microjoules is not None]
    times = [sample.seconds for sample in samples]
    if len(known) < 2 or samples[0].microjoules is None:
        raise EnergySourceError(f"{path} needs at least two readings, the first line one of them")
    if any(later <= earlier for earlier, later in itertools.pairwise(times)):
        raise EnergySourceError(f"{path}: 'seconds' must rise from line to line")
    if any(reading.keys() != known[0].keys() for reading in known):
        raise EnergySourceError(f"{path}: every reading must have the same devices")
    falls = (b[d] < a[d] for a, b in itertools.pairwise(known) for d in b)
    if not known[0] or any(falls):
        raise EnergySourceError(f"{path}: counters must not fall")


@dataclass(slots=True)
class _Zone:
    """One counter of the powercap folder, which starts again at zero behind `limit`."""

    path: Path
    limit: int
    last: int
    total: int = 0

    def read(self) -> int:
        value = int((self.path / "energy_uj").read_text())
        step = value - self.last
        self.total += step if step >= 0 else step + self.limit
        self.last = value
        return self.total


@dataclass(slots=True)
class PowercapSource:
    """A CPU's packages and memory as the Linux kernel counts them (RAPL), in microjoules.

    Wrap-around is seen as long as a counter is read more often than it wraps (about once a minute).
    """

    folder: Path
    name: str = "rapl"
    devices: tuple[str, ...] = ()
    refresh_seconds: float = 0.001
    _zones: dict[str, _Zone] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises EnergySourceError."""
        try:
            for pattern in ("intel-rapl:*", "intel-rapl:*/intel-rapl:*"):  # flat or nested, or both
                for zone in sorted(self.folder.glob(pattern)):
                    self._add(zone)
        except (OSError, ValueError) as error:
            raise EnergySourceError(f"{self.folder} cannot be read: {error}") from error
        if not self._zones:
            raise EnergySourceError(f"{self.folder} holds no energy counter")
        self.devices = tuple(self._zones)

    def read(self) -> Reading:
        try:
            return {device: zone.read() for device, zone in self._zones.items()}
        except (OSError, ValueError) as error:
            raise EnergySourceError(f"the counters cannot be read: {error}") from error

    def _add(self, zone: Path) -> None:
        """A package counts its cores too; memory does not belong to it, and the whole platform to neither."""
        number = zone.name.removeprefix("intel-rapl:")
        name = (zone / "name").read_text().strip()
        if not (name.startswith("package") or name == "dram"):
            return
        device = f"{'dram' if name == 'dram' else 'cpu'}:{number}"
        if device not in self._zones:
            limit = int((zone / "max_energy_range_uj").read_text())
            self._zones[device] = _Zone(zone, limit, int((zone / "energy_uj").read_text()))


class GpuSource:
    """The cumulative counters of one worker's GPUs, through zeus."""

    refresh_seconds = 0.1

    def __init__(self, gpus: Any, index: int, worker: int = 0, count: int = 1) -> None:
        """`index` is the first one's among those that `worker` sees: several workers see `count` each."""
        self.name = "gpu"
        self._gpus = gpus
        self._indices = {f"gpu:{worker * count + each}": each for each in range(index, index + count)}
        self.devices = tuple(self._indices)
        if not all(map(gpus.supports_get_total_energy_consumption, self._indices.values())):
            raise EnergySourceError("the GPU has no energy counter")

    def read(self) -> Reading:
        try:
            return {
                name: 1000 * int(self._gpus.get_total_energy_consumption(index))
                for name, index in self._indices.items()
            }
        except Exception as error:  # NVML's and AMD SMI's errors have no common base
            raise EnergySourceError(f"the GPU's counter cannot be read: {error}") from error


def open_source(choice: str, device: str, worker: int = 0, num_gpus: int = 1) -> EnergySource | None:
    """The source of a worker that computes on `device` (`cpu`, `cuda` or `cuda:N`), None where there is none.

    Of a worker with several GPUs `device` is the first.

    Raises:
        EnergySourceError: a recording that cannot be played.
    """
    if choice == "none":
        return None
    if choice.startswith(REPLAY_PREFIX):
        return ReplaySource.from_file(Path(choice.removeprefix(REPLAY_PREFIX)))
    try:
        return _gpu(device, worker, num_gpus) if device.startswith("cuda") else _cpu()
    except EnergySourceError as error:
        log.info("energy_not_measured", reason=str(error))
        return None


def _cpu() -> EnergySource:
    folder = next((each for each in POWERCAP_FOLDERS if each.is_dir()), None)
    if folder is None:
        raise EnergySourceError("this machine shows no powercap folder")
    return PowercapSource(folder)


def _gpu(device: str, worker: int, num_gpus: int) -> EnergySource:
    try:
        from zeus.device import get_gpus

        gpus = get_gpus()
    except ImportError as error:
        raise EnergySourceError("zeus is not installed: run scripts/install --energy") from error
    except Exception as error:  # its errors for a missing driver or library have no common base
        raise EnergySourceError(f"zeus finds no GPU: {error}") from error
    return GpuSource(gpus, int(device.partition(":")[2] or 0), worker, num_gpus)
