"""MMTAD: the draft's whole beam tree is verified in one pass, the longest joint prefix in it is kept.

(Qin et al., multi-candidate multi-token assisted decoding.)
"""

from decoding.batch import Batch
from decoding.beam import propose_tree
from decoding.methods.step import DecodeStep, joint_step
from decoding.model import ModelPair


class MMTAD:
    """Every beam of every depth is a candidate; ancestors that fail do not matter."""

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep:
        assert pair.draft is not None
        lengths = batch.lengths
        tree, beams = propose_tree(pair.draft, batch)
        step, path = joint_step(pair, batch, tree, beams.best())
        pair.target.commit(batch.rows, lengths, path)
        pair.draft.commit(batch.rows, lengths, path)
        return step
