"""What a step of each shape costs by batch size, from measured passes, and how far that has drifted since."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

from decoding.config import Preset
from decoding.draft_gap import GAP_TOKENS

TARGET, DRAFT, CATCH_UP, GAP = KINDS = ("target", "draft", "catch_up", "gap")
CATCH_UP_TOKENS = 2
SPEED_MEMORY = 8.0  # steps over which the machine's speed is averaged
SHAPE_MEMORY = 16.0  # comparisons over which a shape's own drift is
MOST_DRIFT = 1.25  # that one comparison may show
Points = list[tuple[int, float]]  # tokens per row with the seconds of a pass, in order of tokens


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of passes: by kind, then by rows (rising), the points that were measured.

    The kinds are the target's and the draft's pass over tree nodes, the draft's first pass of a step,
    and its pass over GAP_TOKENS tokens that it has missed. All sizes have points for one token per row,
    the first one for all that may be asked for.
    """

    passes: Mapping[str, Mapping[int, Points]]

    def step(self, preset: Preset, rows: int) -> float:
        """Of one step: the draft's passes and the target's."""
        if not preset.depth:
            return self.seconds(TARGET, rows, 1)
        verified = preset.depth + 1 if preset.method == "mtad" else preset.num_nodes
        levels = (preset.depth - 1) * self.seconds(DRAFT, rows, preset.width) if preset.depth > 1 else 0.0
        return self.seconds(CATCH_UP, rows, CATCH_UP_TOKENS) + levels + self.seconds(TARGET, rows, verified)

    def gap(self, tokens: int, rows: int) -> float:
        """Of the draft's passes over `tokens` per row that it has missed."""
        passes, rest = divmod(tokens, GAP_TOKENS)
        whole, least = self.seconds(GAP, rows, GAP_TOKENS), self.seconds(CATCH_UP, rows, CATCH_UP_TOKENS)
        return passes * whole + (least + (whole - least) * rest / GAP_TOKENS if rest else 0.0)

    def seconds(self, kind: str, rows: int, tokens: int) -> float:
        """Of one pass, between and beyond what was measured along straight lines."""
        return _line([(size, self._at(kind, size, tokens)) for size in self.passes[kind]], rows)

    def _at(self, kind: str, size: int, tokens: int) -> float:
        """At a measured size. Where time ran out there, more tokens cost what they do at smaller sizes."""
        points = self.passes[kind][size]
        most = points[-1][0]
        smaller = max((each for each in self.passes[kind] if each < size), default=None)
        if tokens <= most or smaller is None:
            return _line(points, tokens)
        more = self._at(kind, smaller, tokens) - self._at(kind, smaller, most)
        return points[-1][1] + more * size / smaller


def up_to(numbers: Series[int], most: int) -> list[int]:
    """Those of rising `numbers` below `most`, and `most` itself."""
    return [*(number for number in numbers if number < most), most]


def _line(points: Series[tuple[int, float]], place: int) -> float:
    """The value at `place` on the line through the points next to it; it never falls beyond the last."""
    if len(points) == 1:
        return points[0][1]
    upper = next((number for number, (x, _) in enumerate(points) if x >= place), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(upper, 1) - 1], points[max(upper, 1)]
    slope = (y1 - y0) / (x1 - x0)
    return y1 + max(slope, 0.0) * (place - x1) if place > x1 else y0 + slope * (place - x0)


@dataclass(slots=True)
class CostDrift:
    """What shapes cost, against plain steps, over what the curve says of them.

    A busy machine slows all of them alike, which no choice depends on: two shapes are compared where
    one follows the other.
    """

    _shapes: dict[Preset, tuple[float, int]] = field(default_factory=dict)  # drift, number of comparisons
    _last: Preset | None = None
    _speed: float = 1.0  # of the steps before, by the curve and the drift

    def of(self, preset: Preset) -> float:
        return self._shapes.get(preset, (1.0, 0))[0]

    def note(self, preset: Preset, ratio: float) -> None:
        """A step took `ratio` times the curve's seconds."""
        seen = ratio / self.of(preset)
        if preset != self._last:
            if self._last is not None and (preset.depth or self._last.depth):
                self._compare(preset, self._last, seen / self._speed)
            self._speed = ratio / self.of(preset)
        # A step that was held up tells nothing of the speed.
        self._speed += (min(seen, MOST_DRIFT * self._speed) - self._speed) / SPEED_MEMORY
        self._last = preset

    def _compare(self, preset: Preset, before: Preset, excess: float) -> None:
        """The shape took `excess` times what the one before made expect; plain steps are never at fault."""
        excess = min(max(excess, 1 / MOST_DRIFT), MOST_DRIFT)
        shape, factor = (preset, excess) if preset.depth else (before, 1 / excess)
        drift, count = self._shapes.get(shape, (1.0, 0))
        weight = 1 / min(count + 2, SHAPE_MEMORY)
        self._shapes[shape] = drift * factor**weight, count + 1
