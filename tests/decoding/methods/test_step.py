"""The shared end of a step: what is packed for the host, the references, log-probs, the next token."""

import itertools
import math

import pytest
import torch

from decoding.beam import propose_tree
from decoding.methods.step import joint_step, single_step
from decoding.methods.target import SingleModel
from tests.decoding.tiny import batch_of, random_markov, request, scripted_pair


def test_packed_step_is_one_tensor_with_everything() -> None:
    """The engine's only copy: counts, flag, ids and log-probs, all exact in float64."""
    pair = scripted_pair(random_markov(5, 0), random_markov(5, 1))
    batch = batch_of([request("a", [1], max_tokens=9), request("b", [2], max_tokens=2)], 5)
    tree, beams = propose_tree(pair.draft, batch)  # type: ignore[arg-type]
    step, _ = joint_step(pair, batch, tree, beams.best())
    packed = step.packed()
    width = batch.depth + 1
    assert packed.shape == (2, 4 + 2 * width)
    assert packed[:, 0].tolist() == step.num_tokens.tolist()
    assert packed[:, 1].tolist() == step.num_accepted.tolist()
    assert packed[:, 2].tolist() == [4, 1]
    assert packed[:, 3].tolist() == [1, 1]
    assert torch.equal(packed[:, 4 : 4 + width].long(), step.token_ids)
    assert torch.equal(packed[:, 4 + width :], step.log_probs)
    assert step.num_nodes == 16


@pytest.mark.parametrize("reference", ["draft", "target"])
@pytest.mark.parametrize("temperature", [0, 0.5])
@pytest.mark.parametrize("seed", range(8))
def test_joint_step_keeps_what_the_rule_says(seed: int, temperature: float, reference: str) -> None:
    """Node by node over a real beam tree, with the transforms in both models.

    Guards p taken at the node instead of its parent, and one row's reference used for another.
    """
    tau, eos = 0.4, 0
    p, q = random_markov(5, seed, zeros=1), random_markov(5, seed + 50, zeros=1)
    pair = scripted_pair(p, q)
    fields = {"max_tokens": 9, "num_speculative_tokens": 3, "beam_width": 4, "acceptance_threshold": tau}
    sequences = [
        request("a", [1], temperature=temperature, acceptance_reference=reference, seed=seed, **fields),
        request("b", [2], temperature=temperature, seed=seed, **fields),
    ]
    batch = batch_of(sequences, 5, (eos,))
    tree, beams = propose_tree(pair.draft, batch)  # type: ignore[arg-type]
    _, path = joint_step(pair, batch, tree, beams.best())
    law = p if temperature == 0 else p.pow(1 / temperature)
    log_p = (law / law.sum(1, keepdim=True)).log()
    best = [node for node in tree.path(beams.best(), 3)[0].tolist() if node]
    expected = (-1, -math.inf, 0)
    for node in range(1, tree.num_nodes):
        if tree.draft_log_probs[0, node] == -math.inf:
            continue
        nodes = [each for each in tree.path(torch.tensor([node, node]), 3)[0].tolist() if each]
        pairs = list(itertools.pairwise([1, *(int(tree.token_ids[0, each]) for each in nodes)]))
        joint = sum(log_p[a, b].item() for a, b in pairs)
        depth = 3 if tree.ended[0, node] else len(nodes)
        bound = tree.draft_log_probs[0, best[min(depth, len(best)) - 1]].item()
        if reference == "target":
            bound = sum(log_p[a].max().item() for a, _ in pairs)
        if joint - bound > math.log(tau):
            expected = max(expected, (depth, joint, -node))
    assert [node for node in path[0].tolist() if node][-1:] == ([-expected[2]] if expected[2] else [])


def test_log_probs_are_of_the_untransformed_target_at_the_tokens_own_parent() -> None:
    """Temperature and filters shape the choice, not what is reported."""
    p = random_markov(5, 1)
    pair = scripted_pair(p, p)
    sequence = request("a", [1], temperature=0.5, top_k=2, max_tokens=9, acceptance_threshold=0, seed=3)
    batch = batch_of([sequence], 5)
    tree, beams = propose_tree(pair.draft, batch)  # type: ignore[arg-type]
    step, _ = joint_step(pair, batch, tree, beams.best())
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
    step, _ = joint_step(pair, batch, tree, beams.best())
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
    step, _ = joint_step(pair, batch, tree, beams.best())
    assert step.token_ids[0].tolist() == [3, 4, 0, 1]
