"""Passes of fixed shape, recorded once and replayed: on a GPU one launch in place of one per operation."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from decoding.device_errors import is_out_of_memory
from decoding.errors import one_line
from decoding.host import to_host
from decoding.kv_cache import KVCache
from decoding.passes import Pass

SHORTEST_LIVE = 512  # columns; live lengths double from here to the capacity
# Of all rows, padding included: 64 rows of 17 nodes, the tree of the defaults. A larger pass is bound by
# its arithmetic, and its graph by its memory.
MOST_TOKENS = 64 * 17
MOST_GRAPHS = 256  # of one model
# The same operations on the same shapes: what differs by more than another order of sums is a fault.
MAX_RELATIVE_ERROR = 1e-4
MAX_RELATIVE_ERROR_HALF = 0.05

Run = Callable[[slice, Pass, int], Tensor]

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """What turns work on tensors into a function that repeats it on the same tensors."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` to warm up, then record it; raises RuntimeError where it cannot be."""
        ...


class CudaRecorder:
    """CUDA graphs out of one memory pool, of which only one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        # The outer context restores the stream where a recording that failed does not.
        with torch.cuda.stream(self._stream):
            work()  # loads kernels and takes workspaces, which a recording cannot
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        return graph.replay


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is recorded for: rows from the first on, tokens per row, columns seen, logits kept."""

    rows: int
    tokens: int
    live: int
    keep: int

    @property
    def size(self) -> int:
        return self.rows * self.tokens * self.live


class Graph:
    """One recorded pass: the inputs that it reads, and where it leaves its logits."""

    def __init__(self, inputs: Pass, logits: Tensor, trash_column: int) -> None:
        self.inputs, self.logits = inputs, logits
        self._trash_column = trash_column
        self._filled: slice | None = None
        self._replay: Callable[[], None] | None = None

    def record(self, recorder: Recorder, run: Run, rows: slice, inputs: Pass) -> float:
        """Record the pass on the inputs of a real one; the relative error of its first replay."""
        count, keep = self.logits.shape[:2]

        def work() -> None:
            self.logits.copy_(run(slice(0, count), self.inputs, keep))

        self._fill(rows, inputs)
        work()
        expected = self.logits[rows].clone()
        self._replay = recorder.record(work)
        self.logits.fill_(math.nan)
        return _relative_error(self.replay(rows, inputs), expected)

    def replay(self, rows: slice, inputs: Pass) -> Tensor:
        """The logits `[rows, keep, vocab]` of a pass over `rows`: a view, until the model's next pass."""
        assert self._replay is not None
        self._fill(rows, inputs)
        self._replay()
        return self.logits[rows]

    def _fill(self, rows: slice, inputs: Pass) -> None:
        # Rows that were padding stay it, so only what the last pass filled beside them is put back.
        if rows != self._filled:
            self.inputs.pad(self._trash_column)
            self._filled = rows
        self.inputs.take(rows, inputs)


class PassGraphs:
    """The graphs of one model: which passes are replayed, at most `MOST_GRAPHS` shapes of them.

    Rows are padded up to powers of two, live lengths too, so that there are few shapes. The logits of
    all graphs lie in the same place: they are overwritten by the model's next pass. Every graph is
    compared with the pass itself when it is recorded; one that differs or cannot be recorded ends the
    use of graphs for this model, with one warning.
    """

    def __init__(
        self, run: Run, cache: KVCache, recorder: Recorder, *, vocab_size: int, dtype: torch.dtype
    ) -> None:
        self._run, self._cache, self._recorder = run, cache, recorder
        self._vocab_size, self._dtype = vocab_size, dtype
        self._graphs: dict[Shape, Graph] = {}
        self._most = MOST_GRAPHS
        self._logits = torch.empty(0)
        # The last row of the cache is where prompts are prefilled: it belongs to no batch.
        self.row_buckets = _doubling(1, cache.rows - 1)
        self.live_buckets = _doubling(min(SHORTEST_LIVE, cache.capacity), cache.capacity)
        self.enabled = True

    def __len__(self) -> int:
        return len(self._graphs)

    def live_length(self, columns: int) -> int:
        """How many columns a pass sees that must see `columns`."""
        return _at_least(self.live_buckets, columns) if self.enabled else columns

    def find(self, rows: slice, inputs: Pass, keep: int) -> Graph | None:
        """The graph of a pass, recorded now if it is the first of its shape; None if it is run as it is."""
        shape = self._shape(rows, inputs, keep)
        if shape is None:
            return None
        graph = self._graphs.get(shape)
        if graph is None and len(self._graphs) < self._most:
            graph = self._record(shape, rows, inputs)
        return graph

    def fits(self, shape: Shape) -> bool:
        """Whether a pass of that shape is replayed at all."""
        return self.enabled and shape.rows * shape.tokens <= MOST_TOKENS

    def _shape(self, rows: slice, inputs: Pass, keep: int) -> Shape | None:
        # A group that does not begin at the first row pays for all rows before it.
        if rows.start > rows.stop - rows.start or rows.stop > self.row_buckets[-1]:
            return None
        tokens, live = inputs.mask.shape[1:]
        shape = Shape(_at_least(self.row_buckets, rows.stop), tokens, live, keep)
        return shape if self.fits(shape) else None

    def _record(self, shape: Shape, rows: slice, inputs: Pass) -> Graph | None:
        try:
            graph = self._blank(shape, inputs.mask.device)
            difference = graph.record(self._recorder, self._run, rows, inputs)
        except RuntimeError as error:
            cause = _cause(error)
            if is_out_of_memory(cause):
                self._most = len(self._graphs)
                logger.warning("no memory for more than %d graphs: other passes are not replayed", self._most)
            else:
                self._stop(f"{type(cause).__name__}: {one_line(cause, 200)}")
            return None
        half = self._dtype in (torch.float16, torch.bfloat16)
        if not difference <= (MAX_RELATIVE_ERROR_HALF if half else MAX_RELATIVE_ERROR):
            self._stop(f"{shape} is off by {difference:.1e} against the pass itself")
            return None
        self._graphs[shape] = graph
        return graph

    def _blank(self, shape: Shape, device: torch.device) -> Graph:
        sizes = (shape.rows, shape.keep, self._vocab_size)
        with torch.inference_mode(False):  # what is made inside it could not be written outside
            inputs = Pass.blank(shape.rows, shape.tokens, shape.live, device)
            if self._logits.numel() < math.prod(sizes):
                dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
                self._logits = torch.empty(math.prod(sizes), dtype=dtype, device=device)
        return Graph(inputs, self._logits[: math.prod(sizes)].view(sizes), self._cache.trash_column)

    def _stop(self, reason: str) -> None:
        logger.warning("passes are not replayed from graphs: %s", reason)
        self._graphs.clear()
        self.enabled = False


def _cause(error: RuntimeError) -> Exception:
    """What broke a recording: its end raises anew, and says only that something did."""
    return error.__context__ if isinstance(error.__context__, Exception) else error


def _doubling(first: int, last: int) -> list[int]:
    """`first`, twice that, and so on up to `last`, which also stands for one that is nearly as large."""
    numbers = [first]
    while 2 * numbers[-1] <= last:
        numbers.append(2 * numbers[-1])
    if len(numbers) > 1 and 8 * last < 9 * numbers[-1]:
        numbers.pop()
    return numbers if numbers[-1] == last else [*numbers, last]


def _at_least(buckets: list[int], value: int) -> int:
    return next(bucket for bucket in buckets if bucket >= value)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; what is no number on both sides does not differ."""
    parts = [_difference_and_scale(*row) for row in zip(found, expected, strict=True)]  # memory of one row
    difference, scale = torch.stack(parts).amax(0).unbind()
    error: float = to_host(difference / scale)  # type: ignore[assignment]
    return error


def _difference_and_scale(found: Tensor, expected: Tensor) -> Tensor:
    same = (found == expected) | (found.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, (found - expected).abs()).amax()
    scale = expected.abs().nan_to_num(0.0, posinf=0.0).amax()
    return torch.stack([difference, scale.clamp(min=torch.finfo(expected.dtype).tiny)])
