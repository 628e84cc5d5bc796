"""The request's transforms of a distribution, sampling from it, and counter-based random numbers.

Everything here is pure: tensors in, new tensors out. `rows` are sequences, `nodes` places of a row's
token tree, `vocab` the shared vocabulary.
"""

import math
from collections.abc import Sequence as Series
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from decoding.sequence import SamplingParams

_CHUNK = 64
TIE_MARGIN = 64  # equal logits beyond a top-k border that are told apart by token id

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_MASKS = {shift: (1 << (64 - shift)) - 1 for shift in (30, 27, 31, 12)}


class Draw(IntEnum):
    """What a random number decides; part of its counter, so that no two draws share noise."""

    BEAM = 1
    CHAIN = 2
    ACCEPT = 3
    NEXT = 4


@dataclass(frozen=True, slots=True)
class RowSampling:
    """`SamplingParams` of several rows as tensors `[rows]`.

    Greedy rows hold the neutral values of temperature and filters. `sort_width` is how many of the
    likeliest tokens the filters must look at, 0 when no row filters by rank.
    """

    temperature: Tensor
    greedy: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    ranked: Tensor
    sort_width: int
    all_ranked: bool
    any_temperature: bool
    any_greedy: bool
    all_greedy: bool
    any_min_p: bool

    @classmethod
    def of(cls, params: Series[SamplingParams], vocab_size: int, device: torch.device) -> "RowSampling":
        drawn = [None if row.greedy else row for row in params]
        top_k = [_top_k(row, vocab_size) for row in drawn]
        top_p = [1.0 if row is None else row.top_p for row in drawn]
        min_p = [0.0 if row is None else row.min_p for row in drawn]
        ranked = [k < vocab_size or p < 1 for k, p in zip(top_k, top_p, strict=True)]
        temperature = [1.0 if row is None else row.temperature for row in drawn]
        return cls(
            temperature=torch.tensor(temperature, device=device),
            greedy=torch.tensor([row.greedy for row in params], device=device),
            top_k=torch.tensor(top_k, device=device),
            top_p=torch.tensor(top_p, device=device),
            log_min_p=torch.tensor([math.log(p) if p > 0 else -math.inf for p in min_p], device=device),
            ranked=torch.tensor(ranked, device=device),
            sort_width=max((k for k, used in zip(top_k, ranked, strict=True) if used), default=0),
            all_ranked=all(ranked),
            any_temperature=any(value != 1.0 for value in temperature),
            any_greedy=any(row.greedy for row in params),
            all_greedy=all(row.greedy for row in params),
            any_min_p=any(p > 0 for p in min_p),
        )


def _top_k(row: SamplingParams | None, vocab_size: int) -> int:
    if row is None or row.top_k <= 0:
        return vocab_size
    return min(row.top_k, vocab_size)


def to_log_probs(logits: Tensor, sampling: RowSampling, *, point_mass: bool) -> Tensor:
    """Log-probabilities `[rows, nodes, vocab]` of `logits` of the same shape after the transforms.

    Temperature, top-k, top-p, min-p in this order, each on the renormalised result. A greedy row
    becomes the point mass at its argmax if `point_mass`, else the log-softmax of its logits.
    """
    scaled = logits / sampling.temperature[:, None, None] if sampling.any_temperature else logits
    if sampling.all_ranked:
        log_probs = _ranked_log_probs(scaled, sampling)
    else:
        log_probs = _unranked_log_probs(scaled, sampling)
        if sampling.sort_width:
            ranked = _ranked_log_probs(scaled, sampling)
            log_probs = torch.where(sampling.ranked[:, None, None], ranked, log_probs)
    if point_mass and sampling.any_greedy:
        log_probs = torch.where(sampling.greedy[:, None, None], _point_mass(logits), log_probs)
    return log_probs


def _unranked_log_probs(scaled: Tensor, sampling: RowSampling) -> Tensor:
    """Min-p alone."""
    if sampling.any_min_p:
        floor = scaled.amax(-1, keepdim=True) + sampling.log_min_p[:, None, None]
        scaled = scaled.masked_fill(scaled < floor, -math.inf)
    return scaled.log_softmax(-1)


def _ranked_log_probs(scaled: Tensor, sampling: RowSampling) -> Tensor:
    """Top-k, then top-p on what it leaves, then min-p; everything else becomes -inf."""
    values, token_ids = _ranked(scaled, sampling.sort_width)
    rank = torch.arange(values.shape[-1], device=scaled.device)
    values = values.masked_fill(rank >= sampling.top_k[:, None, None], -math.inf)
    probs = values.softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    dropped = (mass_before >= sampling.top_p[:, None, None]) & (rank > 0)
    if sampling.any_min_p:
        dropped = dropped | (values < values[..., :1] + sampling.log_min_p[:, None, None])
    kept = values.masked_fill(dropped, -math.inf).log_softmax(-1)
    return torch.full_like(scaled, -math.inf).scatter_(-1, token_ids, kept)


def _ranked(scaled: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """At least the `width` largest values, descending, and their token ids, ascending among equals."""
    if width + TIE_MARGIN >= scaled.shape[-1]:
        values, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
        return values, token_ids
    # Which of several equal values topk returns, and where, may depend on its width: on a neighbour's filter.
    token_ids = likeliest(scaled, width + TIE_MARGIN)[1].sort(dim=-1).values
    values, order = scaled.gather(-1, token_ids).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(-1, order)


def likeliest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of `values` `[..., vocab]`, descending, and their token ids, as `topk`.

    On CPUs the largest lie in the chunks of the largest maxima, so only so many chunks are ranked.
    """
    chunks = values.shape[-1] // _CHUNK
    if values.device.type != "cpu" or 2 * count > chunks:
        best = values.topk(count, dim=-1)
        return best.values, best.indices
    body = values[..., : chunks * _CHUNK].view(*values.shape[:-1], chunks, _CHUNK)
    numbers = body.amax(-1).topk(count, dim=-1, sorted=False).indices
    kept = body.gather(-2, numbers.unsqueeze(-1).expand(*numbers.shape, _CHUNK)).flatten(-2)
    found = torch.cat([kept, values[..., chunks * _CHUNK :]], dim=-1).topk(count, dim=-1)
    number = (found.indices // _CHUNK).clamp(max=count - 1)
    inside = numbers.gather(-1, number) * _CHUNK + found.indices % _CHUNK
    behind = found.indices + (chunks - count) * _CHUNK
    return found.values, torch.where(found.indices < count * _CHUNK, inside, behind)


def _point_mass(logits: Tensor) -> Tensor:
    best = logits.argmax(-1, keepdim=True)
    return torch.full_like(logits, -math.inf).scatter_(-1, best, 0.0)


def sample(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids `[...]` drawn from `log_probs` `[..., vocab]` by inverse CDF with `uniforms` `[...]`.

    The CDF is scaled by its last value and uniforms lie in the open interval, so that a token of
    probability zero is never drawn.
    """
    cdf = log_probs.double().exp().cumsum(-1)
    threshold = uniforms.unsqueeze(-1) * cdf[..., -1:]
    drawn = torch.searchsorted(cdf, threshold).squeeze(-1)
    return drawn.clamp(max=log_probs.shape[-1] - 1)


def step_streams(seeds: Tensor, choices: Tensor, steps: Tensor) -> Tensor:
    """One random stream `[rows]` per (request seed, choice index, the sequence's own step number)."""
    return _mix(_mix(_mix(seeds + _GOLDEN) + choices * _GOLDEN) + steps * _GOLDEN)


def uniforms(
    streams: Tensor, draw: Draw, depth: int | Tensor = 0, parent: int | Tensor = 0, token: int | Tensor = 0
) -> Tensor:
    """Numbers in the open interval (0, 1), float64, a pure function of all arguments.

    The counter packs what is decided, the depth, the parent's node number and the token id, so noise
    follows the token, not its rank. `streams` must broadcast with the other arguments.
    """
    counter = (int(draw) << 58) + (depth * (1 << 50)) + (parent * (1 << 40)) + token
    scattered = counter * _GOLDEN if isinstance(counter, Tensor) else _signed(counter * _GOLDEN)
    bits = _mix(streams + scattered)
    # 52 bits and a half fit the 53 of a double: with one bit more the largest would round to 1.
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def _signed(value: int) -> int:
    """The signed 64-bit integer with the same low bits, as a product of tensors would be."""
    return (value + 2**63) % 2**64 - 2**63


def gumbel(values: Tensor) -> Tensor:
    """Standard Gumbel noise from uniforms."""
    return -(-values.log()).log()


def _mix(values: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 tensors, whose products wrap."""
    values = (values ^ _shift_right(values, 30)) * _MIX_1
    values = (values ^ _shift_right(values, 27)) * _MIX_2
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, shift: int) -> Tensor:
    """Logical shift: the sign bit moves like any other."""
    return (values >> shift) & _MASKS[shift]
