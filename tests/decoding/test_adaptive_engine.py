"""Shapes that change from step to step in the engine: texts, caches, and what is told of them."""

import itertools
from typing import Any

import pytest
import torch

from decoding import DecodingConfig, Engine, ModelPair, Retreat, Sequence
from decoding.config import Preset
from decoding.cost_curve import KINDS, CostCurve
from decoding.model import CausalModel
from decoding.policy import Policy, candidates
from tests.decoding.tiny import Text, drain, generate, llama_pair, plain, request

METHODS = ("speculative", "mtad", "mmtad")
COSTS = CostCurve({kind: {1: [(1, 1.0)]} for kind in KINDS})


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return llama_pair()


class Scripted(Policy):
    """Takes the shapes of a list in turn, so that every change happens, off in every third step or longer."""

    def __init__(self, starts_off: bool = False) -> None:
        super().__init__(COSTS)
        self.starts_off = starts_off
        self.taken: list[Preset] = []
        self.turns: dict[Preset, Any] = {}

    def uses_draft(self, preset: Preset) -> bool:
        return not self.starts_off

    def choose(self, preset: Preset, sequences: Any) -> Preset:
        super().choose(preset, sequences)
        off, *others = candidates(preset)
        stretches = itertools.cycle((1, 3, 2))
        order = ([other] + [off] * next(stretches) for other in itertools.cycle(others))
        turns = self.turns.setdefault(preset, itertools.chain.from_iterable(order))
        self.taken.append(next(turns))
        return self.taken[-1]


def adaptive(name: str, prompt: list[int], method: str, **fields: Any) -> Sequence:
    return request(name, prompt, method, adaptive=True, **fields)


def decode(pair: ModelPair, policy: Policy, sequences: list[Sequence], **settings: Any) -> dict[str, Text]:
    engine = Engine(pair, 8, policy=policy, **settings)
    for sequence in sequences:
        engine.add(sequence)
    return drain(engine, check=True)


@pytest.mark.parametrize("starts_off", [False, True])
def test_greedy_text_of_a_lossless_method_is_the_targets(starts_off: bool, pair: ModelPair) -> None:
    prompts = {"a": [3, 1, 4, 1, 5], "b": [2], "c": [7, 2, 9], "d": [9, 9]}
    fields: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    policy = Scripted(starts_off)
    found = decode(pair, policy, [adaptive(*each, "speculative", **fields) for each in prompts.items()])
    expected = generate(pair, *(request(*each, "target", **fields) for each in prompts.items()))
    assert {name: found[name].token_ids for name in prompts} == {
        name: expected[name].token_ids for name in prompts
    }
    assert len(set(policy.taken)) == 4


def columns(model: CausalModel, row: int, count: int) -> torch.Tensor:
    return model.cache.storage[:, :, row, :, :count].clone()


@pytest.mark.parametrize("starts_off", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_proof_05_caches_equal_recomputation_across_changes_of_shape(
    method: str, starts_off: bool, pair: ModelPair
) -> None:
    """Off, tree, off: whenever a step has proposed, both caches are those of a plain prefill.

    The draft's last committed column may be missing, as always: every proposal runs it again.
    """
    policy = Scripted(starts_off)
    engine = Engine(pair, 8, policy=policy)
    fields = [{"max_tokens": 60 - 9 * n, "seed": n, "ignore_eos": True} for n in range(4)]
    sequences = [adaptive(str(n), [n + 2] * (n + 1), method, **each) for n, each in enumerate(fields)]
    for sequence in sequences:
        engine.add(sequence)
    compared = 0
    while engine.has_work():
        engine.step()
        engine.check_integrity()
        if not policy.taken or not policy.taken[-1].depth:
            continue
        for row in range(engine.num_running):
            sequence = engine._rows.sequences[row]
            cached = (sequence.prompt_ids + sequence.output_ids)[:-1]
            for model, count in ((pair.target, len(cached)), (pair.draft, len(cached) - 1)):
                assert model is not None
                found = columns(model, row, count)
                model.cache.clear_row(9)
                model.prefill(9, cached)
                torch.testing.assert_close(found, columns(model, 9, count), rtol=1e-9, atol=1e-9)
                model.cache.clear_row(9)
                compared += 1
    assert compared > 40
    assert len(set(policy.taken)) == len(candidates(DecodingConfig(method, adaptive=True).preset))  # type: ignore[arg-type]


class Always(Policy):
    """Takes one shape for all steps: the first one, off, or the last."""

    def __init__(self, place: int) -> None:
        super().__init__(COSTS)
        self.place = place

    def uses_draft(self, preset: Preset) -> bool:
        return self.place != 0

    def choose(self, preset: Preset, sequences: Any) -> Preset:
        return candidates(preset)[self.place]


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(("place", "blamed"), [(0, False), (-1, True)])
def test_draft_is_blamed_only_for_what_it_had_a_part_in(
    place: int, blamed: bool, running: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that is prefilled, or a step, while the draft is off says nothing of the draft."""
    pair = llama_pair()
    engine = Engine(pair, 8, policy=Always(place))
    engine.add(adaptive("a", [3, 1, 4], "mmtad", max_tokens=9, ignore_eos=True))
    if running:
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(pair.target, "forward" if running else "prefill", None)  # calling it raises
        with pytest.raises(TypeError) as raised:
            engine.step()
    retreat = engine.retreat(raised.value)
    assert retreat == (Retreat("draft_failed", []) if blamed else None)
    engine.check_integrity()


def test_log_probs_are_the_targets_across_changes_of_shape(pair: ModelPair) -> None:
    sequence = adaptive("a", [3, 1, 4], "mmtad", max_tokens=50, seed=5, ignore_eos=True)
    text = decode(pair, Scripted(), [sequence])["a"]
    law = plain(pair.target, [3, 1, 4, *text.token_ids])
    expected = [law[2 + place, token].item() for place, token in enumerate(text.token_ids)]
    assert text.log_probs == pytest.approx(expected, abs=1e-6)


def test_outputs_and_statistics_name_the_shape(pair: ModelPair) -> None:
    policy = Scripted()
    engine = Engine(pair, 8, policy=policy)
    engine.add(adaptive("a", [3, 1, 4], "mmtad", max_tokens=20, ignore_eos=True))
    while engine.has_work():
        outputs = engine.step()
        shape = policy.taken[-1]
        assert [output.preset for output in outputs] == [shape.name]
        assert (engine.last_step.method, engine.last_step.preset) == ("mmtad", shape.name)
        assert outputs[0].num_draft_nodes == (shape.num_nodes - 1 if shape.depth else 0)
        assert shape.depth or (outputs[0].num_draft_tokens, len(outputs[0].token_ids)) == (0, 1)


def test_without_a_policy_the_configs_own_numbers_are_used(pair: ModelPair) -> None:
    engine = Engine(pair, 8)
    engine.add(adaptive("a", [3, 1, 4], "mmtad", max_tokens=20))
    engine.step()
    assert engine.last_step.preset == "mmtad-4x4"


def test_rows_with_own_numbers_are_left_alone(pair: ModelPair) -> None:
    """Fixed and adaptive rows of one method run beside each other; the fixed ones keep their texts."""
    fixed = request("fixed", [3, 1, 4], "mmtad", max_tokens=30, seed=7)
    alone = generate(pair, request("fixed", [3, 1, 4], "mmtad", max_tokens=30, seed=7))["fixed"]
    texts = decode(pair, Scripted(), [adaptive("a", [3, 1, 4], "mmtad", max_tokens=30), fixed])
    assert texts["fixed"].token_ids == alone.token_ids
    assert {step.preset for step in texts["fixed"].steps} == {"mmtad-4x4"}


def test_prompt_is_not_run_by_a_draft_that_is_off(pair: ModelPair) -> None:
    """It is run once the draft is wanted, however long it is."""
    assert pair.draft is not None
    prompt = [token % 20 + 2 for token in range(70)]
    engine = Engine(pair, 8, policy=Scripted(starts_off=True))
    engine.add(adaptive("a", prompt, "mmtad", max_tokens=20, ignore_eos=True))
    pair.draft.timer.take()
    engine._admit()
    assert pair.draft.timer.take() == []
    assert pair.draft.cache.lengths[0] == 0
    drain(engine, check=True)
