"""How deep proposals survive verification: running averages, of a pair and of each sequence."""

from dataclasses import dataclass, field
from typing import Self

from decoding.config import DecodingConfig, Preset

PRIOR_STEPS = 3.0  # what the first guess of a pair weighs
PAIR_STEPS = 16.0  # what the pair's averages weigh for one sequence
PAIR_MEMORY = 512.0  # steps after which an observation counts little
SEQUENCE_MEMORY = 64.0
MAX_TABLES = 256


@dataclass(slots=True)
class Survival:
    """Steps that reached each depth, and those whose token there survived: decaying counts by depth."""

    memory: float
    reached: list[float] = field(default_factory=list)
    survived: list[float] = field(default_factory=list)

    def note(self, num_drafted: int, num_accepted: int) -> None:
        missing = num_drafted - len(self.reached)
        self.reached += [0.0] * missing
        self.survived += [0.0] * missing
        kept = 1 - 1 / self.memory
        for depth in range(min(num_drafted, num_accepted + 1)):
            self.reached[depth] = self.reached[depth] * kept + 1
            self.survived[depth] = self.survived[depth] * kept + (num_accepted > depth)

    def chances(self, prior: list[float], weight: float) -> list[float]:
        """Chance of each depth to survive once the one above has; `prior` counts as `weight` steps."""
        known = len(self.reached)
        return [
            (weight * chance + (self.survived[depth] if depth < known else 0.0))
            / (weight + (self.reached[depth] if depth < known else 0.0))
            for depth, chance in enumerate(prior)
        ]


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

    def first_guess(self, depth: int) -> list[float]:
        """Hopeful, so that everything promising is tried before it is judged."""
        return [1 - 0.3 / max(self.preset.width, 1)] * depth


class PairSurvival:
    """The averages of one pair over all sequences, which each sequence's own start from."""

    def __init__(self) -> None:
        self._tables: dict[Family, Survival] = {}

    def chances(self, family: Family, depth: int) -> list[float]:
        table = self._tables.get(family)
        prior = family.first_guess(depth)
        return prior if table is None else table.chances(prior, PRIOR_STEPS)

    def note(self, family: Family, num_drafted: int, num_accepted: int) -> None:
        table = self._tables.pop(family, None) or Survival(PAIR_MEMORY)
        table.note(num_drafted, num_accepted)
        self._tables[family] = table  # last in order: those that nobody uses any more are forgotten first
        if len(self._tables) > MAX_TABLES:
            del self._tables[next(iter(self._tables))]


class SequenceSurvival:
    """What one sequence's steps are expected to deliver, by shape."""

    def __init__(self, pair: PairSurvival, config: DecodingConfig, *, greedy: bool) -> None:
        self._pair, self._config, self._greedy = pair, config, greedy
        self._families: dict[Preset, Family] = {}
        self._own: dict[Family, Survival] = {}
        self._expected: dict[Family, list[float]] = {}

    def expected_tokens(self, preset: Preset, remaining: int) -> float:
        """Tokens of one step, the target's own included, where at most `remaining` may follow."""
        depth = min(preset.depth, remaining - 1)
        if depth <= 0:
            return 1.0
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
