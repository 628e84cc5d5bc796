"""The shared end of a step: what is packed for the host, the references, log-probs, the next token."""

import itertools
import math
from typing import Any

import pytest
import torch

from decoding.acceptance import best_reference
from decoding.batch import Batch
from decoding.beam import Beams, propose_tree
from decoding.methods.step import joint_step, single_step
from decoding.methods.target import SingleModel
from decoding.token_tree import TokenTree
from tests.decoding.laws import ADJUSTING, next_law, of_chain
from tests.decoding.tiny import batch_of, random_markov, request, scripted_pair


def draft_reference(batch: Batch, tree: TokenTree, beams: Beams) -> torch.Tensor:
    return best_reference(tree, beams.best(), batch.limits, batch.depth)


def test_packed_step_is_one_tensor_with_everything() -> None:
    """The engine's only copy: counts, flag, ids and log-probs, all exact in float64."""
    pair = scripted_pair(random_markov(5, 0), random_markov(5, 1))
    sequences = [request("a", [1], max_tokens=9), request("b", [2], max_tokens=2, num_top_log_probs=3)]
    batch = batch_of(sequences, 5)
    tree, beams = propose_tree(pair.draft, batch)  # type: ignore[arg-type]
    step, _ = joint_step(pair, batch, tree, draft_reference(batch, tree, beams))
    packed = step.packed()
    width = batch.depth + 1
    assert packed.shape == (2, 4 + 2 * width + 2 * 3 * width)
    assert packed[:, 0].tolist() == step.num_tokens.tolist()
    assert packed[:, 1].tolist() == step.num_accepted.tolist()
    assert packed[:, 2].tolist() == [4, 1]
    assert packed[:, 3].tolist() == [1, 1]
    assert torch.equal(packed[:, 4 : 4 + width].long(), step.token_ids)
    assert torch.equal(packed[:, 4 + width : 4 + 2 * width], step.log_probs)
    assert step.num_nodes == 16
    assert step.top_ids is not None
    assert step.top_log_probs is not None
    for row, values in enumerate(packed.tolist()):
        found = step.unpack(values)
        count = int(step.num_tokens[row])
        assert found.token_ids == step.token_ids[row, :count].tolist()
        assert found.log_probs == step.log_probs[row, :count].tolist()
        assert (found.num_accepted, found.finite) == (int(step.num_accepted[row]), True)
        assert found.num_drafted == int(step.num_drafted[row])
        expected = [
            tuple(zip(ids, values, strict=True))
            for ids, values in zip(
                step.top_ids[row, :count].tolist(), step.top_log_probs[row, :count].tolist(), strict=True
            )
        ]
        assert found.top_log_probs == expected


@pytest.mark.parametrize("adjusting", [{}, ADJUSTING["all"]], ids=["none", "all"])
@pytest.mark.parametrize("reference", ["draft", "target"])
@pytest.mark.parametrize("temperature", [0, 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_proof_08_joint_step_keeps_what_the_rule_says(
    seed: int, temperature: float, reference: str, adjusting: dict[str, Any]
) -> None:
    """Node by node over a real beam tree, with all transforms in both models from each node's own path.

    Guards p taken at the node instead of its parent, one row's reference used for another, penalties
    or min_tokens that do not know the path, and a next token drawn elsewhere than behind the block.
    """
    tau, eos = 0.4, 0
    p, q = random_markov(5, seed, zeros=1), random_markov(5, seed + 50, zeros=1)
    pair = scripted_pair(p, q)
    fields: dict[str, Any] = {"num_speculative_tokens": 3, "beam_width": 4, "acceptance_threshold": tau}
    fields |= adjusting | {"max_tokens": 9, "temperature": temperature, "seed": seed}
    sequences = [
        request("a", [2, 1], acceptance_reference=reference, **fields),
        request("b", [2], **fields),
    ]
    for sequence in sequences:
        sequence.output_ids += [3, 4, 1]
    batch = batch_of(sequences, 5, (eos,))
    tree, beams = propose_tree(pair.draft, batch)  # type: ignore[arg-type]
    step, path = joint_step(pair, batch, tree, draft_reference(batch, tree, beams))

    def law(table: torch.Tensor, block: list[int]) -> list[float]:
        return next_law(of_chain(table), [2, 1], [3, 4, 1, *block], sequences[0].params, (eos,))

    def joint(table: torch.Tensor, block: list[int]) -> float:
        return sum(law(table, block[:n])[token] for n, token in enumerate(block))

    best = [node for node in tree.path(beams.best(), 3)[0].tolist() if node]
    expected, chosen = (-1, -math.inf, 0), list[int]()
    for node in range(1, tree.num_nodes):
        if tree.draft_log_probs[0, node] == -math.inf:
            continue
        nodes = [each for each in tree.path(torch.tensor([node, node]), 3)[0].tolist() if each]
        block = [int(tree.token_ids[0, each]) for each in nodes]
        assert tree.draft_log_probs[0, node].item() == pytest.approx(joint(q, block), abs=1e-9)
        depth = 3 if tree.ended[0, node] else len(nodes)
        bound = tree.draft_log_probs[0, best[min(depth, len(best)) - 1]].item()
        if reference == "target":
            bound = sum(max(law(p, block[:n])) for n in range(len(block)))
        if joint(p, block) - bound > math.log(tau) and (depth, joint(p, block), -node) > expected:
            expected, chosen = (depth, joint(p, block), -node), block
    assert [node for node in path[0].tolist() if node][-1:] == ([-expected[2]] if expected[2] else [])
    assert step.token_ids[0, : len(chosen)].tolist() == chosen
    if temperature == 0 and not (chosen and chosen[-1] == eos):
        following = law(p, chosen)
        assert step.token_ids[0, len(chosen)] == following.index(max(following))


def test_log_probs_are_of_the_untransformed_target_at_the_tokens_own_parent() -> None:
    """Temperature and filters shape the choice, not what is reported."""
    p = random_markov(5, 1)
    pair = scripted_pair(p, p)
    sequence = request("a", [1], temperature=0.5, top_k=2, max_tokens=9, acceptance_threshold=0, seed=3)
    batch = batch_of([sequence], 5)
    tree, beams = propose_tree(pair.draft, batch)  # type: ignore[arg-type]
    step, _ = joint_step(pair, batch, tree, draft_reference(batch, tree, beams))
    count = int(step.num_tokens)
    assert count == 5
    tokens = [1, *step.token_ids[0, :count].tolist()]
    expected = [p[a, b].log().item() for a, b in itertools.pairwise(tokens)]
    torch.testing.assert_close(step.log_probs[0, :count], torch.tensor(expected, dtype=torch.float64))


def test_block_that_ended_gets_no_bonus() -> None:
    p = torch.full((4, 4), 0.001)
    p[:, 0] = 0.997
    pair = scripted_pair(p, p)
    batch = batch_of([request("a", [1], temperature=0, max_tokens=9)], 4, (0,))
    tree, beams = propose_tree(pair.draft, batch)  # type: ignore[arg-type]
    step, _ = joint_step(pair, batch, tree, draft_reference(batch, tree, beams))
    assert (step.num_tokens.item(), step.num_accepted.item(), step.token_ids[0, 0].item()) == (1, 1, 0)


def test_single_step_reports_its_log_prob() -> None:
    """Guards the shapes of a step without nodes, whose path is empty."""
    p = random_markov(5, 2)
    pair = scripted_pair(p, p)
    batch = batch_of([request("a", [1], "target"), request("b", [3], "target", temperature=0)], 5)
    step = single_step(pair.target, batch)
    assert step.token_ids.shape == step.log_probs.shape == (2, 1)
    for row, root in enumerate((1, 3)):
        assert step.log_probs[row, 0].item() == pytest.approx(p[root, step.token_ids[row, 0]].log().item())
    assert step.num_tokens.tolist() == [1, 1]
    assert step.num_nodes == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_row_whose_model_gives_no_numbers_is_marked(value: float) -> None:
    p = random_markov(5, 2)
    pair = scripted_pair(p, p)
    script = pair.target.module.script
    pair.target.module.script = lambda ids, positions: script(ids, positions).masked_fill(
        (ids == 3)[:, :, None], value
    )
    batch = batch_of([request("a", [1], "target"), request("b", [3], "target")], 5)
    assert SingleModel("target").step(pair, batch).finite.tolist() == [True, False]


def test_next_token_is_drawn_at_the_accepted_node() -> None:
    """Bonus off by one: the law of the token after the block is that of the block's last token."""
    cycle = torch.eye(5).roll(1, 1) * 0.96 + 0.01
    pair = scripted_pair(cycle, cycle)
    batch = batch_of([request("a", [2], temperature=0, max_tokens=9, num_speculative_tokens=3)], 5)
    tree, beams = propose_tree(pair.draft, batch)  # type: ignore[arg-type]
    step, _ = joint_step(pair, batch, tree, draft_reference(batch, tree, beams))
    assert step.token_ids[0].tolist() == [3, 4, 0, 1]
