"""Measures what a step of each shape costs here, and keeps it on disk."""

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Series
from pathlib import Path
from typing import Any

import torch
import transformers

from decoding.batch import Batch
from decoding.config import DecodingConfig, Preset
from decoding.cost_curve import GAP, PLAIN, CostCurve
from decoding.draft_gap import GAP_TOKENS, close_gaps
from decoding.host import to_host
from decoding.methods import METHODS_BY_NAME
from decoding.model import ModelPair
from decoding.sequence import SamplingParams, Sequence

MEASURED_SECONDS = 15.0
MOST_ROWS = 32  # larger batches are extrapolated
CONTEXT = 128
STEP_TOKENS = 32  # that a measured sequence may still deliver

logger = logging.getLogger(__name__)


def cost_curve(
    pair: ModelPair, presets: Series[Preset], max_rows: int, *, cache_dir: Path | None = None
) -> CostCurve:
    """The curve of this pair on this machine: from the cache, or measured, which takes a quarter minute.

    `cache_dir` defaults to `~/.cache/mmtad`. Call before the engine is given work: rows are used.
    """
    folder = (cache_dir or Path.home() / ".cache" / "mmtad") / "costs"
    path = folder / f"{_key(pair, presets, max_rows)}.json"
    if (known := _read(path)) is not None:
        return known
    logger.warning("measuring what steps cost on %s, once", pair.device)
    curve = measure_costs(pair, presets, max_rows)
    _write(path, curve)
    return curve


@torch.inference_mode()
def measure_costs(
    pair: ModelPair, presets: Series[Preset], max_rows: int, *, seconds: float = MEASURED_SECONDS
) -> CostCurve:
    """Run whole steps of every preset, in turn, until the time is over: the least of each counts.

    Every size is measured once at least, smallest first, so that what cannot pay is known early.
    """
    sizes = _sizes(min(max_rows, MOST_ROWS))
    context = max(1, min(CONTEXT, pair.max_model_len - STEP_TOKENS - 1))
    best: dict[tuple[str, int], float] = {}
    deadline = time.monotonic() + seconds
    _time_step(pair, PLAIN, 1, context)  # the first pass of a process is slow
    while True:
        for size in sizes:
            for preset in (PLAIN, *presets):
                if not _hopeless(best, preset, sizes, size):
                    spent = _time_step(pair, preset, size, context)
                    best[preset.name, size] = min(best.get((preset.name, size), math.inf), spent)
            if pair.draft is not None:
                spent = _time_gap(pair, size, context)
                best[GAP, size] = min(best.get((GAP, size), math.inf), spent)
            if time.monotonic() > deadline and (sizes[-1], PLAIN.name) in {(s, n) for n, s in best}:
                return _curve(sizes, best)


def _sizes(most: int) -> tuple[int, ...]:
    """1, 4, 16, ... and the largest."""
    return (*(4**power for power in range(8) if 4**power < most), most)


def _hopeless(best: Mapping[tuple[str, int], float], preset: Preset, sizes: Series[int], size: int) -> bool:
    """Whether a smaller batch showed that all tokens of a step cannot be worth its time."""
    for smaller in sizes:
        cost, plain = best.get((preset.name, smaller)), best.get((PLAIN.name, smaller))
        if smaller < size and cost is not None and plain is not None and cost > plain * (1 + preset.depth):
            return True
    return False


def _curve(sizes: tuple[int, ...], best: Mapping[tuple[str, int], float]) -> CostCurve:
    names = dict.fromkeys(name for name, _ in best)
    points = {
        name: [(size, best[name, size]) for size in sizes if best.get((name, size), math.inf) < math.inf]
        for name in names
    }
    return CostCurve(sizes, points)


def _sequences(pair: ModelPair, size: int, context: int, preset: Preset) -> list[Sequence]:
    """Sequences with `context` committed tokens, whatever they are: costs do not depend on values."""
    for model in pair.models.values():
        model.cache.lengths[:size] = [context] * size
    config = DecodingConfig(
        preset.method,  # type: ignore[arg-type]
        max(preset.depth, 1),
        max(preset.width, 1),
    )
    room = min(STEP_TOKENS, pair.max_model_len - context - 1)
    params = SamplingParams(max_tokens=room)
    prompt = [number % pair.vocab_size for number in range(context + 1)]
    return [Sequence(str(number), prompt, params, config) for number in range(size)]


def _time_step(pair: ModelPair, preset: Preset, size: int, context: int) -> float:
    rows = slice(0, size)
    sequences = _sequences(pair, size, context, preset)
    batch = Batch.of(sequences, rows, pair.eos_token_ids, pair.vocab_size, pair.device)
    batch.take_shape(preset)
    started = time.monotonic()
    try:
        to_host(METHODS_BY_NAME[preset.method].step(pair, batch).packed())
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        _leave(pair, size)
    return time.monotonic() - started


def _time_gap(pair: ModelPair, size: int, context: int) -> float:
    assert pair.draft is not None
    sequences = _sequences(pair, size, context, PLAIN)
    for sequence in sequences:
        sequence.draft_lag = min(GAP_TOKENS, context - 1)
    started = time.monotonic()
    close_gaps(pair.draft, slice(0, size), sequences)
    if pair.device.type == "cuda":
        torch.cuda.synchronize(pair.device)
    spent = time.monotonic() - started
    _leave(pair, size)
    return spent


def _leave(pair: ModelPair, size: int) -> None:
    for model in pair.models.values():
        for row in range(size):
            model.cache.clear_row(row)


def _key(pair: ModelPair, presets: Iterable[Preset], max_rows: int) -> str:
    """All that decides what a step costs: models, device, threads, libraries, and this package's code."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    facts: list[Any] = [
        pair.description,
        [model.module.config.to_dict() for model in pair.models.values()],
        [str(model.dtype) for model in pair.models.values()],
        [None if model.output_ids is None else len(model.output_ids) for model in pair.models.values()],
        [_device_name(pair.device), torch.get_num_threads(), len(os.sched_getaffinity(0))],
        [torch.__version__, transformers.__version__],
        [preset.name for preset in presets],
        [min(max_rows, MOST_ROWS), min(CONTEXT, pair.max_model_len)],
    ]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("model name")), platform.machine())


def _read(path: Path) -> CostCurve | None:
    """What was measured before; None where it is not there or cannot be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        points = {
            str(name): [(int(rows), float(seconds)) for rows, seconds in each]
            for name, each in content["points"].items()
        }
        curve = CostCurve(tuple(int(size) for size in content["rows"]), points)
        sizes = [[size for size, _ in each] for each in points.values()]
        numbers = [seconds for each in points.values() for _, seconds in each]
        if not points.get(PLAIN.name) or sizes != [sorted(set(each)) for each in sizes]:
            raise ValueError("it is not complete")
        if not all(0 < seconds < math.inf for seconds in numbers):
            raise ValueError("it holds impossible times")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is not used, costs are measured again: %s", path, error)
        return None
    return curve


def _write(path: Path, curve: CostCurve) -> None:
    """In one rename; a cache that cannot be written costs the next start its time, and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix="unfinished-", encoding="utf-8", delete=False
        ) as file:
            json.dump({"rows": curve.rows, "points": curve.points}, file)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("costs are not kept: %s", error)
