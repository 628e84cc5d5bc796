"""One decoding step of a group of rows: its shape, what the draft has missed, the method's own step."""

from collections.abc import Sequence as Series
from dataclasses import dataclass, replace

from decoding.batch import Batch
from decoding.config import Preset
from decoding.draft_gap import close_gaps
from decoding.host import to_host
from decoding.methods import METHODS_BY_NAME
from decoding.methods.step import RowStep
from decoding.model_pair import ModelPair
from decoding.policy import Policy
from decoding.sequence import Sequence
from decoding.timing import cost_clock, finish_queued


@dataclass(frozen=True, slots=True)
class GroupStep:
    """What a step gave each row, and in which shape; `num_nodes` as in `DecodeStep`."""

    shape: Preset
    rows: list[RowStep]
    num_nodes: int


class GroupStepper:
    """Runs steps; those of adaptive groups in the shape that `policy` chooses, without one they are fixed.

    `used_draft` says of the last step, also of one that raised, whether the draft had a part in it.
    """

    def __init__(self, pair: ModelPair, policy: Policy | None) -> None:
        self.used_draft = False
        self._pair, self._policy = pair, policy
        self._clock = cost_clock(pair.device, pair.target.ranks)

    def accept(self, sequence: Sequence) -> None:
        """Take a new sequence: nothing adapts without a policy."""
        if self._policy is None:
            sequence.config = replace(sequence.config, adaptive=False)

    def prepare(self, sequence: Sequence) -> None:
        """Before its prompt is prefilled: the draft is spared what it may never need."""
        preset = sequence.config.preset
        off = self._policy is not None and preset.adaptive and not self._policy.uses_draft(preset)
        sequence.draft_lag = sequence.num_cached if off else 0

    def step(self, preset: Preset, batch: Batch, sequences: Series[Sequence]) -> GroupStep:
        """One step of the rows of `batch`, which hold `sequences` of one `preset`."""
        self.used_draft = False
        policy = self._policy if preset.adaptive else None
        shape = preset if policy is None else policy.choose(preset, sequences)
        self.used_draft = sequences[0].config.uses_draft and shape.step_method != "target"
        if policy is not None:
            self._take_shape(shape, batch, sequences)
            finish_queued(self._pair.device)  # gaps and prompts are no cost of this shape
        started = self._clock()
        step = METHODS_BY_NAME[shape.step_method].step(self._pair, batch)
        rows = [step.unpack(values) for values in to_host(step.packed())]
        if policy is not None:
            accepted = [(row.num_drafted, row.num_accepted) for row in rows]
            policy.note(preset, shape, sequences, accepted, self._clock() - started)
        return GroupStep(shape, rows, step.num_nodes)

    def _take_shape(self, shape: Preset, batch: Batch, sequences: Series[Sequence]) -> None:
        if shape.depth:
            assert self._pair.draft is not None
            close_gaps(self._pair.draft, batch.rows, sequences)
        batch.take_shape(shape)
