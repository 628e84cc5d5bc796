"""Energy sources: recordings, the kernel's powercap folder as files, a GPU's counter, and honest absence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from server import energy_source
from server.energy_source import EnergySourceError, GpuSource, PowercapSource, ReplaySource, open_source
from server.messages import LoadCommand
from server.worker import open_energy


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def recording(path: Path, rows: list[tuple[float, dict[str, int] | None]]) -> Path:
    lines = [json.dumps({"seconds": seconds, "microjoules": value}) for seconds, value in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_recording_is_played_in_real_time_and_its_totals_go_on(tmp_path: Path) -> None:
    path = recording(tmp_path / "r", [(5, {"gpu:0": 10}), (6, {"gpu:0": 30}), (7, None), (8, {"gpu:0": 70})])
    clock = Clock()
    source = ReplaySource(ReplaySource.from_file(path)._samples, clock)
    seen: list[int | None] = []
    for seconds in (0, 0.9, 1, 2.5, 3, 4.2, 6):
        clock.now = 100 + seconds
        try:
            seen.append(source.read()["gpu:0"])
        except EnergySourceError:
            seen.append(None)
    assert source.devices == ("gpu:0",)
    assert seen == [10, 10, 30, None, 70, 90, 130]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no recording"),
        ('{"seconds": 1, "microjoules": {"a": 1}}', "at least two readings"),
        ('{"seconds": 1, "microjoules": {"a": 1}}\n{"seconds": 1, "microjoules": {"a": 1}}', "must rise"),
        ('{"seconds": 1, "microjoules": {"a": 2}}\n{"seconds": 2, "microjoules": {"a": 1}}', "must not fall"),
        ('{"seconds": 1, "microjoules": {"a": 2}}\n{"seconds": 2, "microjoules": {"b": 3}}', "same devices"),
    ],
)
def test_bad_recordings_are_refused_with_the_reason(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "bad").write_text(text, encoding="utf-8")
    with pytest.raises(EnergySourceError, match=reason):
        open_source(f"replay:{tmp_path / 'bad'}", "cpu")
    with pytest.raises(EnergySourceError, match="cannot be read: No such file"):
        open_source(f"replay:{tmp_path / 'none'}", "cpu")


def zone(folder: Path, name: str, value: int, limit: int = 1000) -> None:
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", value), ("max_energy_range_uj", limit)):
        (folder / file).write_text(f"{text}\n", encoding="utf-8")


def powercap(root: Path) -> Path:
    """One package with its cores, which are part of it, memory, which is not, and the whole platform."""
    zone(root / "intel-rapl:0", "package-0", 900)
    zone(root / "intel-rapl:0:0", "core", 500)
    zone(root / "intel-rapl:0:1", "dram", 10)
    zone(root / "intel-rapl:1", "psys", 2000)
    return root


def test_zones_may_lie_inside_their_package(tmp_path: Path) -> None:
    root = powercap(tmp_path / "powercap")
    (root / "intel-rapl:0:1").rename(root / "intel-rapl:0" / "intel-rapl:0:1")
    shutil.rmtree(root / "intel-rapl:0:0")
    (root / "intel-rapl:0:1").symlink_to(root / "intel-rapl:0" / "intel-rapl:0:1")
    assert PowercapSource(root).devices == ("cpu:0", "dram:0:1")


def test_powercap_counters_are_read_over_their_wrap_around(tmp_path: Path) -> None:
    root = powercap(tmp_path / "powercap")
    source = PowercapSource(root)
    assert source.devices == ("cpu:0", "dram:0:1")
    assert source.read() == {"cpu:0": 0, "dram:0:1": 0}
    (root / "intel-rapl:0" / "energy_uj").write_text("950", encoding="utf-8")
    (root / "intel-rapl:0:1" / "energy_uj").write_text("15", encoding="utf-8")
    assert source.read() == {"cpu:0": 50, "dram:0:1": 5}
    (root / "intel-rapl:0" / "energy_uj").write_text("20", encoding="utf-8")
    assert source.read() == {"cpu:0": 120, "dram:0:1": 5}


def test_a_lost_counter_is_an_error_that_can_pass(tmp_path: Path) -> None:
    root = powercap(tmp_path / "powercap")
    source = PowercapSource(root)
    counter = root / "intel-rapl:0" / "energy_uj"
    counter.rename(root / "away")
    with pytest.raises(EnergySourceError, match="cannot be read"):
        source.read()
    (root / "away").rename(counter)
    assert source.read() == {"cpu:0": 0, "dram:0:1": 0}


def test_auto_takes_the_powercap_folder_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = powercap(tmp_path / "powercap")
    monkeypatch.setattr(energy_source, "POWERCAP_FOLDERS", (tmp_path / "none", root))
    source = open_source("auto", "cpu")
    assert source is not None
    assert source.name == "rapl"
    assert open_source("none", "cpu") is None


@pytest.mark.parametrize(("num_workers", "read"), [(1, True), (2, False)])
def test_workers_that_share_a_cpu_do_not_share_its_counter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, read: bool
) -> None:
    monkeypatch.setattr(energy_source, "POWERCAP_FOLDERS", (powercap(tmp_path / "powercap"),))
    load = LoadCommand(
        target=None,
        draft=None,
        device="cpu",
        dtype="auto",
        max_model_len=None,
        max_num_seqs=2,
        num_workers=num_workers,
        energy_source="auto",
    )
    assert (open_energy(load, "cpu") is not None) is read


def test_nothing_measures_where_there_is_no_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy_source, "POWERCAP_FOLDERS", (tmp_path / "none",))
    assert open_source("auto", "cpu") is None
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(energy_source, "POWERCAP_FOLDERS", (tmp_path / "empty",))
    assert open_source("auto", "cpu") is None
    assert open_source("auto", "cuda:0") is None


class Gpus:
    """What zeus gives: millijoules, one counter per GPU."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def supports_get_total_energy_consumption(self, index: int) -> bool:
        return index >= 1

    def get_total_energy_consumption(self, index: int) -> int:
        value = self.values.pop(0)
        if isinstance(value, Exception):
            raise value
        return int(value)


def test_a_gpus_millijoules_become_microjoules() -> None:
    assert GpuSource(Gpus([]), 1, worker=2).devices == ("gpu:3",)
    assert GpuSource(Gpus([5, 6]), 1, worker=2, count=2).read() == {"gpu:5": 5000, "gpu:6": 6000}
    source = GpuSource(Gpus([5, RuntimeError("GPU is lost"), 7]), 1)
    assert source.read() == {"gpu:1": 5000}
    with pytest.raises(EnergySourceError, match="GPU is lost"):
        source.read()
    assert source.read() == {"gpu:1": 7000}
    with pytest.raises(EnergySourceError, match="no energy counter"):
        GpuSource(Gpus([]), 0)
