"""Batched trees against the same trees walked node by node."""

import math
import random

import pytest
import torch

from decoding.token_tree import TokenTree, gather_at


def random_tree(rng: random.Random, rows: int, width: int, depth: int) -> tuple[TokenTree, list[list[int]]]:
    """A tree per row whose nodes hang on any node of the level above, and each row's parents."""
    tree = TokenTree.of_roots(torch.arange(rows), 1 + width * depth)
    parents = [[0] for _ in range(rows)]
    for level in range(1, depth + 1):
        first = 1 + (level - 1) * width
        above = range(max(first - width, 0), first) if level > 1 else range(1)
        chosen = [[rng.choice(above) for _ in range(width)] for _ in range(rows)]
        tree.add_level(
            first,
            level,
            token_ids=torch.tensor([[rng.randrange(9) for _ in range(width)] for _ in range(rows)]),
            parents=torch.tensor(chosen),
            draft_log_probs=torch.full((rows, width), -float(level), dtype=torch.float64),
            ended=torch.tensor([[rng.random() < 0.3 for _ in range(width)] for _ in range(rows)]),
        )
        for row in range(rows):
            parents[row] += chosen[row]
    return tree, parents


def walk(parents: list[int], node: int) -> list[int]:
    """The path to `node`, its root left out."""
    path: list[int] = []
    while node:
        path.insert(0, node)
        node = parents[node]
    return path


@pytest.mark.parametrize("seed", range(10))
def test_ancestors_and_paths_follow_parents(seed: int) -> None:
    """Guards the slip of the public code: an ancestor found by slot number instead of by parent."""
    rng = random.Random(seed)
    tree, parents = random_tree(rng, rows=4, width=3, depth=3)
    for node in range(tree.num_nodes):
        path = tree.path(torch.full((4,), node), 3)
        for row in range(4):
            expected = walk(parents[row], node)
            assert tree.ancestors[row, node].nonzero().flatten().tolist() == sorted({0, *expected})
            assert path[row].tolist() == expected + [0] * (3 - len(expected))
            assert tree.depths[row, node] == len(expected)


@pytest.mark.parametrize("seed", range(5))
def test_joint_sums_along_the_path(seed: int) -> None:
    """The root's own value is left out, an impossible ancestor makes all below impossible."""
    rng = random.Random(seed)
    tree, parents = random_tree(rng, rows=4, width=3, depth=3)
    values = torch.randn(4, tree.num_nodes, dtype=torch.float64)
    values[:, 2] = -math.inf
    joint = tree.joint(values)
    for row in range(4):
        for node in range(tree.num_nodes):
            expected = sum(values[row, each].item() for each in walk(parents[row], node))
            assert joint[row, node].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_chain_holds_one_path_and_pads_the_rest(seed: int) -> None:
    rng = random.Random(seed)
    tree, parents = random_tree(rng, rows=3, width=2, depth=3)
    tree.finite[1] = False
    nodes = torch.tensor([rng.randrange(tree.num_nodes) for _ in range(3)])
    chain = tree.chain(tree.path(nodes, 3))
    assert chain.finite.tolist() == [True, False, True]
    for row in range(3):
        path = [0, *walk(parents[row], int(nodes[row]))]
        real = slice(0, len(path))
        for name in ("token_ids", "depths", "draft_log_probs"):
            assert torch.equal(getattr(chain, name)[row, real], getattr(tree, name)[row, path])
        assert torch.equal(chain.ended[row, 1 : len(path)], tree.ended[row, path[1:]])
        assert (chain.draft_log_probs[row, len(path) :] == -math.inf).all()
        assert not chain.ended[row, len(path) :].any()
        assert chain.parents[row, 1 : len(path)].tolist() == list(range(len(path) - 1))
        assert torch.equal(chain.ancestors[row, real, real], torch.ones(len(path), len(path)).tril().bool())


def test_fresh_tree_is_a_root_and_padding() -> None:
    tree = TokenTree.of_roots(torch.tensor([7, 8]), 4)
    assert tree.num_nodes == 4
    assert tree.draft_log_probs.tolist() == [[0.0, -math.inf, -math.inf, -math.inf]] * 2
    assert tree.token_ids[:, 0].tolist() == [7, 8]
    assert not tree.ended.any()


def test_state_that_is_not_a_number_marks_its_row_for_good() -> None:
    tree = TokenTree.of_roots(torch.tensor([7, 8, 9]), 2)
    logits = torch.zeros(3, 2, 4)
    logits[1, 1] = math.nan
    tree.note_finite(logits)
    tree.note_finite(torch.zeros(3, 2, 4))
    assert tree.finite.tolist() == [True, False, True]


def test_gather_at_takes_one_node_per_row() -> None:
    values = torch.arange(12).view(2, 3, 2)
    assert gather_at(values, torch.tensor([2, 0])).tolist() == [[4, 5], [6, 7]]
