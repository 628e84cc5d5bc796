"""Which shape the next step of a group takes: the one of the most expected tokens per second.

What a step delivers is expected from survival averages, what it costs from the measured curve. The
choice is made before anything is drawn and never from what is being drawn, so no law changes.
"""

import math
from collections.abc import Sequence as Series
from dataclasses import dataclass, field, replace

from decoding.config import Preset
from decoding.cost_curve import CostCurve, CostDrift, up_to
from decoding.sequence import Sequence
from decoding.survival import PairSurvival, SequenceSurvival

HYSTERESIS = 1.05
PROBE_STEPS = 16  # least steps between two probes
SETTLED_STEPS = 8  # for which plain steps of as many rows are not thought over again
NEWCOMERS = 0.2  # share of the rows that is thought over at once
PLAIN_STEPS = 64  # after which a plain step shows what all costs are compared with
PROBE_SHARE = 0.01  # of the time, in plain steps, that probes may lose
PROBE_CREDIT = 0.5  # plain steps that they may lose at first
MOST_CREDIT = 1.5
STALE = 0.05  # what doubling the time since its last run adds to the appeal of a probe
GAP_STEPS = 64  # over which the closing of a gap must pay
DEPTHS = (1, 2, 4, 8, 16)
WIDTHS = (2, 3, 4)


def candidates(group: Preset) -> list[Preset]:
    """The shapes that an adaptive group may take, off first: chains and trees within its depth and width."""
    off = replace(group, depth=0, width=0, adaptive=False)
    depths = up_to(DEPTHS, group.depth)
    shapes = [off, *(replace(off, depth=depth, width=1) for depth in depths)]
    if group.method == "speculative":
        return shapes
    for width in up_to(WIDTHS, group.width):
        trees = [replace(off, depth=depth, width=width) for depth in depths]
        shapes += [tree for tree in trees if _is_tried(group, tree)]
        if group.method == "mmtad" and width == group.width > 2:
            # Half of a tree of width 4 holds most of what is accepted, at half the price of verifying it.
            shapes += [replace(tree, budget=2 * tree.depth) for tree in trees if tree.depth > 1]
    return shapes


def _is_tried(group: Preset, tree: Preset) -> bool:
    """The fewer shapes, the sooner each is known: of those in between only what a single level holds."""
    if tree.width == 1:
        return False
    if group.method == "mtad":  # the best beam of a single level is the chain
        return tree.depth > 1 and tree.width == group.width
    return tree.depth == 1 or tree.width in (2, group.width)


@dataclass(slots=True)
class _Group:
    """Where a group stands: what it runs, when each family of shapes was run, what probes may lose.

    `taken` is the shape of the last step, `settled` the step until which plain steps of `rows` go on;
    `forgone` are the tokens that `current` should have given in the time of a probe.
    """

    shapes: list[Preset]
    current: Preset
    taken: Preset
    rows: int = 0
    steps: int = 0
    settled: int = 0
    last_probe: int = 0
    credit: float = PROBE_CREDIT
    forgone: float = 0.0
    last_run: dict[Preset, int] = field(default_factory=dict)
    families: dict[Preset, Preset] = field(init=False)

    def __post_init__(self) -> None:
        self.families = {shape: _family(shape) for shape in self.shapes}

    def is_due(self, sequences: Series[Sequence]) -> bool:
        """Whether a choice is worth its time: plain steps teach nothing, and one newcomer changes little."""
        before, self.rows = self.rows, len(sequences)
        if self.current.depth or self.taken.depth:
            return True
        newcomers = sum(sequence.num_steps == 0 for sequence in sequences)
        if newcomers <= NEWCOMERS * self.rows:
            return self.steps >= self.settled
        if self.rows > before:  # often not the last one to come
            self.settled = self.steps + 1
            return False
        return True

    def age(self, shape: Preset) -> int:
        """Steps since one of its family was run."""
        return self.steps - self.last_run.get(self.families[shape], -PROBE_STEPS * PROBE_STEPS)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What a step of one shape should deliver, and its seconds; `gap_seconds` serve `horizon` steps."""

    tokens: float
    seconds: float
    gap_seconds: float
    horizon: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / (self.seconds + self.gap_seconds / self.horizon)


class Policy:
    """Chooses for all adaptive groups of an engine, and learns from every step that they take."""

    def __init__(self, costs: CostCurve) -> None:
        self._costs = costs
        self._survival = PairSurvival()
        self._drift = CostDrift()
        self._groups: dict[Preset, _Group] = {}
        self._step_costs: dict[tuple[Preset, int], float] = {}

    def choose(self, preset: Preset, sequences: Series[Sequence]) -> Preset:
        """The shape of the next step of `sequences`, all of one adaptive `preset`."""
        group = self._group(preset)
        group.steps += 1
        group.credit = min(group.credit + PROBE_SHARE, MOST_CREDIT)
        if all(sequence.remaining <= 1 for sequence in sequences):
            group.taken = group.shapes[0]  # nothing can be gained, and it says nothing of the next texts
        elif group.is_due(sequences):
            outlooks = self._outlooks(group, sequences)
            group.current = _best(group, outlooks)
            group.taken = group.current
            _probe(group, outlooks)
            group.settled = group.steps + SETTLED_STEPS
        return group.taken

    def uses_draft(self, preset: Preset) -> bool:
        """Whether sequences of an adaptive `preset` are speculating now."""
        return self._group(preset).current.depth > 0

    def note(
        self,
        preset: Preset,
        shape: Preset,
        sequences: Series[Sequence],
        accepted: Series[tuple[int, int]],
        seconds: float,
    ) -> None:
        """Learn from a step: the depth proposed and accepted of each sequence, and its wall seconds."""
        group = self._group(preset)
        group.last_run[group.families[shape]] = group.steps
        if group.forgone:
            delivered = sum(1 + num_accepted for _, num_accepted in accepted)
            group.credit -= max(group.forgone - delivered, 0.0) / len(sequences)
            group.forgone = 0.0
        for sequence, (num_drafted, num_accepted) in zip(sequences, accepted, strict=True):
            if num_drafted:
                self._of(sequence).note(shape, num_drafted, num_accepted)
        self._drift.note(shape, seconds / self._step_cost(shape, len(sequences)))

    def _step_cost(self, shape: Preset, rows: int) -> float:
        """By the curve; looked up for every shape in every step, so each is interpolated once."""
        if (shape, rows) not in self._step_costs:
            self._step_costs[shape, rows] = self._costs.step(shape, rows)
        return self._step_costs[shape, rows]

    def _group(self, preset: Preset) -> _Group:
        group = self._groups.get(preset)
        if group is None:
            shapes = candidates(preset)
            group = self._groups[preset] = _Group(shapes, shapes[0], shapes[0])
        return group

    def _of(self, sequence: Sequence) -> SequenceSurvival:
        if sequence.survival is None:
            sequence.survival = SequenceSurvival(
                self._survival, sequence.config, greedy=sequence.params.greedy
            )
        return sequence.survival

    def _outlooks(self, group: _Group, sequences: Series[Sequence]) -> dict[Preset, _Outlook]:
        """Of plain steps, of what runs, and of what would be worth more if all of it survived."""
        off, rows = group.shapes[0], len(sequences)
        plain = self._seconds(off, rows)
        worthy = [
            shape
            for shape in group.shapes[1:]
            if shape == group.current or (1 + shape.depth) * plain > self._seconds(shape, rows)
        ]
        lag = max(sequence.draft_lag for sequence in sequences)
        gap_seconds = self._costs.gap(lag, rows) if lag else 0.0
        outlooks = {shape: self._outlook(shape, sequences, gap_seconds) for shape in worthy}
        return {off: _Outlook(rows, plain, 0.0, 1.0), **outlooks}

    def _seconds(self, shape: Preset, rows: int) -> float:
        return self._step_cost(shape, rows) * self._drift.of(shape)

    def _outlook(self, shape: Preset, sequences: Series[Sequence], gap_seconds: float) -> _Outlook:
        tokens = sum(self._of(each).expected_tokens(shape, each.remaining) for each in sequences)
        steps = sum(sequence.remaining for sequence in sequences) / tokens
        seconds = self._seconds(shape, len(sequences))
        return _Outlook(tokens, seconds, gap_seconds, min(max(steps, 1.0), GAP_STEPS))


def _family(shape: Preset) -> Preset:
    """Shapes that are known once one of them is."""
    return shape if shape.budget or not shape.depth else replace(shape, depth=1)


def _best(group: _Group, outlooks: dict[Preset, _Outlook]) -> Preset:
    """The shape of highest rate, if it is worth the change; back to plain steps as soon as they are."""
    best = max(outlooks, key=lambda shape: outlooks[shape].rate)  # of equals the first, the plainest
    off, rate = group.shapes[0], outlooks[group.current].rate
    if outlooks[best].rate > HYSTERESIS * rate:
        return best
    return off if outlooks[off].rate > rate else group.current


def _probe(group: _Group, outlooks: dict[Preset, _Outlook]) -> None:
    """Take another shape for one step, if it is time to learn and what that should lose is allowed."""
    if group.steps - group.last_probe < PROBE_STEPS:
        return
    rate, plain = outlooks[group.current].rate, outlooks[group.shapes[0]].tokens

    def forgone(shape: Preset) -> float:
        """Tokens; the gap is closed for good, but whether that was of use is not known yet."""
        return (outlooks[shape].seconds + outlooks[shape].gap_seconds) * rate

    def loss(shape: Preset) -> float:
        """In plain steps."""
        return max(forgone(shape) - outlooks[shape].tokens, 0.0) / plain

    def appeal(shape: Preset) -> float:
        return outlooks[shape].rate * (1 + STALE * math.log2(group.age(shape)))

    others = [shape for shape in outlooks if group.age(shape) >= PROBE_STEPS and shape != group.current]
    affordable = [shape for shape in others if loss(shape) <= group.credit]
    off = group.shapes[0]
    if off in others and group.age(off) >= PLAIN_STEPS:
        group.taken = off
    elif affordable:
        group.taken = max(affordable, key=appeal)
    else:
        return
    group.last_probe, group.forgone = group.steps, forgone(group.taken)
