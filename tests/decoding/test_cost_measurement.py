"""Costs are measured once: kept on disk, measured again when anything that decides them is another."""

import json
import logging
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

from decoding import Engine, ModelPair
from decoding import cost_measurement as module
from decoding.config import Preset
from decoding.cost_curve import CATCH_UP, DRAFT, GAP, KINDS, TARGET, CostCurve
from decoding.cost_measurement import load_costs, measure_costs
from decoding.kv_cache import KVCache
from decoding.policy import Policy
from tests.decoding.late_device import LateDevice
from tests.decoding.tiny import drain, llama_pair, request

SHAPES = [Preset("mmtad"), Preset("mmtad", 1, 1), Preset("mmtad", 2, 3), Preset("mtad", 2, 3)]


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return llama_pair()


def measure(pair: ModelPair, folder: Path, max_rows: int = 6) -> CostCurve:
    return load_costs(pair, max_rows, depth=2, width=3, cache_dir=folder)


def files(folder: Path) -> list[Path]:
    return list((folder / "costs").glob("*.json"))


def test_curve_is_measured_once_and_leaves_no_trace(
    pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = measure(pair, tmp_path)
    assert {kind: list(sizes) for kind, sizes in curve.passes.items()} == {
        kind: [1, 4, 6] for kind in (TARGET, DRAFT, CATCH_UP, GAP)
    }
    assert [tokens for tokens, _ in curve.passes[TARGET][1]] == [1, 2, 4, 7]
    for rows in (1, 3, 6, 40):
        assert all(0 < curve.step(shape, rows) < math.inf for shape in SHAPES)
    for model in pair.models.values():
        assert not model.cache.storage.any()
        assert not any(model.cache.lengths)
    monkeypatch.setattr(module, "measure_costs", None)
    assert measure(pair, tmp_path) == curve


def test_a_pass_within_another_is_never_the_dearer(pair: ModelPair, tmp_path: Path) -> None:
    for sizes in measure(pair, tmp_path).passes.values():
        for rows, points in sizes.items():
            seconds = [each for _, each in points]
            assert seconds == sorted(seconds)
            assert all(
                points[place][1] <= others[place][1]
                for more, others in sizes.items()
                if more >= rows
                for place in range(len(points))
            )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '{"target": {}}',
        '{"target": 3}',
        "\x00\xff",
        json.dumps({kind: {"1": [[1, -1.0]]} for kind in (TARGET, DRAFT, CATCH_UP, GAP)}),
        json.dumps({kind: {"1": [[2, 1.0], [1, 1.0]]} for kind in (TARGET, DRAFT, CATCH_UP, GAP)}),
        json.dumps({kind: {"1": [[1, math.nan]]} for kind in (TARGET, DRAFT, CATCH_UP, GAP)}),
        json.dumps({kind: {"1": []} for kind in (TARGET, DRAFT, CATCH_UP, GAP)}),
    ],
)
def test_damaged_file_is_measured_again(
    content: str, pair: ModelPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measure(pair, tmp_path, 1)
    (file,) = files(tmp_path)
    file.write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        curve = measure(pair, tmp_path, 1)
    assert "measured again" in caplog.text
    assert curve.step(SHAPES[1], 1) > 0
    assert json.loads(file.read_text(encoding="utf-8"))[TARGET]["1"][0][1] == curve.passes[TARGET][1][0][1]


def test_what_decides_costs_decides_the_file(pair: ModelPair, tmp_path: Path) -> None:
    measure(pair, tmp_path)
    measure(pair, tmp_path, 5)
    load_costs(pair, 6, depth=1, width=3, cache_dir=tmp_path)
    other = llama_pair()
    other.description = "another"
    measure(other, tmp_path)
    other.target.ranks = 2
    measure(other, tmp_path)
    assert len(files(tmp_path)) == 5


def test_folder_that_cannot_be_written_costs_only_time(
    pair: ModelPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "costs").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert measure(pair, tmp_path, 1).step(SHAPES[0], 1) > 0
    assert "not kept" in caplog.text


def test_of_processes_that_start_at_once_one_measures(
    pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def slowly(*_: Any) -> CostCurve:
        measured.append(time.monotonic())
        time.sleep(0.3)
        return CostCurve({kind: {1: [(1, 1.0)]} for kind in KINDS})

    monkeypatch.setattr(module, "measure_costs", slowly)
    with ThreadPoolExecutor() as pool:
        curves = list(pool.map(lambda _: measure(pair, tmp_path), range(3)))
    assert len(measured) == 1
    assert curves == [curves[0]] * 3


HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_wait_ends_with_the_process_that_measured(pair: ModelPair, tmp_path: Path) -> None:
    lock = tmp_path / "costs" / "measuring.lock"
    lock.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(measure, pair, tmp_path, 1)
            time.sleep(0.3)
            assert not waiting.done()
            assert not files(tmp_path)
            other.kill()
            assert waiting.result(30).step(SHAPES[0], 1) > 0


def test_wait_for_a_process_that_hangs_is_bounded(
    pair: ModelPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST_WAIT", 0.1)
    (tmp_path / "costs").mkdir()
    with FileLock(tmp_path / "costs" / "measuring.lock"), caplog.at_level(logging.WARNING):
        assert measure(pair, tmp_path, 1).step(SHAPES[0], 1) > 0
    assert "beside other processes" in caplog.text


def test_measured_costs_serve_an_engine(pair: ModelPair, tmp_path: Path) -> None:
    engine = Engine(pair, 6, policy=Policy(measure(pair, tmp_path)))
    for number in range(8):
        engine.add(request(str(number), [3, 1, number], adaptive=True, max_tokens=30, ignore_eos=True))
    texts = drain(engine, check=True)
    assert all(len(text.token_ids) == 30 for text in texts.values())


def test_cleared_rows_are_no_cost_of_the_next_pass(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that works behind the host."""
    device = LateDevice()
    clear_row, run = KVCache.clear_row, module._run

    def clearing(*args: Any, **options: Any) -> None:
        device.queued += 100.0
        clear_row(*args, **options)

    def running(*args: Any) -> None:
        device.queued += 1.0
        run(*args)

    monkeypatch.setattr(module, "cost_clock", lambda *_: device.clock)
    monkeypatch.setattr(module, "finish_queued", device.finish)
    monkeypatch.setattr(module, "_run", running)
    monkeypatch.setattr(KVCache, "clear_row", clearing)
    curve = measure_costs(pair, [(TARGET, 1, 1), (TARGET, 2, 1)])
    assert curve.passes == {TARGET: {1: [(1, 1.0)], 2: [(1, 1.0)]}}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_first_run_of_a_pass_on_a_gpu_is_not_counted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads kernels and records graphs."""
    taken: dict[Any, int] = {}

    def timing(pair: Any, each: Any, context: int) -> float:
        taken[each] = taken.get(each, 0) + 1
        return float(taken[each])  # a first one that counted would be the least

    monkeypatch.setattr(module, "_time", timing)
    monkeypatch.setattr(module, "MOST_ROUNDS", 2)
    some = SimpleNamespace(device=torch.device(device), max_model_len=64)
    curve = measure_costs(some, [(TARGET, 1, 1), (DRAFT, 1, 1)])  # type: ignore[arg-type]
    untimed = int(device == "cuda")
    assert curve.passes == {kind: {1: [(1, 1.0 + untimed)]} for kind in (TARGET, DRAFT)}
    assert set(taken.values()) == {2 + untimed}
