"""Beam proposals against a beam in plain Python, exhaustive search, and the law of sampling."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from decoding.batch import Batch
from decoding.beam import Beams, propose_tree
from decoding.sampler import Draw, gumbel, uniforms
from decoding.token_tree import TokenTree
from tests.decoding.tiny import batch_of, causal, chi_square, markov, random_markov, request

EOS = 0


def propose(probs: Tensor, batch: Batch) -> tuple[TokenTree, Beams]:
    model = causal(markov(probs), rows=len(batch.lengths), vocab_size=len(probs))
    return propose_tree(model, batch)


def batch_for(root: int, vocab: int, *, width: int, depth: int = 3, rows: int = 1, **fields: float) -> Batch:
    sequences = [
        request(
            str(row),
            [root],
            beam_width=width,
            num_speculative_tokens=depth,
            **{"max_tokens": 10, "temperature": 0, "seed": row, **fields},
        )
        for row in range(rows)
    ]
    return batch_of(sequences, vocab, (EOS,))


@dataclass(frozen=True)
class Beam:
    score: float
    tokens: tuple[int, ...]
    node: int

    @property
    def ended(self) -> bool:
        return self.tokens[-1] == EOS


def plain_beam_search(table: list[list[float]], root: int, width: int, depth: int) -> list[list[Beam]]:
    """The beams after each depth; ended ones stay. Ties go to the lower token, then the lower parent."""
    beams, levels = [Beam(0.0, (root,), 0)], []
    for level in range(depth):
        candidates = []
        for beam in beams:
            if level and beam.ended:
                candidates.append((-beam.score, beam.tokens[-1], beam.node, beam))
            else:
                candidates += [
                    (
                        -(beam.score + log_q),
                        token,
                        beam.node,
                        Beam(beam.score + log_q, (*beam.tokens, token), -1),
                    )
                    for token, log_q in enumerate(table[beam.tokens[-1]])
                    if log_q > -math.inf
                ]
        chosen = [each[3] for each in sorted(candidates, key=lambda each: each[:3])[:width]]
        first = 1 + level * width
        beams = [
            beam if beam.node >= 0 else Beam(beam.score, beam.tokens, first + slot)
            for slot, beam in enumerate(chosen)
        ]
        levels.append(beams)
    return levels


def tied_markov(vocab: int, seed: int) -> Tensor:
    """Probabilities out of a few values, so that scores tie."""
    generator = torch.Generator().manual_seed(seed)
    probs = 2.0 ** -torch.randint(0, 3, (vocab, vocab), generator=generator).double()
    probs[torch.rand(vocab, vocab, generator=generator) < 0.2] = 0
    probs[:, seed % vocab] += 0.5
    return probs / probs.sum(1, keepdim=True)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("seed", range(6))
def test_proof_02_beam_search_equals_a_plain_beam(width: int, seed: int) -> None:
    """Node by node: tokens, parents, scores, ends, padding; guards tie order and re-parenting."""
    probs = tied_markov(5, seed)
    table = probs.log().log_softmax(-1).tolist()
    tree, beams = propose(probs, batch_for(1 + seed % 4, 5, width=width))
    levels = plain_beam_search(table, 1 + seed % 4, width, 3)
    expected = {beam.node: beam for level in levels for beam in level}
    for node in range(1, tree.num_nodes):
        if node not in expected:
            assert tree.draft_log_probs[0, node] == -math.inf
            assert not tree.ended[0, node]
            continue
        beam, path = expected[node], tree.path(torch.tensor([node]), 3)[0].tolist()
        tokens = [int(tree.token_ids[0, each]) for each in path if each]
        assert tokens == list(beam.tokens[1:])
        assert tree.draft_log_probs[0, node].item() == pytest.approx(beam.score, abs=1e-12)
        assert tree.ended[0, node].item() is beam.ended
        assert tree.depths[0, node] == len(tokens)
    final = levels[-1]
    assert beams.best().item() == max(final, key=lambda beam: beam.score).node
    assert beams.nodes[0, : len(final)].tolist() == [beam.node for beam in final]


@pytest.mark.parametrize("seed", range(10))
def test_proof_02_wide_beam_finds_the_likeliest_block_of_all(seed: int) -> None:
    """W 16 >= V^(gamma - 1) with V 4: the exact argmax, blocks that end counting with their own length."""
    probs = random_markov(4, seed)
    tree, beams = propose(probs, batch_for(1, 4, width=16))
    blocks = set()
    for tokens in itertools.product(range(4), repeat=3):
        end = tokens.index(EOS) + 1 if EOS in tokens else 3
        blocks.add(tokens[:end])
    scores = {
        block: sum(math.log(probs[a, b]) for a, b in itertools.pairwise((1, *block))) for block in blocks
    }
    likeliest = max(scores, key=scores.__getitem__)
    best = tree.path(beams.best(), 3)[0].tolist()
    assert tuple(int(tree.token_ids[0, node]) for node in best if node) == likeliest
    assert beams.scores.max().item() == pytest.approx(scores[likeliest], abs=1e-12)


@pytest.mark.parametrize("temperature", [0, 1])
def test_proof_07_ended_beam_stays_with_its_score(temperature: float) -> None:
    """A childless leaf would be beaten by longer junk: with P(EOS) = 0.9 the best beam is EOS alone."""
    probs = torch.full((5, 5), 0.025).double()
    probs[:, EOS] = 0.9
    tree, beams = propose(probs, batch_for(1, 5, width=4, rows=50, temperature=temperature))
    best = tree.path(beams.best(), 3)
    lengths = (best > 0).sum(1)
    assert (lengths == 1).sum() >= (50 if temperature == 0 else 40)
    ended = lengths == 1
    assert (tree.token_ids.gather(1, best[:, :1])[ended] == EOS).all()
    torch.testing.assert_close(beams.scores.amax(1)[ended], torch.full((50,), 0.9).double().log()[ended])
    for row in range(50):
        for node in range(1, tree.num_nodes):
            parent = int(tree.parents[row, node])
            assert not (tree.ended[row, parent] and tree.draft_log_probs[row, node] > -math.inf)
        texts = [tuple(tree.path(node[None], 3)[0].tolist()) for node in beams.nodes[row]]
        assert len(set(texts)) == 4


def test_sampled_pair_is_a_plackett_luce_draw() -> None:
    """Without replacement, weights q: 6,000 ordered pairs; false failures 1 in 1,000 seeds."""
    probs = random_markov(4, 3)
    batch = batch_for(1, 4, width=2, depth=1, rows=6000, temperature=1)
    tree, _ = propose(probs, batch)
    q = probs[1].tolist()
    law = {(a, b): q[a] * q[b] / (1 - q[a]) for a, b in itertools.permutations(range(4), 2)}
    seen = Counter((first, second) for first, second in tree.token_ids[:, 1:3].tolist())
    assert chi_square(seen, law) > 1e-3


def test_deeper_level_is_drawn_by_joint_q() -> None:
    """Weights are joint, noise is fresh, ended beams compete: false failures 1 in 1,000 seeds."""
    probs = random_markov(4, 5)
    probs[1] = torch.tensor([0.3, 0.1, 0.2, 0.4])
    tree, beams = propose(probs, batch_for(1, 4, width=2, depth=2, rows=8000, temperature=1))
    start = (3, EOS)
    rows = [row for row, pair in enumerate(tree.token_ids[:, 1:3].tolist()) if tuple(pair) == start]
    weights = {(3, token): (probs[1, 3] * probs[3, token]).item() for token in range(4)}
    weights[(EOS,)] = probs[1, EOS].item()
    total = sum(weights.values())
    law = {
        (a, b): weights[a] / total * weights[b] / (total - weights[a])
        for a, b in itertools.permutations(weights, 2)
    }
    seen: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for row in rows:
        tokens = []
        for node in beams.nodes[row].tolist():
            parent = int(tree.parents[row, node])
            own = (int(tree.token_ids[row, node]),)
            tokens.append(own if parent == 0 else (int(tree.token_ids[row, parent]), *own))
        seen[tokens[0], tokens[1]] += 1
    assert len(rows) > 1000
    assert chi_square(seen, law) > 1e-3


def test_scores_of_sampled_beams_are_unperturbed() -> None:
    """Nodes store joint log q, not the noise that chose them, and no beam is drawn twice."""
    probs = random_markov(5, 1)
    tree, beams = propose(probs, batch_for(2, 5, width=4, rows=20, temperature=1))
    log_q = probs.log()
    for row in range(20):
        for node in range(1, tree.num_nodes):
            if tree.draft_log_probs[row, node] > -math.inf:
                parent = int(tree.parents[row, node])
                expected = (
                    tree.draft_log_probs[row, parent]
                    + log_q[tree.token_ids[row, parent], tree.token_ids[row, node]]
                )
                assert tree.draft_log_probs[row, node].item() == pytest.approx(expected.item(), abs=1e-12)
        assert len(set(beams.nodes[row].tolist())) == 4


def test_row_is_cut_at_its_own_limit() -> None:
    """A node beyond `remaining - 1` could never be delivered and must not be judged."""
    probs = random_markov(5, 2)
    sequences = [
        request(str(left), [1], max_tokens=left, temperature=0, num_speculative_tokens=3, ignore_eos=True)
        for left in (1, 2, 3, 4)
    ]
    tree, beams = propose(probs, batch_of(sequences, 5, (EOS,)))
    for row, limit in enumerate((0, 1, 2, 3)):
        real = tree.draft_log_probs[row] > -math.inf
        assert tree.depths[row][real].max() == limit
        assert tree.depths[row, beams.best()[row]] == limit


def test_fewer_candidates_than_width_leave_padding() -> None:
    probs = random_markov(5, 2)
    tree, beams = propose(probs, batch_for(1, 5, width=4, temperature=1, top_k=1, ignore_eos=True))
    assert (tree.draft_log_probs[0] > -math.inf).tolist() == [node in (0, 1, 5, 9) for node in range(13)]
    assert (beams.scores[0] > -math.inf).tolist() == [True, False, False, False]
    assert beams.best().item() == 9


def test_row_does_not_depend_on_its_neighbours() -> None:
    """Greedy and sampled rows in one batch, each with the tree it gets alone."""
    probs = random_markov(5, 4)
    sequences = [
        request(str(row), [1 + row % 4], seed=row, temperature=row % 3 / 2, top_k=row % 2 * 3, max_tokens=9)
        for row in range(8)
    ]
    together, _ = propose(probs, batch_of(sequences, 5, (EOS,)))
    for row, sequence in enumerate(sequences):
        alone, _ = propose(probs, batch_of([sequence], 5, (EOS,)))
        assert torch.equal(together.token_ids[row], alone.token_ids[0])
        assert torch.equal(together.parents[row], alone.parents[0])
        torch.testing.assert_close(
            together.draft_log_probs[row], alone.draft_log_probs[0], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("width", [4, 16])
def test_offered_candidates_suffice_for_a_large_vocabulary(width: int) -> None:
    """64 candidates per beam leave beam search exact."""
    probs = random_markov(100, 8)
    table = probs.log().log_softmax(-1).tolist()
    tree, _ = propose(probs, batch_for(1, 100, width=width))
    expected = [beam.score for beam in plain_beam_search(table, 1, width, 3)[-1] if beam.node > 2 * width]
    found = tree.draft_log_probs[0, 1 + 2 * width :]
    torch.testing.assert_close(
        found[found > -math.inf], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_noise_follows_the_token_not_its_rank() -> None:
    """A draft whose ranking shifts a little must not reshuffle the noise of every candidate."""
    probs = random_markov(100, 9)
    batch = batch_for(1, 100, width=1, depth=1, rows=40, temperature=0.5)
    noise = gumbel(uniforms(batch.streams[:, None], Draw.BEAM, 1, 0, torch.arange(100)))
    tree, _ = propose(probs, batch)
    assert tree.token_ids[:, 1].tolist() == (2 * probs[1].log() + noise).argmax(1).tolist()
