"""Transforms against a plain loop, inverse CDF, and the counter-based random numbers."""

import math
import random

import pytest
import torch
from torch import Tensor

from decoding import SamplingParams, sampler
from decoding.sampler import (
    Draw,
    RowSampling,
    gumbel,
    likeliest,
    sample,
    step_streams,
    to_log_probs,
    uniforms,
)
from tests.decoding.tiny import CPU

SMALLEST, LARGEST = 2.0**-53, 1 - 2.0**-53


def sampling_of(*params: SamplingParams, vocab_size: int) -> RowSampling:
    return RowSampling.of(params, vocab_size, CPU)


def transformed(logits: list[float], params: SamplingParams) -> list[float]:
    """The transforms of decoding.md section 1 one after the other, each on the renormalised result."""
    if params.temperature >= 1e-5:
        logits = [value / params.temperature for value in logits]
    probs = [math.exp(value - max(logits)) for value in logits]
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    kept = [token for token in order if probs[token] > 0]
    if params.temperature >= 1e-5:
        if params.top_k > 0:
            kept = kept[: params.top_k]
        total, mass, nucleus = sum(probs[token] for token in kept), 0.0, []
        for token in kept:
            if not nucleus or mass < params.top_p:
                nucleus.append(token)
            mass += probs[token] / total
        kept = [token for token in nucleus if probs[token] >= params.min_p * probs[order[0]]]
    total = sum(probs[token] for token in kept)
    return [math.log(probs[token] / total) if token in kept else -math.inf for token in range(len(probs))]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.0, 2.0]),
        top_k=rng.choice([-1, 0, 1, 2, 5, 100]),
        top_p=rng.choice([0.0, 0.3, 0.75, 1.0, 1.0]),
        min_p=rng.choice([0.0, 0.0, 0.125, 1.0]),
    )


@pytest.mark.parametrize("seed", range(30))
def test_transforms_equal_a_plain_loop_in_a_mixed_batch(seed: int) -> None:
    """Guards the order of the transforms, and a row's filters reaching its neighbours."""
    rng = random.Random(seed)
    params = [random_params(rng) for _ in range(6)]
    logits = 3 * torch.randn(6, 2, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    found = to_log_probs(logits, sampling_of(*params, vocab_size=11), point_mass=False)
    expected = [
        [transformed(node, p) for node in row] for row, p in zip(logits.tolist(), params, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.equal(logits, before)


def test_greedy_rows_are_point_masses_only_where_asked() -> None:
    """Joint methods need the log-softmax at temperature 0, lossless ones the point mass at the argmax."""
    logits = torch.tensor([[[1.0, 3.0, 3.0, 0.0]], [[1.0, 3.0, 3.0, 0.0]]])
    greedy = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=1)
    sampling = sampling_of(greedy, SamplingParams(), vocab_size=4)
    masses = to_log_probs(logits, sampling, point_mass=True)
    assert masses[0, 0].tolist() == [-math.inf, 0, -math.inf, -math.inf]
    assert torch.equal(masses[1], logits[1].log_softmax(-1))
    assert torch.equal(to_log_probs(logits, sampling, point_mass=False), logits.log_softmax(-1))


@pytest.mark.parametrize("other", [SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=20)])
def test_ties_at_a_filter_go_to_the_lower_token_whatever_the_neighbour(other: SamplingParams) -> None:
    """Half-precision logits tie often; a tie broken by another row's filter would couple their texts."""
    logits = torch.zeros(2, 1, 200)
    logits[:, :, 150:180] = 1
    mixed = to_log_probs(
        logits, sampling_of(SamplingParams(top_k=3), other, vocab_size=200), point_mass=False
    )
    assert mixed[0, 0].isfinite().nonzero().flatten().tolist() == [150, 151, 152]


def test_top_p_zero_keeps_the_likeliest_token() -> None:
    log_probs = to_log_probs(
        torch.tensor([[[0.0, 2.0, 1.0]]]),
        sampling_of(SamplingParams(top_p=0), vocab_size=3),
        point_mass=False,
    )
    assert log_probs[0, 0].tolist() == [-math.inf, 0, -math.inf]


@pytest.mark.parametrize("uniform", [SMALLEST, 0.25, 0.5, LARGEST])
@pytest.mark.parametrize("support", [[2], [0, 4], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_token_is_never_drawn(uniform: float, support: list[int], dtype: torch.dtype) -> None:
    """Guards the ends of the CDF: leading zeros, trailing zeros, a last value that rounds under 1."""
    probs = torch.zeros(5, dtype=dtype)
    probs[support] = torch.tensor([0.1 * (1 + each) for each in support], dtype=dtype)
    drawn = sample((probs / probs.sum()).log()[None], torch.tensor([uniform], dtype=torch.float64))
    assert drawn.item() in support


def test_inverse_cdf_gives_each_token_its_share() -> None:
    probs = torch.tensor([0.5, 0.0, 0.125, 0.375], dtype=torch.float64)
    grid = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    drawn = sample(probs.log().expand(800, 4), grid)
    assert drawn.bincount(minlength=4).tolist() == [400, 0, 100, 300]


def test_mix_is_splitmix64() -> None:
    """The published outputs of splitmix64 for the seed 1234567."""
    states = 1234567 + torch.arange(1, 6) * sampler._GOLDEN
    assert [value % 2**64 for value in sampler._mix(states).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize(("bits", "expected"), [(0, SMALLEST), (-1, LARGEST)])
def test_uniforms_lie_in_the_open_interval(
    bits: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A uniform of exactly 1 would make Gumbel noise infinite and an impossible candidate NaN."""
    monkeypatch.setattr(sampler, "_mix", lambda values: torch.full_like(values, bits))
    numbers = uniforms(torch.zeros(1, dtype=torch.long), Draw.BEAM)
    assert numbers.item() == expected
    assert gumbel(numbers).isfinite().all()


def test_uniforms_are_uniform_and_their_neighbours_unrelated() -> None:
    streams = step_streams(torch.arange(4000), torch.zeros(4000).long(), torch.zeros(4000).long())
    numbers = uniforms(streams[:, None], Draw.CHAIN, 1, 0, torch.arange(5))
    assert abs(numbers.mean().item() - 0.5) < 4 * math.sqrt(1 / 12 / numbers.numel())
    shares = (numbers * 10).long().flatten().bincount(minlength=10) / numbers.numel()
    assert (shares - 0.1).abs().max() < 0.01
    centred = numbers - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs((centred * other).mean().item() * 12) < 4 / math.sqrt(numbers.numel())


def test_every_part_of_a_counter_changes_the_number() -> None:
    """Two draws that shared a number would correlate acceptance with proposal."""
    zero = torch.zeros(1, dtype=torch.long)
    seeds = [(0, 0, 0), (1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63 - 1, 0, 0), (-(2**63), 0, 0)]
    streams = [step_streams(zero + seed, zero + choice, zero + step) for seed, choice, step in seeds]
    draws = [
        (kind, depth, parent, token)
        for kind in Draw
        for depth, parent, token in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (16, 64, 2**18)]
    ]
    numbers = [uniforms(stream, *draw).item() for stream in streams for draw in draws]
    assert len(set(numbers)) == len(numbers)


def test_number_depends_on_its_counter_alone() -> None:
    """The same draw from a batch, a slice of it, tensors or plain integers is the same bits."""

    def numbers(rows: Tensor) -> Tensor:
        streams = step_streams(rows * 977, rows % 3, rows)
        return uniforms(streams[:, None], Draw.BEAM, 2, torch.tensor([3, 5]), torch.tensor([7, 1]))

    together = numbers(torch.arange(8))
    for row in range(8):
        assert torch.equal(together[row : row + 1], numbers(torch.tensor([row])))
    stream = step_streams(torch.tensor([977]), torch.tensor([1]), torch.tensor([1]))
    assert uniforms(stream, Draw.BEAM, 2, 5, 1).item() == together[1, 1].item()


@pytest.mark.parametrize("vocab_size", [64 * 40, 64 * 40 + 17])
@pytest.mark.parametrize("count", [1, 5, 18, 30])
def test_likeliest_is_topk(vocab_size: int, count: int) -> None:
    """In chunks and beyond the last one, with whole chunks excluded; equal values may differ in place."""
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(2, 3, vocab_size, generator=generator)
    values[0, 0, :-3] = -math.inf
    values[0, 1, -20:] += 9
    values[1, 2] = values[1, 2].round()
    found, token_ids = likeliest(values, count)
    assert torch.equal(found, values.topk(count, dim=-1).values)
    assert torch.equal(values.gather(-1, token_ids), found)
    assert all(len(set(row)) == count for row in token_ids.flatten(0, 1).tolist())
