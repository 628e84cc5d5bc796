"""Exact joint decoding finds the block that enumerating every block finds."""

import itertools

import pytest
import torch

from benchmarks.baselines import repetition
from benchmarks.exact import BLOCK, exact_mtjd
from benchmarks.generation import Generation, score
from decoding import ModelPair, SamplingParams
from decoding.sampler import RowSampling, to_log_probs
from tests.decoding.tiny import CPU, make_pair, plain, random_markov, scripted_pair, tiny_llama


def enumerated(pair: ModelPair, prompt: list[int], params: SamplingParams, vocab: int) -> list[int]:
    """The likeliest block by plain recomputation of all of them, cut at its end."""
    best, found = [], -float("inf")
    sampling = RowSampling.of([params], vocab, CPU)

    def law(ids: list[int]) -> torch.Tensor:
        return to_log_probs(plain(pair.target, ids)[-1][None, None], sampling, point_mass=False)[0, 0]

    for first, second in itertools.product(range(vocab), repeat=2):
        total, block = float(law(prompt)[first]), [first]
        if first not in pair.eos_token_ids:
            total, block = total + float(law([*prompt, first])[second]), [first, second]
            if second not in pair.eos_token_ids:
                value, third = law([*prompt, first, second]).max(0)
                total, block = total + float(value), [first, second, int(third)]
        if total > found:
            best, found = block, total
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("eos", [(), (3,)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_are_the_likeliest(seed: int, eos: tuple[int, ...], temperature: float) -> None:
    vocab = 7
    pair = make_pair(tiny_llama(seed, vocab_size=vocab), vocab_size=vocab, eos=eos)
    params = SamplingParams(6, temperature, top_k=4, top_p=0.8)
    prompts = [[1, 2], [4], [5, 6, 0]]
    for prompt, result in zip(prompts, exact_mtjd(pair, prompts, params, batch=2), strict=True):
        expected = enumerated(pair, prompt, params, vocab)
        assert result.token_ids[: len(expected)] == expected
        if len(expected) == BLOCK and expected[-1] not in eos:
            again = enumerated(pair, prompt + expected, params, vocab)
            assert result.token_ids[BLOCK : BLOCK + len(again)] == again


def test_a_block_beats_or_equals_greedy_choices() -> None:
    probs = random_markov(6, seed=1)
    pair = scripted_pair(probs, probs)
    (block,) = exact_mtjd(pair, [[2]], SamplingParams(BLOCK, 0.0), batch=1)
    greedy = [2]
    for _ in range(BLOCK):
        greedy.append(int(probs[greedy[-1]].argmax()))
    assert sum(score(pair, [2], block.token_ids)) >= sum(score(pair, [2], greedy[1:])) - 1e-12


def test_texts_stop_at_their_ends_and_at_the_most_tokens() -> None:
    vocab = 7
    pair = make_pair(tiny_llama(vocab_size=vocab), vocab_size=vocab, eos=(3,))
    (result,) = exact_mtjd(pair, [[1, 2]], SamplingParams(8, 0.0), batch=1)
    assert result.ended == (3 in result.token_ids)
    assert len(result.token_ids) <= 8
    assert 3 not in result.token_ids[:-1]


def test_repetition_keeps_lengths() -> None:
    (text,) = repetition([Generation(list(range(20)))])
    assert text.token_ids == [*range(8), *range(8), 0, 1, 2, 3]
