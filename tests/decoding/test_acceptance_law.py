"""The law of what the lossless rules emit, by exact enumeration: every draw, every piece of each uniform."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding.acceptance import block_verify, recursive_rejection_sample, rejection_sample

VERIFIERS = {"token": rejection_sample, "block": block_verify}


def random_law(generator: torch.Generator, *shape: int) -> Tensor:
    """Distributions over the last axis with about a third of zeros."""
    law = torch.rand(*shape, generator=generator, dtype=torch.float64)
    law *= torch.rand(*shape, generator=generator) < 0.7
    law[..., 0] += law.sum(-1) == 0
    return law / law.sum(-1, keepdim=True)


def pieces(borders: list[float]) -> list[tuple[float, float]]:
    """Middle and length of the intervals between `borders` in (0, 1)."""
    cuts = sorted({0.0, 1.0, *(min(max(border, 0.0), 1.0) for border in borders)})
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(cuts)]


def excess(p: Tensor, q: Tensor, mass: float = 1.0) -> Tensor:
    """max(0, mass * p - q) as a law, or zeros."""
    left = (mass * p - q).clamp(min=0)
    return left / left.sum() if left.sum() > 0 else left


@dataclass
class Tables:
    """Random p after 0, 1 and 2 tokens, and q after 0 and 1."""

    vocab: int
    seed: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        v = self.vocab
        self.p = [random_law(generator, v), random_law(generator, v, v), random_law(generator, v, v, v)]
        self.q = [random_law(generator, v), random_law(generator, v, v)]

    def whole(self) -> Tensor:
        """p of every text of three tokens."""
        return self.p[0][:, None, None] * self.p[1][:, :, None] * self.p[2]

    def add(self, law: Tensor, text: tuple[int, ...], weight: float) -> None:
        """A text that a rule emitted, followed by tokens of p."""
        if len(text) == 3:
            law[text] += weight
        elif len(text) == 2:
            law[text] += weight * self.p[2][text]
        else:
            law[text] += weight * self.p[1][text[0]][:, None] * self.p[2][text[0]]


def thresholds(
    tables: Tables, rule: str, chain: tuple[int, int], limit: int
) -> tuple[list[float], list[Any]]:
    """Where each uniform decides, and the laws of the next token, in plain Python from the papers."""
    first, second = chain
    p, q = [tables.p[0], tables.p[1][first], tables.p[2][first, second]], [tables.q[0], tables.q[1][first]]
    ratios = [(p[n][token] / q[n][token]).item() for n, token in enumerate(chain)]
    masses = [1.0, 1.0, 1.0]
    accept = ratios
    if rule == "block":
        masses[1] = min(1.0, ratios[0])
        masses[2] = min(1.0, masses[1] * ratios[1])
        left = (masses[1] * p[1] - q[1]).clamp(min=0).sum().item()
        partial = left / (left + 1 - masses[1]) if left + 1 - masses[1] > 0 else 0.0
        accept = [masses[1] if limit == 1 else partial, masses[2]]
    return accept, [*p, *(excess(p[n], q[n], masses[n]) for n in range(2))]


def chain_cases(tables: Tables, rule: str, limit: int) -> Iterator[tuple[Any, Any, float, float]]:
    """Every chain with every piece of its three uniforms: chain, accept uniforms, next uniform, weight."""
    for chain in itertools.product(range(tables.vocab), repeat=2):
        weight = (tables.q[0][chain[0]] * tables.q[1][chain]).item()
        if weight == 0:
            continue
        accept, laws = thresholds(tables, rule, chain, limit)
        borders = [border for law in laws for border in law.cumsum(0).tolist()]
        for (u_1, w_1), (u_2, w_2), (u_3, w_3) in itertools.product(
            pieces(accept[:1]), pieces(accept[1:]), pieces(borders)
        ):
            yield chain, (u_1, u_2), u_3, weight * w_1 * w_2 * w_3


def verified(tables: Tables, rule: str, limit: int) -> tuple[Tensor, float]:
    """The law of three tokens that a rule gives, and how many it accepts in expectation."""
    chains, accept, follow, weights = zip(*chain_cases(tables, rule, limit), strict=True)
    ids = torch.tensor(chains)
    p, q = tables.p, tables.q
    target = torch.stack([p[0].expand(len(ids), -1), p[1][ids[:, 0]], p[2][ids[:, 0], ids[:, 1]]], 1)
    draft = torch.stack([q[0].expand(len(ids), -1), q[1][ids[:, 0]]], 1)
    counts, next_ids = VERIFIERS[rule](
        ids,
        draft.log(),
        target.log(),
        torch.full((len(ids),), limit),
        torch.tensor(accept, dtype=torch.float64),
        torch.tensor(follow, dtype=torch.float64),
    )
    law, expected = torch.zeros_like(p[2]), 0.0
    for chain, count, token, weight in zip(chains, counts.tolist(), next_ids.tolist(), weights, strict=True):
        assert count <= limit
        tables.add(law, (*chain[:count], token), weight)
        expected += weight * count
    return law, expected


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize(("vocab", "seed"), [(3, 0), (3, 1), (3, 4), (4, 2), (4, 5), (5, 3)])
@pytest.mark.parametrize("rule", VERIFIERS)
def test_proof_03_chain_verification_follows_p_exactly(rule: str, vocab: int, seed: int, limit: int) -> None:
    """The whole law of depth 2 with zeros in p and q, to 1e-12.

    Guards a bonus drawn from the wrong node, a recovered token drawn from p, tokens accepted beyond
    the limit, and of block verification a wrong h or a residual without its mass.
    """
    tables = Tables(vocab, seed)
    law, _ = verified(tables, rule, limit)
    torch.testing.assert_close(law, tables.whole(), rtol=0, atol=1e-12)


def test_proof_03_block_is_never_shorter_than_token_in_expectation() -> None:
    """And longer for most laws: a block rule that fell back to single tokens would tie."""
    longer = 0
    for seed in range(12):
        tables = Tables(3 + seed % 2, 100 + seed)
        (_, by_token), (_, by_block) = (verified(tables, rule, 2) for rule in ("token", "block"))
        assert by_block >= by_token - 1e-12
        longer += by_block > by_token + 1e-6
    assert longer >= 6


def draws(q: Tensor, count: int, replacement: bool) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every ordered draw of children with its probability; padded like the proposal when q runs out."""
    support = [token for token, share in enumerate(q.tolist()) if share > 0]
    if replacement:
        for tokens in itertools.product(support, repeat=count):
            yield tokens, q[list(tokens)].prod().item()
        return
    others = [token for token in range(len(q)) if token not in support]
    drawn = min(count, len(support))
    for tokens in itertools.permutations(support, drawn):
        prob = 1.0
        for place, token in enumerate(tokens):
            prob *= q[token].item() / sum(q[each].item() for each in support if each not in tokens[:place])
        yield (*tokens, *others[: count - drawn]), prob


def child_ratios(p: Tensor, q: Tensor, tokens: tuple[int, ...], replacement: bool) -> list[float]:
    """r(x) / q(x) of each child in turn, as if all before it had been rejected."""
    residual, proposal, ratios = p, q.clone(), []
    for token in tokens:
        ratios.append((residual[token] / proposal[token]).item() if proposal[token] > 0 else 0.0)
        left = excess(residual, proposal)
        residual = left if left.sum() > 0 else residual
        if not replacement:
            proposal[token] = 0
            proposal = proposal / proposal.sum() if proposal.sum() > 0 else proposal
    return ratios


def emitted(p: Tensor, q: Tensor, count: int, replacement: bool) -> Iterator[tuple[int, bool, float]]:
    """What one node emits: token, whether it is an accepted child, probability."""
    cases: list[tuple[tuple[int, ...], list[float], float]] = []
    for tokens, prob in draws(q, count, replacement):
        ratios = child_ratios(p, q, tokens, replacement)
        for uniforms in itertools.product(*(pieces([ratio]) for ratio in ratios)):
            weight = prob
            for _, length in uniforms:
                weight *= length
            cases.append((tokens, [middle for middle, _ in uniforms], weight))
    accepted, law = recursive_rejection_sample(
        torch.tensor([case[0] for case in cases]),
        p.log().expand(len(cases), -1),
        q.log().expand(len(cases), -1),
        torch.tensor([case[1] for case in cases], dtype=torch.float64),
        replacement=replacement,
    )
    recovered = law.exp() / law.exp().sum(1, keepdim=True)
    for row, (tokens, _, weight) in enumerate(cases):
        if accepted[row] >= 0:
            yield tokens[int(accepted[row])], True, weight
        else:
            for token, share in enumerate(recovered[row].tolist()):
                yield token, False, weight * share


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("counts", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize(("vocab", "seed"), [(3, 0), (3, 1), (4, 2), (5, 3)])
def test_proof_03_recursive_rejection_follows_p_exactly(
    vocab: int, seed: int, counts: tuple[int, int], replacement: bool
) -> None:
    """Depth 2, the proposal's own law in the enumeration, zeros in p and q, to 1e-12.

    Guards a residual that is not updated, a q that is not renormalised after a draw without
    replacement, and padding children of probability zero.
    """
    tables = Tables(vocab, seed)
    law = torch.zeros_like(tables.p[2])
    below = {
        token: list(emitted(tables.p[1][token], tables.q[1][token], counts[1], replacement))
        for token in range(vocab)
    }
    for token, accepted, weight in emitted(tables.p[0], tables.q[0], counts[0], replacement):
        if not accepted:
            tables.add(law, (token,), weight)
        else:
            for second, _, share in below[token]:
                tables.add(law, (token, second), weight * share)
    torch.testing.assert_close(law, tables.whole(), rtol=0, atol=1e-12)


def test_rejection_with_nothing_left_keeps_a_law() -> None:
    """p = q leaves no residual; whatever the uniforms round to, what follows must be drawn from p."""
    p = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    for replacement in (False, True):
        accepted, law = recursive_rejection_sample(
            torch.tensor([[1]]),
            p.log(),
            p.log(),
            torch.tensor([[1.0]], dtype=torch.float64),
            replacement=replacement,
        )
        assert accepted.tolist() == [-1]
        torch.testing.assert_close(law.exp(), p)
