"""How many workers a server starts that was not told."""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server import gpus
from server.__main__ import EXIT_USAGE, main, with_workers
from server.config import load_config

ROOT = Path(__file__).parent.parent.parent


class Driver:
    """A CUDA driver with so many devices, or one that cannot start."""

    def __init__(self, devices: int, status: int = 0) -> None:
        self.devices = devices
        self.status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.devices
        return 0


def test_the_count_is_the_one_of_pytorch() -> None:
    command_line = [sys.executable, "-m", "server.gpus"]
    child = subprocess.run(command_line, cwd=ROOT, capture_output=True, check=True, text=True)
    if torch.version.cuda is not None:
        assert int(child.stdout) == torch.cuda.device_count()
    assert gpus.count_gpus() == torch.cuda.device_count()


@pytest.mark.parametrize(("driver", "count"), [(Driver(8), 8), (Driver(8, status=100), 0)])
def test_what_the_driver_says(driver: Driver, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert gpus.visible_gpus() == count


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpus.visible_gpus() == 0


@pytest.mark.parametrize(("output", "count"), [(b"4", 4), (b"", 0)])
def test_the_count_comes_from_a_child(output: bytes, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_torch_uses_cuda", lambda: True)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=output))
    assert gpus.count_gpus() == count


@pytest.mark.parametrize(
    ("arguments", "visible", "workers"),
    [
        ([], 4, 4),
        ([], 0, 1),
        (["--num-workers", "1"], 4, 1),
        (["--num-workers", "2"], 0, 2),
        (["--device", "cpu"], 4, 1),
        (["--tensor-parallel-size", "2"], 5, 2),
        (["--num-workers", "2"], 2, 2),
        (["--num-workers", "2", "--device", "cpu"], 1, 2),
        (["--tensor-parallel-size", "4"], 0, 1),
    ],
)
def test_one_worker_per_gpu_unless_told(
    arguments: list[str], visible: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.__main__.count_gpus", lambda: visible)
    assert with_workers(load_config(arguments)).num_workers == workers


@pytest.mark.parametrize(
    ("arguments", "visible"),
    [
        (["--num-workers", "2"], 1),
        (["--num-workers", "2", "--tensor-parallel-size", "2", "--device", "cuda"], 3),
        (["--tensor-parallel-size", "4"], 2),
        (["--num-workers", "1", "--tensor-parallel-size", "2"], 1),
    ],
)
def test_fewer_gpus_than_workers_need_are_told_at_the_start(
    arguments: list[str],
    visible: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("server.__main__.count_gpus", lambda: visible)
    monkeypatch.setattr(sys, "argv", ["server", *arguments])
    assert main() == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith("error: --num-workers ")
    assert f"of which {visible} can be seen; give smaller" in error


def test_gpus_of_a_cluster_are_not_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr("server.__main__.count_gpus", lambda: 1)
    arguments = ["--worker-backend", "ray", "--num-workers", "8"]
    assert with_workers(load_config(arguments)).num_workers == 8


def test_the_environment_may_tell_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTAD_NUM_WORKERS", "3")
    monkeypatch.setattr("server.__main__.count_gpus", lambda: 8)
    assert with_workers(load_config([])).num_workers == 3
