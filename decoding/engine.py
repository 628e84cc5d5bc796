"""The batched engine: sequences join and leave between steps; a step decodes one group of rows."""

import time
from collections.abc import Sequence as Series

import torch

from decoding.batch import Batch
from decoding.batch_limit import BatchLimit
from decoding.delivery import deliver
from decoding.device_errors import is_device_lost, is_out_of_memory, release_memory
from decoding.draft_health import DraftHealth, without_draft
from decoding.group_step import GroupStepper
from decoding.model_pair import ModelPair
from decoding.policy import Policy
from decoding.prefix_cache import PrefixCache
from decoding.prompt_queue import PromptQueue
from decoding.rows import RowTable
from decoding.sequence import FinishReason, Sequence, SequenceOutput, TokenLogProb, empty_output
from decoding.sequence_checks import check_sequence
from decoding.staging import SideStaging, Staging
from decoding.statistics import Admissions, Retreat, StepStats
from decoding.timing import StepTimer
from decoding.turns import Group, GroupTurns

PREFILL_CHUNK = 256


class Engine:
    """Decodes many sequences at once, each with its own method and parameters.

    `add` and `cancel` between steps; `step` prefills at most one chunk and decodes one group. Admission,
    grouping and truncation at EOS, stop ids and `max_tokens` happen here and nowhere else.
    """

    def __init__(
        self,
        pair: ModelPair,
        max_num_seqs: int = 16,
        prefill_chunk: int = PREFILL_CHUNK,
        *,
        policy: Policy | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.pair = pair
        self._stepper = GroupStepper(pair, policy)
        self.last_step = StepStats()
        self._models = list(pair.models.values())
        caches = [model.cache for model in self._models]
        self._prefixes = PrefixCache(caches, max_num_seqs, enabled=prefix_caching)
        self._rows = RowTable(caches, max_num_seqs, self._prefixes)
        self._outputs: list[SequenceOutput] = []  # of the next step; one that raises leaves them
        self._timer = StepTimer({role: model.timer for role, model in pair.models.items()})
        staging = Staging(self._models, max_num_seqs, self._prefixes)
        side = SideStaging(self._models, max_num_seqs - 1, self._prefixes)
        self._queue = PromptQueue(staging, side, self._rows, self._stepper, self._timer, prefill_chunk)
        self._prompt_log_probs: dict[str, list[TokenLogProb]] = {}
        self._batches: dict[Group, Batch] = {}
        self._num_added = 0
        self._row_limit = BatchLimit(max_num_seqs)
        self._turns = GroupTurns(self._row_limit)
        self._draft_health = DraftHealth()
        self._trying: list[Sequence] = []  # what a step works at, so that one that raised can be undone

    @property
    def draft_enabled(self) -> bool:
        """False once the draft failed too often; `target` then takes the place of what needs both."""
        return self._draft_health.enabled

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_free_rows(self) -> int:
        return self._rows.num_free

    def has_work(self) -> bool:
        return bool(self._rows.sequences or self._outputs) or len(self._queue) > 0

    def cache_usage(self) -> dict[str, float]:
        """Committed share of each model's cache, 0 to 1, by role."""
        capacity = self._rows.staging * self.pair.max_model_len
        return {
            role: sum(model.cache.lengths[: len(self._rows)]) / capacity
            for role, model in self.pair.models.items()
        }

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it gets a row when one is free and its prompt is prefilled.

        Raises:
            ValueError: the sequence cannot be decoded; the message names the field.
        """
        if sequence.id in self._ids():
            raise ValueError(f"id {sequence.id!r} is already being decoded")
        check_sequence(sequence, self.pair)
        self._num_added += 1
        sequence.arrival = self._num_added
        self._stepper.accept(sequence)
        if not self.draft_enabled:
            without_draft(sequence)
        if sequence.remaining > 0 or sequence.params.prompt_log_probs:
            self._queue.add(sequence)
        else:
            self._outputs.append(empty_output(sequence, None))

    def cancel(self, sequence_id: str) -> bool:
        """Forget a sequence wherever it is; its row is free on return. False if it is not known."""
        row = self._rows.find(sequence_id)
        if row is not None:
            self._prompt_log_probs.pop(sequence_id, None)
            if not self._prefixes.is_proven(row):
                self._rows.clear(row)
                self._queue.forget_staged()
            self._remove([row])
            return True
        num_outputs = len(self._outputs)
        self._outputs = [each for each in self._outputs if each.id != sequence_id]
        return self._queue.remove(sequence_id) or len(self._outputs) < num_outputs

    def retreat(self, error: Exception) -> Retreat | None:
        """After a step that raised `error`: undo it, so that what can go on does.

        Where memory ran out, its rows go on in smaller batches and the youngest waits again, once; what
        then does not fit alone is lost. Where the draft may be the cause, its sequences go on with
        `target`. None where it was neither, so that the state of every sequence is in doubt.
        """
        decoded, self._trying = self._trying, []
        failed = decoded or self._queue.trying
        self._prefixes.forget_all()
        self._queue.begin_anew()
        if is_out_of_memory(error) and failed:
            release_memory(error, self.pair.device)
            return Retreat("out_of_memory", self._relieve(failed))
        if not (self._stepper.used_draft if decoded else any(each.prefills_draft for each in failed)):
            return None
        self._draft_health.note_failure(time.monotonic())
        for sequence in reversed(failed):
            self.cancel(sequence.id)
            if without_draft(sequence):
                self._queue.add_first(sequence)
        return Retreat("draft_failed", [sequence.id for sequence in failed if sequence.config.uses_draft])

    def _relieve(self, failed: Series[Sequence]) -> list[str]:
        """Less at once from now on; the sequence that is lost, if even alone it did not fit."""
        youngest = max(failed, key=lambda sequence: sequence.arrival)
        running = self._rows.find(youngest.id) is not None
        limit = self._row_limit if running else self._queue.chunk_limit
        size = len(failed) if running else limit.size
        limit.halve(size, time.monotonic())
        self._batches.clear()
        if youngest.ran_out_of_memory and size > 1:
            return []
        self.cancel(youngest.id)
        if youngest.ran_out_of_memory:
            limit.lift()
            return [youngest.id]
        youngest.ran_out_of_memory = True
        self._queue.add_first(youngest)
        return []

    is_device_lost = staticmethod(is_device_lost)

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """Prefill at most one chunk, decode one group of rows, and return what was delivered."""
        started = time.monotonic()
        self._timer.begin()
        self._trying = []
        admissions = self._admit()
        prefilled = time.monotonic()
        if self._row_limit.ease(time.monotonic()):
            self._batches.clear()
        group = self._turns.next(self._rows.groups())
        decoded = self._decode(*group) if group else []
        outputs, self._outputs = [*self._outputs, *decoded], []
        preset = group[0][0] if group else None
        ended = time.monotonic()
        self._queue.note_step(admissions.long_seconds, ended - started - admissions.long_seconds)
        forward_times = self._timer.end()
        self.last_step = StepStats(
            method=preset.method if preset else None,
            preset=decoded[0].preset if decoded else None,
            num_sequences=group[1].stop - group[1].start if group else 0,
            num_tree_nodes=max((output.num_draft_nodes for output in outputs), default=0),
            prefill_tokens=admissions.prefill_tokens,
            prefill_seconds=prefilled - started,
            decode_seconds=ended - prefilled,
            prefills=tuple(admissions.prefills),
            decode_ids=tuple(output.id for output in decoded),
            prompt_tokens=admissions.prompt_tokens,
            cached_prompt_tokens=admissions.cached_tokens,
            admitted_ids=tuple(sequence.id for sequence, _ in admissions.admitted),
            forward_times=forward_times,
        )
        return outputs

    def check_integrity(self) -> None:
        """Assert the invariants between sequences, rows, caches and device state."""
        self._rows.check_integrity()
        ids = self._ids()
        assert len(ids) == len(set(ids)), ids
        for batch in self._batches.values():
            batch.check_integrity(self._rows.sequences[batch.rows])

    def _ids(self) -> list[str]:
        known = [sequence.id for sequence in (*self._rows.sequences, *self._queue)]
        return known + [output.id for output in self._outputs]

    def _admit(self) -> Admissions:
        """Give rows to sequences whose prompt is prefilled, and outputs to those that want no more."""
        done = self._queue.admit()
        for sequence, prompt_log_probs in done.admitted:
            if sequence.remaining <= 0:
                self._outputs.append(empty_output(sequence, prompt_log_probs))
                if self._outputs[-1].finish_reason is FinishReason.ERROR:
                    self._queue.forget_staged()
            elif prompt_log_probs is not None:
                self._prompt_log_probs[sequence.id] = prompt_log_probs
        if done.admitted:
            self._batches.clear()
        return done

    def _decode(self, group: Group, rows: slice) -> list[SequenceOutput]:
        sequences = self._trying = self._rows.sequences[rows]
        batch = self._batches.get(group)
        if batch is None:
            batch = Batch.of(sequences, rows, self.pair.eos_token_ids, self.pair.vocab_size, self.pair.device)
            self._batches[group] = batch
        step = self._stepper.step(group[0], batch, sequences)
        self._timer.charge("decode", group[0].method, tuple(sequence.id for sequence in sequences))
        outputs = [
            deliver(
                sequence,
                row,
                shape=step.shape,
                num_nodes=step.num_nodes,
                eos_token_ids=self.pair.eos_token_ids,
                prompt_log_probs=self._prompt_log_probs.pop(sequence.id, None),
            )
            for sequence, row in zip(sequences, step.rows, strict=True)
        ]
        self._rows.set_lengths(rows)
        ended = [row for row, output in enumerate(outputs, rows.start) if output.finish_reason is not None]
        failed = [row for row in ended if outputs[row - rows.start].finish_reason is FinishReason.ERROR]
        for row in failed:
            self._rows.clear(row)
            self._queue.forget_staged()
        self._remove(ended)
        return outputs

    def _remove(self, rows: Series[int]) -> None:
        for row in sorted(rows, reverse=True):
            self._rows.remove(row)
        if rows:
            self._batches.clear()
