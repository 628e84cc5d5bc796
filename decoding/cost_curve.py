"""What a step of each shape costs by batch size, as measured, and how far that has drifted since."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from decoding.config import Preset
from decoding.draft_gap import GAP_TOKENS

PLAIN = Preset("target")
GAP = "gap"  # stands for a pass over GAP_TOKENS tokens per row that the draft has missed
SLOWDOWN_MEMORY = 8.0  # steps
SHAPE_MEMORY = 32.0
MOST_DRIFT = 2.0
Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of a step by the name of its preset: points of rows and seconds, in order of rows.

    `rows` are the batch sizes that were measured. A shape without a point at some size could not pay
    there even if all that it proposes were accepted.
    """

    rows: tuple[int, ...]
    points: Mapping[str, Points]

    def seconds(self, name: str, rows: int) -> float:
        """Interpolated; infinite where the shape cannot pay, or was never measured."""
        points = self.points.get(name, [])
        upper = next((number for number, (size, _) in enumerate(points) if size >= rows), None)
        if upper is None and (not points or points[-1][0] < self.rows[-1]):
            return math.inf
        if len(points) == 1:
            return points[0][1] * max(1.0, rows / points[0][0])
        number = len(points) - 1 if upper is None else max(upper, 1)
        (low, low_seconds), (high, high_seconds) = points[number - 1], points[number]
        slope = (high_seconds - low_seconds) / (high - low)
        return max(low_seconds + slope * (rows - low), 0.5 * low_seconds)

    def step(self, preset: Preset, rows: int) -> float:
        """Of one step; how a chain is verified is not told apart."""
        return self.seconds(
            PLAIN.name if not preset.depth else replace(preset, acceptance="token").name, rows
        )

    def gap(self, tokens: int, rows: int) -> float:
        """Seconds for the draft to run `tokens` per row that it has missed."""
        if not tokens:
            return 0.0
        # A short pass costs little less than a quarter of a full one: weights are read for any.
        passes, rest = divmod(tokens, GAP_TOKENS)
        return self.seconds(GAP, rows) * (passes + (0.25 + 0.75 * rest / GAP_TOKENS if rest else 0.0))


@dataclass(slots=True)
class CostDrift:
    """How far the machine has come from the curve since: as a whole, and for single shapes.

    Only the latter matter to a choice. Plain steps are what others are compared with.
    """

    slowdown: float = 1.0
    _shapes: dict[str, float] = field(default_factory=dict)

    def of(self, preset: Preset) -> float:
        """What a shape costs, against plain steps, over what the curve says."""
        return self._shapes.get(preset.name, 1.0)

    def note(self, preset: Preset, ratio: float) -> None:
        """`ratio` is a step's seconds over the curve's; one step that was held up must not count much."""
        own = self.of(preset)
        seen = min(max(ratio / own, self.slowdown / MOST_DRIFT), self.slowdown * MOST_DRIFT)
        self.slowdown += (seen - self.slowdown) / SLOWDOWN_MEMORY
        if preset.depth:
            own += (min(max(ratio / self.slowdown, 1 / MOST_DRIFT), MOST_DRIFT) - own) / SHAPE_MEMORY
            self._shapes[preset.name] = own
