"""Synthetic acceptance keeps what it is told to, in every method, and the served rules come back."""

import pytest

from benchmarks.generation import generate
from benchmarks.synthetic import Acceptance, synthetic_acceptance
from decoding import DecodingConfig, SamplingParams
from decoding.methods import multi_candidate, speculative, step
from tests.decoding.tiny import make_pair, tiny_llama

PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize("block_efficiency", [1.0, 2.0, 2.25, 4.0])
def test_depths_have_the_mean_and_differ_by_one_at_most(block_efficiency: float) -> None:
    acceptance = Acceptance(block_efficiency)
    depths = [acceptance.depth() for _ in range(40)]
    assert sum(depths) == pytest.approx(40 * (block_efficiency - 1), abs=1)
    assert max(depths) - min(depths) <= 1


@pytest.mark.parametrize("method", ["speculative", "multi_candidate", "mtad", "mmtad"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_method_keeps_what_it_is_told(method: str, temperature: float) -> None:
    pair = make_pair(tiny_llama(), tiny_llama(1))
    config = DecodingConfig(method=method, candidates_per_level=(3, 2, 1, 1))  # type: ignore[arg-type]
    params = SamplingParams(60, temperature, top_k=3, ignore_eos=True)
    with synthetic_acceptance(3):
        results, _ = generate(pair, PROMPTS, params, config, batch=2)
    assert [(len(each.token_ids), each.num_steps) for each in results] == [(60, 20), (60, 20)]
    assert all(set(each.accepted[:-1]) == {2} for each in results)


def test_the_served_rules_come_back() -> None:
    served = (step.longest_joint_prefix, dict(speculative.VERIFIERS), multi_candidate.MultiCandidate._descend)  # type: ignore[attr-defined]
    with synthetic_acceptance(2):
        assert step.longest_joint_prefix != served[0]  # type: ignore[attr-defined]
    assert served == (
        step.longest_joint_prefix,  # type: ignore[attr-defined]
        speculative.VERIFIERS,
        multi_candidate.MultiCandidate._descend,
    )


def test_less_than_one_token_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"), synthetic_acceptance(0.5):
        pass
