"""MTJD: the target's own most likely block, against exhaustive search and a plain beam."""

import itertools
import math
from typing import Any

import pytest
import torch

from decoding import FinishReason, ModelPair
from tests.decoding.laws import ADJUSTING, joint, likeliest_block, of_model
from tests.decoding.tiny import (
    always,
    generate,
    llama_pair,
    make_pair,
    perturbed,
    random_markov,
    request,
    scripted_pair,
    tiny_llama,
)

EOS = 0


@pytest.fixture(scope="module")
def small() -> ModelPair:
    """A Llama of 5 tokens whose laws are far from point masses."""
    return make_pair(tiny_llama(vocab_size=5, initializer_range=0.2), vocab_size=5, eos=(EOS,))


@pytest.mark.parametrize("fields", [{}, *ADJUSTING.values()], ids=["none", *ADJUSTING])
@pytest.mark.parametrize("prompt", [[1], [3, 2, 4], [2, 2, 1, 4]], ids=str)
def test_proof_02_mtjd_equals_exhaustive_search(
    prompt: list[int], fields: dict[str, Any], small: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V 5 with EOS, gamma 3, W 25 at temperature 0: every block is the likeliest of all, then the next.

    Blocks that end count with their own length. With bias, penalties and min_tokens (proof 8) the
    search is over the adjusted laws, from each node's own path.
    """
    monkeypatch.setattr("decoding.config.MAX_BEAM_WIDTH", 25)
    monkeypatch.setattr("decoding.config.MAX_TREE_NODES", 75)
    settings = {"temperature": 0, "num_speculative_tokens": 3, "beam_width": 25, "max_tokens": 11}
    sequence = request("a", prompt, "mtjd", **settings, **fields)
    text, logits = generate(small, sequence)["a"], of_model(small.target)
    delivered: list[int] = []
    for output in text.steps:
        depth = min(3, 11 - len(delivered))
        block = likeliest_block(logits, sequence, delivered, depth, (EOS,))
        assert tuple(output.token_ids) == block
        delivered += output.token_ids
    assert delivered[-1] == EOS or len(delivered) == 11


def test_proof_02_blocks_differ_from_greedy(small: ModelPair) -> None:
    """Or exhaustive search would prove nothing."""
    fields = {"temperature": 0, "max_tokens": 11, "num_speculative_tokens": 3, "ignore_eos": True}
    prompts = [[token, other] for token in range(5) for other in range(5)][:9]
    blocks = generate(small, *(request(str(p), p, "mtjd", beam_width=16, **fields) for p in prompts))
    greedy = generate(small, *(request(str(p), p, "target", **fields) for p in prompts))
    assert sum(blocks[name].token_ids[:3] != greedy[name].token_ids[:3] for name in blocks) >= 2
    logits = of_model(small.target)
    for prompt in prompts:
        name, sequence = str(prompt), request("a", prompt, "mtjd")
        found, other = (joint(logits, sequence, [], texts[name].token_ids[:3]) for texts in (blocks, greedy))
        assert found >= other - 1e-12


@pytest.mark.parametrize("temperature", [0, 1])
def test_proof_01_no_bonus_follows_a_block(temperature: float) -> None:
    """All gamma tokens are the target's own: one step delivers exactly gamma, the last what remains."""
    pair = make_pair(always(2, share=1), vocab_size=6)
    sequence = request("a", [1], "mtjd", temperature=temperature, max_tokens=10, num_speculative_tokens=4)
    text = generate(pair, sequence)["a"]
    assert [output.token_ids for output in text.steps] == [[2] * 4, [2] * 4, [2] * 2]
    assert [output.num_draft_tokens for output in text.steps] == [3, 3, 1]
    assert text.finish_reason is FinishReason.LENGTH


def test_proof_09_width_one_at_temperature_zero_is_greedy() -> None:
    pair = llama_pair(eos=(2,))
    fields = {"temperature": 0, "max_tokens": 30}
    texts = generate(
        pair,
        request("target", [3, 1, 4], "target", **fields),
        request("mtjd", [3, 1, 4], "mtjd", beam_width=1, **fields),
    )
    assert texts["mtjd"].token_ids == texts["target"].token_ids
    assert texts["mtjd"].log_probs == pytest.approx(texts["target"].log_probs, abs=1e-10)


@pytest.mark.parametrize("method", ["mtad", "mmtad"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("width", [2, 4])
def test_proof_09_draft_equal_to_target_accepts_mtjds_block(width: int, tau: float, method: str) -> None:
    """With q = p, tau < 1, temperature 0 and the same W the accepted gamma tokens are mtjd's.

    From each of the texts where a step began; the bonus then shifts the borders of blocks.
    """
    target = tiny_llama(seed=4, initializer_range=0.2)
    pair = make_pair(target, perturbed(target, 0))
    fields: dict[str, Any] = {"temperature": 0, "num_speculative_tokens": 3, "beam_width": width}
    joint_fields = {"acceptance_threshold": tau, "acceptance_reference": "draft"}
    text = generate(pair, request("a", [3, 1, 4], method, max_tokens=16, **fields, **joint_fields))["a"]
    prompt = [3, 1, 4]
    for output in text.steps:
        block = generate(pair, request("b", prompt, "mtjd", max_tokens=3, **fields))["b"].token_ids
        assert output.token_ids[:3] == block
        assert output.num_accepted_tokens == 3
        prompt = [*prompt, *output.token_ids]


def test_wider_beams_are_likelier_above_temperature_zero() -> None:
    """The likeliest of W sampled beams: mean joint log p of a block grows with W."""
    p = random_markov(6, 4)
    pair = scripted_pair(p, p, rows=201)
    means = []
    for width in (1, 2, 4, 8):
        texts = generate(
            pair,
            *(
                request(str(n), [1], "mtjd", num_speculative_tokens=3, beam_width=width, max_tokens=3, seed=n)
                for n in range(200)
            ),
        )
        means.append(sum(sum(text.log_probs) for text in texts.values()) / 200)
    assert means == sorted(means)
    assert means[-1] - means[0] > 1


@pytest.mark.parametrize("temperature", [0, 1])
def test_log_probs_are_the_targets_own_at_each_tokens_parent(temperature: float) -> None:
    """Beams change parents from level to level: a slot taken for a parent would report another's."""
    p = random_markov(6, 8)
    pair = scripted_pair(p, p)
    for seed in range(8):
        sequence = request("a", [1], "mtjd", temperature=temperature, max_tokens=13, seed=seed, top_k=5)
        text = generate(pair, sequence)["a"]
        expected = [p[a, b].log().item() for a, b in itertools.pairwise([1, *text.token_ids])]
        assert text.log_probs == pytest.approx(expected, abs=1e-10)


def test_step_with_values_that_are_not_numbers_is_marked() -> None:
    """At any level of the search, not only at its root."""
    p = random_markov(6, 8)
    pair = scripted_pair(p, p)
    script = pair.target.module.script
    pair.target.module.script = lambda ids, positions: script(ids, positions).masked_fill(
        (positions >= 3)[:, :, None], math.nan
    )
    texts = generate(
        pair,
        request("short", [1], "mtjd", max_tokens=3, num_speculative_tokens=3),
        request("long", [1, 2], "mtjd", max_tokens=3, num_speculative_tokens=3),
    )
    assert texts["short"].finish_reason is FinishReason.LENGTH
    assert texts["long"].finish_reason is FinishReason.ERROR
    assert torch.isfinite(torch.tensor(texts["short"].log_probs)).all()
