"""The choice of a step's shape, on made-up costs and made-up acceptance: no model, no clock."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from decoding import DecodingConfig, SamplingParams, Sequence
from decoding.config import Preset
from decoding.cost_curve import CATCH_UP, DRAFT, GAP, TARGET, CostCurve
from decoding.draft_gap import GAP_TOKENS
from decoding.policy import (
    MOST_CREDIT,
    PROBE_SHARE,
    PROBE_STEPS,
    SETTLED_STEPS,
    Policy,
    candidates,
)
from decoding.survival import Family

GROUP = DecodingConfig(adaptive=True).preset
OFF = candidates(GROUP)[0]
CHAIN = Preset("mmtad", 1, 1)
Chance = Callable[[Preset, int], float]  # shape and depth to the chance that its token there survives


def curve(per_node: float = 0.1, per_draft_pass: float = 0.2) -> CostCurve:
    """A pass of the target over n nodes takes 1 + per_node * (n - 1), one of the draft its part of that."""

    def points(rows: int, tokens: tuple[int, ...], unit: float) -> list[tuple[int, float]]:
        return [(count, unit * (1 + per_node * (rows * count - 1))) for count in tokens]

    sizes, draft = (1, 4, 16), per_draft_pass
    return CostCurve(
        {
            TARGET: {rows: points(rows, (1, 2, 17), 1) for rows in sizes},
            DRAFT: {rows: points(rows, (1, 4), draft) for rows in sizes},
            CATCH_UP: {rows: [(2, draft * (1 + per_node * (rows - 1)))] for rows in sizes},
            GAP: {rows: [(GAP_TOKENS, 5 * draft * (1 + per_node * (rows - 1)))] for rows in sizes},
        }
    )


class Run:
    """Plays the engine's part: rows that deliver what `chance` lets survive, at the price of `costs`."""

    def __init__(
        self, costs: CostCurve, chance: Chance, group: Preset = GROUP, seed: int = 0, noise: float = 0.0
    ) -> None:
        self.noise = noise
        self.policy, self.costs, self.chance, self.group = Policy(costs), costs, chance, group
        self.random = random.Random(seed)
        self.seconds = self.tokens = 0.0
        self.shapes: list[Preset] = []

    def sequences(self, rows: int, max_tokens: int = 100_000) -> list[Sequence]:
        config = DecodingConfig(self.group.method, adaptive=True)  # type: ignore[arg-type]
        return [Sequence(str(n), [1], SamplingParams(max_tokens=max_tokens), config) for n in range(rows)]

    def steps(self, sequences: list[Sequence], count: int) -> "Run":
        for _ in range(count):
            self.step(sequences)
        return self

    def step(self, sequences: list[Sequence]) -> None:
        shape = self.policy.choose(self.group, sequences)
        rows, seconds = len(sequences), self.costs.step(shape, len(sequences))
        if shape.depth:
            self.seconds += self.costs.gap(max(each.draft_lag for each in sequences), rows)
        accepted = []
        for sequence in sequences:
            limit = min(shape.depth, sequence.remaining - 1)
            survived = next(
                (depth for depth in range(limit) if self.random.random() >= self.chance(shape, depth)), limit
            )
            accepted.append((limit, survived))
            sequence.num_steps += 1
            sequence.output_ids += [0] * (survived + 1)
            sequence.draft_lag = 0 if shape.depth else sequence.draft_lag + survived + 1
            self.tokens += survived + 1
        self.policy.note(
            self.group, shape, sequences, accepted, seconds * self.random.lognormvariate(0, self.noise)
        )
        self.seconds += seconds
        self.shapes.append(shape)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def never(shape: Preset, depth: int) -> float:
    return 0.0


def always(shape: Preset, depth: int) -> float:
    return 1.0


def weak(shape: Preset, depth: int) -> float:
    return {1: 0.35, 2: 0.5, 3: 0.55, 4: 0.6}[shape.width]


def test_shapes_are_off_chains_and_trees() -> None:
    shapes = candidates(GROUP)
    assert (shapes[0].name, shapes[0].step_method) == ("mmtad-off", "target")
    assert [shape.name for shape in shapes if shape.width == 1] == ["mmtad-1x1", "mmtad-2x1", "mmtad-4x1"]
    assert {shape.width for shape in shapes[1:]} == {1, 2, 3, 4}
    assert [shape.name for shape in shapes if shape.budget] == ["mmtad-2x4-best4", "mmtad-4x4-best8"]
    assert len(set(shapes)) == len(shapes)
    assert not any(shape.adaptive for shape in shapes)
    chains = candidates(DecodingConfig("speculative", adaptive=True, acceptance="block").preset)
    assert [shape.name for shape in chains] == [
        "speculative-off-block",
        "speculative-1x1-block",
        "speculative-2x1-block",
        "speculative-4x1-block",
    ]
    beams = candidates(DecodingConfig("mtad", adaptive=True).preset)
    assert [shape.name for shape in beams[4:]] == ["mtad-2x4", "mtad-4x4"]


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (3, 1), (1, 4), (3, 8), (16, 4)])
def test_shapes_stay_within_the_numbers_given(depth: int, width: int) -> None:
    for method in ("speculative", "mtad", "mmtad"):
        shapes = candidates(Preset(method, depth, width, adaptive=True))
        assert max(shape.depth for shape in shapes) == depth
        assert max(shape.width for shape in shapes) == (
            width if method == "mmtad" else max(shape.width for shape in shapes)
        )
        assert all(shape.width <= width and shape.num_nodes <= 1 + depth * width for shape in shapes)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("chance", [never, weak, always])
def test_never_slower_than_plain_steps_by_more_than_probing(chance: Chance, rows: int) -> None:
    """First tries apart, which a hopeful guess costs once, at most what probes may lose is lost."""
    run = Run(curve(), chance)
    sequences = run.sequences(rows)
    run.steps(sequences, 60)
    plain_rate = rows / run.costs.step(OFF, rows)
    first_loss = run.seconds * plain_rate / rows - run.tokens / rows  # in plain steps
    assert first_loss < 40
    run.seconds = run.tokens = 0.0
    run.steps(sequences, 500)
    lost = run.seconds * plain_rate / rows - run.tokens / rows
    assert lost <= PROBE_SHARE * 500 + MOST_CREDIT
    assert run.rate >= 0.97 * plain_rate


def test_good_draft_is_used_to_the_full_and_a_bad_one_left_alone() -> None:
    good = Run(curve(), always)
    good.steps(good.sequences(1), 200)
    assert Counter(good.shapes[100:]).most_common(1)[0][0].depth == 4
    bad = Run(curve(), never)
    bad.steps(bad.sequences(1), 300)
    assert Counter(bad.shapes[100:])[OFF] > 180


def test_choice_follows_the_load() -> None:
    """Verification is nearly free for one row and not for sixteen."""
    run = Run(curve(per_draft_pass=0.05), weak)
    rows = run.sequences(16)
    run.steps(rows[:1], 300)
    alone = Counter(run.shapes[150:])
    run.shapes.clear()
    run.steps(rows, 300)
    together = Counter(run.shapes[50:])
    assert alone[OFF] < 75
    assert together[OFF] > 200
    run.shapes.clear()
    run.steps(rows[:1], 300)
    assert Counter(run.shapes[150:])[OFF] < 75


def test_what_cannot_pay_is_never_tried() -> None:
    """Two tokens of a row cost more than two plain steps: not even a draft that is always right helps."""
    run = Run(curve(per_node=1.0), always)
    run.steps(run.sequences(16), 300)
    assert set(run.shapes) == {OFF}


def test_plain_steps_are_not_thought_over_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(curve(), never)
    sequences = run.sequences(16)
    run.steps(sequences, 100)
    thought: list[int] = []
    consider = Policy._outlooks

    def counted(policy: Policy, group: Any, rows: Any) -> Any:
        thought.append(group.steps)
        return consider(policy, group, rows)

    monkeypatch.setattr(Policy, "_outlooks", counted)
    run.shapes.clear()
    run.steps(sequences, 160)
    probes = len(run.shapes) - run.shapes.count(OFF)
    assert 160 / SETTLED_STEPS <= len(thought) <= 160 / SETTLED_STEPS + 2 * probes + 1
    run.step(run.sequences(16))  # of other texts: those may be easier
    assert thought[-1] == run.policy._group(GROUP).steps


def test_drafting_waits_for_those_who_still_come() -> None:
    """A batch that fills by a row per step starts to draft when it is full, if that pays there."""
    run = Run(curve(per_draft_pass=0.05), always)
    rows = run.sequences(4)
    for count in range(1, 5):
        run.step(rows[:count])
    assert run.shapes == [OFF] * 4
    run.steps(rows, 2)
    assert run.shapes[-1].depth


def test_the_last_token_of_a_text_says_nothing_of_the_next_one() -> None:
    run = Run(curve(), always)
    run.steps(run.sequences(1), 60)
    assert run.policy.uses_draft(GROUP)
    (last,) = run.sequences(1, max_tokens=1)
    run.step([last])
    assert run.shapes[-1] == OFF
    assert run.policy.uses_draft(GROUP)
    run.step(run.sequences(1))
    assert run.shapes[-1].depth


@pytest.mark.parametrize(("chance", "charged"), [(never, True), (always, False)])
def test_a_probe_is_charged_what_it_lost(chance: Chance, charged: bool) -> None:
    """Not what it was believed to lose, which is next to nothing here."""
    run = Run(shallow(0.98), chance)
    policy_sees_it_right(run)
    run.steps(run.sequences(1), PROBE_STEPS - 1)
    assert set(run.shapes) == {OFF}
    group = run.policy._group(GROUP)
    before = group.credit
    run.step(run.sequences(1))
    assert run.shapes[-1] == CHAIN
    assert (group.credit < before - 0.3) is charged


def test_a_machine_that_comes_and_goes_changes_no_choice() -> None:
    """One step that took twice as long as those before it is no verdict on its shape."""
    shares = []
    for seed in range(8):
        run = Run(curve(per_draft_pass=0.05), weak, seed=seed, noise=0.4)
        rows = run.sequences(16)
        for count in (1, 2, 4, 8):
            run.steps(rows[:count], 60)
        run.shapes.clear()
        run.steps(rows, 150)
        shares.append(run.shapes[30:].count(OFF) / 120)
    assert min(shares) > 0.9


def shallow(worth: float) -> CostCurve:
    """Chains of one token, half of which survive, are `worth` plain steps; deeper ones cost a fortune."""
    return CostCurve(
        {
            TARGET: {1: [(1, 1.0), (2, 1.0), (3, 9.0), (17, 99.0)]},
            DRAFT: {1: [(1, 9.0)]},
            CATCH_UP: {1: [(2, 1.5 / worth - 1)]},
            GAP: {1: [(GAP_TOKENS, 0.01)]},
        }
    )


@pytest.mark.parametrize(("worth", "expected"), [(0.95, OFF), (1.03, OFF), (1.15, CHAIN)])
def test_a_small_advantage_changes_nothing(worth: float, expected: Preset) -> None:
    run = Run(shallow(worth), lambda shape, depth: 0.5)
    policy_sees_it_right(run)
    run.steps(run.sequences(1), 600)
    assert Counter(run.shapes[300:]).most_common(1)[0][0] == expected


def policy_sees_it_right(run: Run) -> None:
    """As after a long time: what is known of the pair weighs more than any stretch of luck."""
    family = Family.of(CHAIN, DecodingConfig(adaptive=True), greedy=False)
    for number in range(4000):
        run.policy._survival.note(family, 1, number % 2)
