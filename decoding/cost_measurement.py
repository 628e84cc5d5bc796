"""Measures what passes of a pair cost here, and keeps it on disk."""

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import Tensor

from decoding.beam import CANDIDATES_PER_BEAM
from decoding.cost_curve import CATCH_UP, CATCH_UP_TOKENS, DRAFT, GAP, KINDS, TARGET, CostCurve, up_to
from decoding.draft_gap import GAP_TOKENS
from decoding.model_pair import ModelPair
from decoding.timing import cost_clock, finish_queued
from decoding.token_tree import TokenTree

MEASURED_SECONDS = 15.0
MOST_WAIT = 120.0  # for another process that measures
MOST_ROUNDS = 6
MOST_ROWS = 32  # larger batches and wider passes are extrapolated
MOST_TOKENS = 512  # of all rows
CONTEXT = 128
VERIFIED = (1, 2, 4, 8, 17, 33, 65)  # nodes per row
WIDTHS = (1, 2, 4, 8, 16)
Pass = tuple[str, int, int]  # kind, rows, tokens per row

logger = logging.getLogger(__name__)


def load_costs(
    pair: ModelPair, max_rows: int, *, depth: int, width: int, cache_dir: Path | None = None
) -> CostCurve:
    """What passes of up to `depth * width` nodes cost here: known, or measured in a quarter of a minute.

    `cache_dir` defaults to `~/.cache/mmtad`. Call before an engine has work: rows are used. Of several
    processes one measures at a time, and the others find its file.
    """
    wanted = list(_passes(min(max_rows, MOST_ROWS), 1 + depth * width, width))
    folder = (cache_dir or Path.home() / ".cache" / "mmtad") / "costs"
    path = folder / f"{_key(pair, wanted)}.json"
    with _turn(folder):
        curve = _read(path)
        if curve is None:
            logger.warning("measuring what steps cost on %s, once", pair.device)
            curve = measure_costs(pair, wanted)
            _write(path, curve)
    return curve


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Beside each other processes would measure each other; the lock of one that dies is free."""
    lock = FileLock(folder / "measuring.lock", timeout=MOST_WAIT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("costs are read or measured beside other processes: %s", error)
    try:
        yield
    finally:
        lock.release()


def _passes(max_rows: int, nodes: int, width: int) -> Iterator[Pass]:
    """Smallest batches first; of every size the plain pass, which all others are compared with, first."""
    sizes = up_to([4**power for power in range(8)], max_rows)
    for rows in sizes:
        for kind, numbers, most in ((TARGET, VERIFIED, nodes), (DRAFT, WIDTHS, width)):
            yield from (
                (kind, rows, tokens) for tokens in up_to(numbers, most) if tokens * rows <= MOST_TOKENS
            )
        yield CATCH_UP, rows, CATCH_UP_TOKENS
        yield GAP, rows, GAP_TOKENS


@torch.inference_mode()
def measure_costs(pair: ModelPair, passes: list[Pass], seconds: float = MEASURED_SECONDS) -> CostCurve:
    """Run all passes in turn, a few times or until the time is over: the least time of each counts.

    Every pass of the smallest size is run twice at least, one token per row at every size once.
    """
    smallest = passes[0][1]
    context = max(1, min(CONTEXT, pair.max_model_len // 2))
    best: dict[Pass, float] = {}
    deadline = time.monotonic() + seconds
    rounds = 0
    while rounds < 2 or (rounds < MOST_ROUNDS and time.monotonic() < deadline):
        for each in passes:
            kind, rows, tokens = each
            needed = rows == smallest or tokens == 1 or kind in (CATCH_UP, GAP)
            first = each not in best
            if time.monotonic() < deadline or (needed and (first or rows == smallest)):
                if first and pair.device.type == "cuda":
                    _time(pair, each, context)  # kernels are loaded, its graph recorded: never again
                best[each] = min(best.get(each, math.inf), _time(pair, each, context))
        rounds += 1
    return _curve(best)


def _curve(best: Mapping[Pass, float]) -> CostCurve:
    """A pass that holds another one cannot be the faster: where it seems so, the other was held up."""
    passes: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for kind, rows, tokens in sorted(best):
        least = min(
            spent
            for (other, more_rows, more_tokens), spent in best.items()
            if other == kind and more_rows >= rows and more_tokens >= tokens
        )
        passes.setdefault(kind, {}).setdefault(rows, []).append((tokens, least))
    return CostCurve(passes)


def _time(pair: ModelPair, each: Pass, context: int) -> float:
    """Seconds of one pass behind `context` columns, with what is done with its logits; see `Pass`."""
    kind, rows, _ = each
    model = pair.models["target" if kind == TARGET else "draft"]
    model.cache.lengths[:rows] = [context] * rows
    clock = cost_clock(pair.device, pair.target.ranks)
    finish_queued(pair.device)  # rows that the pass before cleared
    started = clock()
    try:
        _run(pair, each, torch.full((rows,), context, device=pair.device))
        finish_queued(pair.device)
        return clock() - started
    finally:
        for row in range(rows):
            model.cache.clear_row(row)


def _run(pair: ModelPair, each: Pass, lengths: Tensor) -> None:
    kind, rows, tokens = each
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=pair.device)
    rows_used = slice(0, rows)
    if kind == TARGET:
        logits = pair.target.forward(rows_used, lengths, TokenTree.chain_of(ids))
        logits.log_softmax(-1)
        logits.logsumexp(-1)
        return
    assert pair.draft is not None
    if kind == CATCH_UP:
        logits = pair.draft.catch_up(rows_used, lengths, ids)[:, None]
    else:
        keep = 1 if kind == GAP else None
        logits = pair.draft.forward(rows_used, lengths, TokenTree.chain_of(ids), keep=keep)
    if kind != GAP:
        logits.log_softmax(-1).topk(min(CANDIDATES_PER_BEAM, pair.vocab_size))


def _key(pair: ModelPair, passes: list[Pass]) -> str:
    """All that decides what a pass costs: models, device, threads, ranks, libraries and this code."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    facts: list[Any] = [
        pair.description,
        [model.module.config.to_dict() for model in pair.models.values()],
        [str(model.dtype) for model in pair.models.values()],
        [None if model.output_ids is None else len(model.output_ids) for model in pair.models.values()],
        [model.graphs is not None and model.graphs.enabled for model in pair.models.values()],
        [_device_name(pair.device), torch.get_num_threads(), len(os.sched_getaffinity(0)), pair.target.ranks],
        [torch.__version__, transformers.__version__],
        [passes, min(CONTEXT, pair.max_model_len // 2)],
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
        passes = {
            str(kind): {
                int(rows): [(int(tokens), float(seconds)) for tokens, seconds in points]
                for rows, points in sizes.items()
            }
            for kind, sizes in content.items()
        }
        _check(passes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("%s is not used, costs are measured again: %s", path, error)
        return None
    return CostCurve(passes)


def _check(passes: Mapping[str, Mapping[int, list[tuple[int, float]]]]) -> None:
    if set(passes) != set(KINDS):
        raise ValueError("it is not complete")
    for sizes in passes.values():
        if not sizes or list(sizes) != sorted(sizes) or not all(sizes.values()):
            raise ValueError("it is not complete")
        for points in sizes.values():
            tokens = [each for each, _ in points]
            if tokens != sorted(set(tokens)) or not all(0 < seconds < math.inf for _, seconds in points):
                raise ValueError("it holds impossible points")


def _write(path: Path, curve: CostCurve) -> None:
    """In one rename; a cache that cannot be written costs the next start its time, and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix="unfinished-", encoding="utf-8", delete=False
        ) as file:
            json.dump(curve.passes, file)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("costs are not kept: %s", error)
