"""MMTAD: the draft's whole beam tree is verified in one pass, the longest joint prefix in it is kept.

(Qin et al., multi-candidate multi-token assisted decoding.)
"""

from decoding.acceptance import best_reference
from decoding.batch import Batch
from decoding.beam import propose_tree
from decoding.methods.step import DecodeStep, joint_step
from decoding.model_pair import ModelPair


class MMTAD:
    """Every beam of every depth is a candidate; ancestors that fail do not matter.

    With a node budget only the nodes of highest joint q are verified; q_ref is that of the whole tree.
    """

    def step(self, pair: ModelPair, batch: Batch) -> DecodeStep:
        assert pair.draft is not None
        lengths = batch.lengths
        tree, beams = propose_tree(pair.draft, batch)
        reference = best_reference(tree, beams.best(), batch.limits, batch.depth)
        kept = None
        if batch.preset.budget:
            tree, kept = tree.pruned(batch.preset.budget)
            reference = reference.gather(1, kept)
        step, path = joint_step(pair, batch, tree, reference)
        pair.target.commit(batch.rows, lengths, path)
        # The draft's columns are those of the whole tree.
        pair.draft.commit(batch.rows, lengths, path if kept is None else kept.gather(1, path))
        return step
