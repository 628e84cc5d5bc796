"""The acceptance rules: the longest joint prefix by brute force; the lossless ones in test_acceptance_law."""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding.acceptance import (
    best_reference,
    block_verify,
    longest_joint_prefix,
    rejection_sample,
    rule_depths,
)
from decoding.token_tree import TokenTree, gather_at

GAMMA, EOS, VOCAB = 3, 0, 5


@pytest.mark.parametrize("verify", [rejection_sample, block_verify])
def test_chain_verifiers_take_the_point_masses_of_greedy_rows(verify: Any) -> None:
    """At temperature 0 a token stays iff it is the argmax, and the recovered token is the argmax."""
    point = torch.full((1, 3, 4), -math.inf)
    point[0, [0, 1, 2], [1, 2, 3]] = 0
    uniforms = torch.tensor([[0.999, 0.999]]).double()
    for second, accepted, expected in ((3, 1, 2), (2, 2, 3)):
        draft = torch.full((1, 2, 4), -math.inf)
        draft[0, [0, 1], [1, second]] = 0
        count, token = verify(
            torch.tensor([[1, second]]),
            draft,
            point,
            torch.tensor([2]),
            uniforms,
            torch.tensor([0.5]).double(),
        )
        assert (count.item(), token.item()) == (accepted, expected)


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
