"""MTAD: the draft's best beam, of which the longest prefix that holds up under the target is kept.

(Qin et al., ICLR 2025.)
"""

from decoding.acceptance import best_reference
from decoding.batch import Batch
from decoding.beam import propose_tree
from decoding.methods.step import DecodeStep, joint_step
from decoding.model_pair import ModelPair


class MTAD:
    """The final beam of highest joint q is verified as a chain."""

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep:
        assert pair.draft is not None
        lengths = batch.lengths
        tree, beams = propose_tree(pair.draft, batch)
        beam_path = tree.path(beams.best(), batch.depth)
        chain = tree.chain(beam_path)
        final_node = (beam_path > 0).sum(1)
        reference = best_reference(chain, final_node, batch.limits, batch.depth)
        step, _ = joint_step(pair, batch, chain, reference)
        pair.draft.commit(batch.rows, lengths, beam_path)
        return step
