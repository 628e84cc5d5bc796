"""Where sequences wait for a row, and how their prompts are prefilled: nobody waits for long for another."""

import time
from collections import deque
from collections.abc import Iterator

from decoding.batch_limit import BatchLimit
from decoding.group_step import GroupStepper
from decoding.prefill_share import PrefillShare
from decoding.rows import RowTable
from decoding.sequence import Sequence
from decoding.staging import Staging
from decoding.statistics import Admissions
from decoding.timing import StepTimer, finish_queued


class PromptQueue:
    """Sequences in order of arrival; the oldest has its prompt prefilled by a chunk a step.

    Prompts of no more than one chunk pass one that takes several, so that a long prompt holds up none of
    them; the long one stays the oldest, keeps a row and half of the time, so that they do not starve it.
    `staging` is where the oldest prompt is prefilled, `side` the last row of the batch, for those that
    pass. `trying` is what the last step worked at, `chunk_limit` the tokens of a chunk.
    """

    def __init__(
        self,
        staging: Staging,
        side: Staging,
        rows: RowTable,
        stepper: GroupStepper,
        timer: StepTimer,
        chunk: int,
    ) -> None:
        self.trying: list[Sequence] = []
        self.chunk_limit = BatchLimit(chunk)
        self._rows, self._stepper, self._timer = rows, stepper, timer
        self._waiting: deque[Sequence] = deque()
        self._staging, self._side = staging, side
        self._share = PrefillShare()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def add_first(self, sequence: Sequence) -> None:
        """One that had a row already, or a part of its prompt prefilled."""
        self._waiting.appendleft(sequence)

    def remove(self, sequence_id: str) -> bool:
        found = next((each for each in self._waiting if each.id == sequence_id), None)
        if found is None:
            return False
        if found.num_reused is not None:
            self.forget_staged()
        self._waiting.remove(found)
        return True

    def forget_staged(self) -> None:
        """Of a prompt that gave no numbers, or of one that was given up before that was known."""
        self._staging.begin_anew()

    def begin_anew(self) -> None:
        """Forget what was prefilled, of which a pass that raised may have written a part."""
        self._staging.begin_anew()
        if self._rows.num_free:
            self._side.begin_anew()

    def admit(self) -> Admissions:
        """Prefill, and give rows to those whose prompt is done."""
        done, self.trying = Admissions(), []
        self.chunk_limit.ease(time.monotonic())
        while self._waiting and self._prefill(self._waiting[0], self._staging, done):
            pass
        if self._waiting and self._is_long(self._waiting[0]):
            self._let_pass(done)
        return done

    def note_step(self, long_seconds: float, other_seconds: float) -> None:
        """How long a step prefilled a long prompt, and how long it did anything else."""
        self._share.note(long_seconds, other_seconds)

    def _let_pass(self, done: Admissions) -> None:
        """Whole prompts, of as many tokens as a chunk has, beside a long one, for which a row is kept."""
        left = self.chunk_limit.size
        for sequence in [each for each in self._waiting if not self._is_long(each)]:
            left -= sequence.num_cached
            if left < 0 or self._rows.num_free < 2:
                return
            self._prefill(sequence, self._side, done)
            self._side.begin_anew()

    def _prefill(self, sequence: Sequence, staging: Staging, done: Admissions) -> bool:
        """Prefill at most a chunk; whether the sequence left the queue."""
        is_long = self._is_long(sequence)
        if not self._rows.num_free and not is_long:
            return False
        self.trying = [sequence]
        self._stepper.prepare(sequence)
        if not staging.ready(sequence):
            if staging is self._staging and done.prefills:
                return False
            if is_long and not self._share.allows(others=bool(self._rows.sequences)):
                return False
            self._advance(sequence, staging, done)
        if not (self._rows.num_free and staging.ready(sequence)):
            return False
        self._waiting.remove(sequence)
        done.note_admission(sequence, staging.prompt_log_probs(sequence))
        if sequence.remaining > 0:
            self._rows.insert(sequence, staging.row)
        return True

    def _advance(self, sequence: Sequence, staging: Staging, done: Admissions) -> None:
        started, is_long = time.monotonic(), self._is_long(sequence)
        num_tokens = staging.advance(sequence, self.chunk_limit.size)
        if is_long and (self._rows.sequences or len(self._waiting) > 1):
            finish_queued(staging.device)  # it shares time: the chunk counts, not its launch
        seconds = time.monotonic() - started
        done.note_chunk(sequence, num_tokens, seconds, is_long=is_long)
        self._timer.charge("prefill", sequence.config.method, (sequence.id,))

    def _is_long(self, sequence: Sequence) -> bool:
        return sequence.num_cached > self.chunk_limit.size
