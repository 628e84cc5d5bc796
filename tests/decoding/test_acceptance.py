"""The acceptance rules against enumeration: rejection sampling exactly, the joint prefix by brute force."""

import itertools
import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from decoding.acceptance import best_reference, longest_joint_prefix, rejection_sample, rule_depths
from decoding.token_tree import TokenTree, gather_at

GAMMA, EOS, VOCAB = 3, 0, 5


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


def residual(p: Tensor, q: Tensor) -> Tensor:
    left = (p - q).clamp(min=0)
    return left / left.sum() if left.sum() > 0 else left


@pytest.mark.parametrize("limit", [0, 1, 2])
@pytest.mark.parametrize(("vocab", "seed"), [(3, 0), (3, 1), (4, 2), (5, 3)])
def test_proof_03_rejection_sampling_follows_p_exactly(vocab: int, seed: int, limit: int) -> None:
    """The whole law of depth 2, every uniform integrated over the pieces on which nothing changes.

    Guards a bonus drawn from the wrong node, a recovered token drawn from p, tokens accepted beyond
    the limit.
    """
    generator = torch.Generator().manual_seed(seed)
    p = [random_law(generator, vocab), random_law(generator, vocab, vocab)]
    q = [random_law(generator, vocab), random_law(generator, vocab, vocab)]
    p_last = random_law(generator, vocab, vocab, vocab)
    cases = []
    for first, second in itertools.product(range(vocab), repeat=2):
        weight = (q[0][first] * q[1][first, second]).item()
        if weight == 0:
            continue
        ratios = [(p[0][first] / q[0][first]).item(), (p[1][first, second] / q[1][first, second]).item()]
        laws = [
            p[0],
            p[1][first],
            p_last[first, second],
            residual(p[0], q[0]),
            residual(p[1][first], q[1][first]),
        ]
        next_pieces = pieces([border for law in laws for border in law.cumsum(0).tolist()])
        for (u_1, w_1), (u_2, w_2), (u_3, w_3) in itertools.product(
            pieces(ratios[:1]), pieces(ratios[1:]), next_pieces
        ):
            cases.append(((first, second), (u_1, u_2), u_3, weight * w_1 * w_2 * w_3))
    chains, accept, follow, weights = zip(*cases, strict=True)
    ids = torch.tensor(chains)
    target = torch.stack([p[0].expand(len(ids), -1), p[1][ids[:, 0]], p_last[ids[:, 0], ids[:, 1]]], 1)
    draft = torch.stack([q[0].expand(len(ids), -1), q[1][ids[:, 0]]], 1)
    num_accepted, next_ids = rejection_sample(
        ids,
        draft.log(),
        target.log(),
        torch.full((len(ids),), limit),
        torch.tensor(accept, dtype=torch.float64),
        torch.tensor(follow, dtype=torch.float64),
    )
    law = torch.zeros(vocab, vocab, vocab, dtype=torch.float64)
    whole = p[0][:, None, None] * p[1][:, :, None] * p_last
    for chain, count, token, weight in zip(
        chains, num_accepted.tolist(), next_ids.tolist(), weights, strict=True
    ):
        assert count <= limit
        text = (*chain[:count], token)
        if len(text) == 3:
            law[text] += weight
        elif len(text) == 2:
            law[text] += weight * p_last[text]
        else:
            law[text] += weight * p[1][token][:, None] * p_last[token]
    torch.testing.assert_close(law, whole, rtol=0, atol=1e-12)


def test_rejection_takes_the_point_masses_of_greedy_rows() -> None:
    """At temperature 0 a token stays iff it is the argmax, and the recovered token is the argmax."""
    point = torch.full((1, 3, 4), -math.inf)
    point[0, [0, 1, 2], [1, 2, 3]] = 0
    draft = torch.full((1, 2, 4), -math.inf)
    draft[0, [0, 1], [1, 3]] = 0
    uniforms = torch.tensor([[0.999, 0.001]]).double()
    count, token = rejection_sample(
        torch.tensor([[1, 3]]), draft, point, torch.tensor([2]), uniforms, torch.tensor([0.5]).double()
    )
    assert (count.item(), token.item()) == (1, 2)


@dataclass
class Beams:
    """One random tree, node by node, as a beam with arbitrary choices would have built it.

    Log-probabilities are whole numbers, so that sums and ties are exact; the rules never need norms.
    """

    rng: random.Random
    limit: int
    width: int = 4
    tokens: list[int] = field(default_factory=lambda: [1])
    parents: list[int] = field(default_factory=lambda: [0])
    q: list[float] = field(default_factory=lambda: [0.0])
    final: list[tuple[int, float]] = field(default_factory=lambda: [(0, 0.0)])

    def __post_init__(self) -> None:
        self.log_p, self.log_q = (
            [
                [self.rng.choice([-math.inf, low, -2.0, -1.0, -1.0]) for _ in range(VOCAB)]
                for _ in range(VOCAB)
            ]
            for low in (-3.0, -6.0)
        )
        for row in self.log_p:
            row[self.rng.randrange(VOCAB)] = -1.0
        for depth in range(1, GAMMA + 1):
            self.grow(depth)

    def ended(self, node: int) -> bool:
        return node > 0 and self.tokens[node] == EOS and self.q[node] > -math.inf

    def grow(self, depth: int) -> None:
        candidates: list[tuple[int, int | None, float]] = []
        for node, score in self.final:
            if self.ended(node) or depth > self.limit:
                candidates.append((node, None, score))
            else:
                conditional = self.log_q[self.tokens[node]]
                candidates += [(node, token, score + conditional[token]) for token in range(VOCAB)]
        candidates = [each for each in candidates if each[2] > -math.inf]
        chosen = self.rng.sample(candidates, min(self.width, len(candidates)))
        self.final = []
        for slot in range(self.width):
            node, token, score = chosen[slot] if slot < len(chosen) else (0, None, -math.inf)
            if token is not None:
                self.final.append((len(self.tokens), score))
            elif score > -math.inf:
                self.final.append((node, score))
            padding = token is None
            self.tokens.append(self.rng.randrange(VOCAB) if padding else token or 0)
            self.parents.append(node)
            self.q.append(-math.inf if padding else score)

    @property
    def best(self) -> int:
        return max(self.final, key=lambda each: each[1])[0] if self.final else 0

    def path(self, node: int) -> list[int]:
        path: list[int] = []
        while node:
            path.insert(0, node)
            node = self.parents[node]
        return path

    def p(self, node: int) -> float:
        return sum(self.log_p[self.tokens[self.parents[each]]][self.tokens[each]] for each in self.path(node))

    def own_best(self, node: int) -> float:
        return sum(max(self.log_p[self.tokens[self.parents[each]]]) for each in self.path(node))

    def rule_depth(self, node: int) -> int:
        return self.limit if self.ended(node) else len(self.path(node))

    def q_ref(self, node: int) -> float:
        path = self.path(self.best)
        return self.q[path[min(self.rule_depth(node), len(path)) - 1]]

    def longest(self, log_tau: float, target_reference: bool) -> int:
        """Brute force over every node."""
        passing = [
            node
            for node in range(1, len(self.tokens))
            if self.q[node] > -math.inf
            and self.p(node) > -math.inf
            and self.p(node) - (self.own_best(node) if target_reference else self.q_ref(node)) > log_tau
        ]
        return max(passing, key=lambda node: (self.rule_depth(node), self.p(node), -node), default=0)


@dataclass
class Case:
    """A thousand random trees and their tensors."""

    beams: list[Beams]
    tree: TokenTree
    joint: Tensor
    log_p: Tensor
    final_nodes: Tensor
    limits: Tensor
    log_taus: Tensor


@pytest.fixture(scope="module")
def case() -> Case:
    rng = random.Random(7)
    beams = [Beams(rng, limit=rng.choice([1, 2, 3, 3, 3])) for _ in range(1000)]
    tokens, parents, q = (
        torch.tensor([getattr(b, name) for b in beams]) for name in ("tokens", "parents", "q")
    )
    tree = TokenTree.of_roots(tokens[:, 0], tokens.shape[1])
    for depth in range(1, GAMMA + 1):
        level = slice(1 + (depth - 1) * 4, 1 + depth * 4)
        real = q[:, level] > -math.inf
        tree.add_level(
            level.start,
            depth,
            token_ids=tokens[:, level],
            parents=parents[:, level],
            draft_log_probs=q[:, level].double(),
            ended=(tokens[:, level] == EOS) & real,
        )
    log_p = torch.tensor([b.log_p for b in beams], dtype=torch.float64)
    rows = torch.arange(1000)[:, None]
    conditional = log_p[rows, tokens.gather(1, parents), tokens]
    return Case(
        beams=beams,
        tree=tree,
        joint=tree.joint(conditional),
        log_p=log_p,
        final_nodes=torch.tensor([b.best for b in beams]),
        limits=torch.tensor([b.limit for b in beams]),
        log_taus=torch.tensor([rng.choice([-math.inf, -2.0, -1.0, 0.0, math.inf]) for _ in beams]),
    )


def test_proof_02_random_trees_hold_all_that_can_go_wrong(case: Case) -> None:
    """The other proofs mean nothing unless beams are re-parented, end, are padded and tie."""
    tree = case.tree
    reparented = sum(
        any(b.parents[node] not in (0, node - 4) for node in range(5, 13) if b.q[node] > -math.inf)
        for b in case.beams
    )
    padded = (tree.draft_log_probs == -math.inf).any(1).sum()
    tied = sum(len({b.p(node) for node in range(1, 13)}) < 10 for b in case.beams)
    failing_ancestor = 0
    for b, log_tau in zip(case.beams, case.log_taus.tolist(), strict=True):
        path = b.path(b.longest(log_tau, False))
        failing_ancestor += any(b.p(node) - b.q_ref(node) <= log_tau for node in path)
    assert min(reparented, int(padded), tied, int(tree.ended.any(1).sum()), failing_ancestor) > 15


def test_proof_02_longest_joint_prefix_equals_brute_force(case: Case) -> None:
    reference = best_reference(case.tree, case.final_nodes, case.limits, GAMMA)
    found = longest_joint_prefix(case.tree, case.joint, reference, case.log_taus, case.limits)
    expected = [b.longest(t, False) for b, t in zip(case.beams, case.log_taus.tolist(), strict=True)]
    assert found.tolist() == expected
    assert len(set(expected)) == 13


def test_proof_02_target_reference_equals_brute_force(case: Case) -> None:
    likeliest = case.log_p.amax(-1)
    at_parent = likeliest.gather(1, case.tree.token_ids.gather(1, case.tree.parents))
    reference = case.tree.joint(at_parent)
    found = longest_joint_prefix(case.tree, case.joint, reference, case.log_taus, case.limits)
    expected = [b.longest(t, True) for b, t in zip(case.beams, case.log_taus.tolist(), strict=True)]
    assert found.tolist() == expected


def test_proof_02_best_reference_gives_the_likeliest_node_of_its_depth(case: Case) -> None:
    """And p of the block beats tau times q of the best beam at that depth."""
    reference = best_reference(case.tree, case.final_nodes, case.limits, GAMMA)
    found = longest_joint_prefix(case.tree, case.joint, reference, case.log_taus, case.limits)
    for b, log_tau, node in zip(case.beams, case.log_taus.tolist(), found.tolist(), strict=True):
        if node:
            real = [each for each in range(1, 13) if b.q[each] > -math.inf]
            rivals = [b.p(each) for each in real if b.rule_depth(each) == b.rule_depth(node)]
            assert b.p(node) == max(rivals)
            assert b.p(node) > log_tau + b.q_ref(node)


def test_proof_02_mmtad_is_never_shorter_than_mtad_on_the_same_beams(case: Case) -> None:
    reference = best_reference(case.tree, case.final_nodes, case.limits, GAMMA)
    of_tree = longest_joint_prefix(case.tree, case.joint, reference, case.log_taus, case.limits)
    path = case.tree.path(case.final_nodes, GAMMA)
    chain = case.tree.chain(path)
    joint = torch.cat([torch.zeros(1000, 1, dtype=torch.float64), case.joint.gather(1, path)], 1)
    final = (path > 0).sum(1)
    of_chain = longest_joint_prefix(
        chain, joint, best_reference(chain, final, case.limits, GAMMA), case.log_taus, case.limits
    )
    deep = gather_at(rule_depths(case.tree, case.limits), of_tree)
    assert (deep >= gather_at(rule_depths(chain, case.limits), of_chain)).all()
    assert (deep > gather_at(rule_depths(chain, case.limits), of_chain)).sum() > 30


def test_nothing_passes_an_infinite_threshold_and_all_that_is_possible_passes_zero() -> None:
    tree = TokenTree.of_roots(torch.tensor([1]), 3)
    for depth, q in ((1, -1.0), (2, -9.0)):
        tree.add_level(
            depth,
            depth,
            token_ids=torch.tensor([[2]]),
            parents=torch.tensor([[depth - 1]]),
            draft_log_probs=torch.tensor([[q]]).double(),
            ended=torch.tensor([[False]]),
        )
    limits = torch.tensor([2])
    for p, log_tau, expected in [(-50.0, -math.inf, 2), (0.0, math.inf, 0), (-math.inf, -math.inf, 1)]:
        joint = torch.tensor([[0.0, -30.0, p]]).double()
        reference = best_reference(tree, torch.tensor([2]), limits, 2)
        assert longest_joint_prefix(tree, joint, reference, torch.tensor([log_tau]), limits).tolist() == [
            expected
        ]
