"""How deep proposals survive verification: running averages, of a pair and of each sequence."""

import math
from dataclasses import dataclass, field, replace
from typing import Self

from decoding.config import DecodingConfig, Preset

FIRST_GUESS = 0.7  # that a token of a chain survives: hopeful, so that drafting is tried before it is judged
PRIOR_STEPS = 3.0  # what that weighs
KIN_STEPS = 8.0  # what is known of a pair's other shapes weighs for one
PAIR_STEPS = 16.0  # what the pair's averages weigh for one sequence
PAIR_MEMORY = 512.0  # steps after which an observation counts little
SEQUENCE_MEMORY = 64.0
EDITION_STEPS = 64  # after which sequences look anew at what is known of the pair
MAX_TABLES = 256


@dataclass(slots=True)
class Survival:
    """Steps that reached each depth, and those whose token there survived: decaying counts by depth."""

    memory: float
    reached: list[float] = field(default_factory=list)
    survived: list[float] = field(default_factory=list)

    def note(self, num_drafted: int, num_accepted: int, miss: float = 1.0) -> None:
        """Take over a step; the end of a path counts as `miss` tokens that did not survive."""
        missing = num_drafted - len(self.reached)
        self.reached += [0.0] * missing
        self.survived += [0.0] * missing
        kept = 1 - 1 / self.memory
        for depth in range(min(num_drafted, num_accepted + 1)):
            self.reached[depth] = self.reached[depth] * kept + 1
            self.survived[depth] = self.survived[depth] * kept + (1 if num_accepted > depth else 1 - miss)

    def chances(self, prior: list[float], weight: float) -> list[float]:
        """Chance of each depth to survive once the one above has; `prior` counts as `weight` steps."""
        return [self.chance(depth, chance, weight) for depth, chance in enumerate(prior)]

    def chance(self, depth: int, prior: float, weight: float) -> float:
        if depth >= len(self.reached):
            return prior
        return (weight * prior + self.survived[depth]) / (weight + self.reached[depth])


@dataclass(frozen=True, slots=True)
class Family:
    """Shapes whose survival is one: what a depth sees does not hang on how many lie below it.

    Not so with a node budget, which all depths compete for.
    """

    preset: Preset
    reference: str
    threshold: float
    greedy: bool

    @classmethod
    def of(cls, preset: Preset, config: DecodingConfig, *, greedy: bool) -> Self:
        shape = Preset(
            preset.method,
            preset.depth if preset.budget else 0,
            preset.width,
            preset.acceptance,
            budget=preset.budget,
        )
        if preset.method == "speculative":
            return cls(shape, "", 0.0, greedy)
        return cls(shape, config.acceptance_reference, config.acceptance_threshold, greedy)

    @property
    def kin(self) -> Self:
        """What stands for all families that differ in their shapes only."""
        return replace(self, preset=replace(self.preset, depth=0, width=0, budget=0))

    @property
    def spread(self) -> float:
        """How many times as often a chain's token misses: alternatives fail together more often than not."""
        preset = self.preset
        return math.sqrt(max(preset.budget / preset.depth if preset.budget else preset.width, 1))


class PairSurvival:
    """The averages of one pair over all sequences, which each sequence's own start from.

    What a family has not shown yet is guessed from all of its kin, a depth from the one above it.
    """

    def __init__(self) -> None:
        self._tables: dict[Family, Survival] = {}
        self._num_notes = 0

    @property
    def edition(self) -> int:
        """Changes with what is known: often at first, when every step tells much."""
        return self._num_notes.bit_length() + self._num_notes // EDITION_STEPS

    def chances(self, family: Family, depth: int) -> list[float]:
        kin, table = self._tables.get(family.kin), self._tables.get(family)
        chances: list[float] = []
        guess, spread = FIRST_GUESS, family.spread
        for place in range(depth):
            guess = guess if kin is None else max(kin.chance(place, guess, PRIOR_STEPS), 0.0)
            chances.append(1 - (1 - guess) / spread)
        return chances if table is None else table.chances(chances, KIN_STEPS)

    def note(self, family: Family, num_drafted: int, num_accepted: int) -> None:
        self._num_notes += 1
        for each, miss in ((family.kin, family.spread), (family, 1.0)):
            table = self._tables.pop(each, None) or Survival(PAIR_MEMORY)
            table.note(num_drafted, num_accepted, miss)
            self._tables[each] = table  # last in order: those that nobody uses any more are forgotten first
        while len(self._tables) > MAX_TABLES:
            del self._tables[next(iter(self._tables))]


class SequenceSurvival:
    """What one sequence's steps are expected to deliver, by shape."""

    def __init__(self, pair: PairSurvival, config: DecodingConfig, *, greedy: bool) -> None:
        self._pair, self._config, self._greedy = pair, config, greedy
        self._families: dict[Preset, Family] = {}
        self._own: dict[Family, Survival] = {}
        self._expected: dict[Family, list[float]] = {}
        self._edition = 0

    def expected_tokens(self, preset: Preset, remaining: int) -> float:
        """Tokens of one step, the target's own included, where at most `remaining` may follow."""
        depth = min(preset.depth, remaining - 1)
        if depth <= 0:
            return 1.0
        if self._edition != self._pair.edition:
            self._edition = self._pair.edition
            self._expected.clear()
        family = self._family(preset)
        expected = self._expected.get(family, [])
        if len(expected) <= depth:
            expected = self._expected[family] = self._cumulated(family, preset.depth)
        return expected[depth]

    def note(self, preset: Preset, num_drafted: int, num_accepted: int) -> None:
        """Take over one step of this sequence."""
        family = self._family(preset)
        self._pair.note(family, num_drafted, num_accepted)
        self._own.setdefault(family, Survival(SEQUENCE_MEMORY)).note(num_drafted, num_accepted)
        self._expected.pop(family, None)

    def _family(self, preset: Preset) -> Family:
        family = self._families.get(preset)
        if family is None:
            family = self._families[preset] = Family.of(preset, self._config, greedy=self._greedy)
        return family

    def _cumulated(self, family: Family, depth: int) -> list[float]:
        """Expected tokens of a step by its depth, from 0."""
        chances = self._pair.chances(family, depth)
        own = self._own.get(family)
        if own is not None:
            chances = own.chances(chances, PAIR_STEPS)
        expected, alive = [1.0], 1.0
        for chance in chances:
            alive *= chance
            expected.append(expected[-1] + alive)
        return expected
