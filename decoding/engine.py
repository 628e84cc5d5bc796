"""The batched engine: sequences join and leave between steps; a step decodes one group of rows."""

import time
from collections import deque
from collections.abc import Sequence as Series

import torch

from decoding.batch import Batch, sequence_end_ids
from decoding.config import Preset
from decoding.draft_health import DraftHealth, without_draft
from decoding.host import to_host
from decoding.methods import METHODS_BY_NAME
from decoding.methods.step import RowStep
from decoding.model import ModelPair
from decoding.rows import RowTable
from decoding.sequence import FinishReason, Sequence, SequenceOutput, TokenLogProb, empty_output
from decoding.staging import Staging
from decoding.statistics import StepStats
from decoding.timing import StepTimer

PREFILL_CHUNK = 256


class Engine:
    """Decodes many sequences at once, each with its own method and parameters.

    `add` and `cancel` between steps; `step` prefills at most one chunk and decodes one group. Admission,
    grouping and truncation at EOS, stop ids and `max_tokens` happen here and nowhere else.
    """

    def __init__(self, pair: ModelPair, max_num_seqs: int = 16, prefill_chunk: int = PREFILL_CHUNK) -> None:
        self.pair = pair
        self.last_step = StepStats()
        self._models = list(pair.models.values())
        for model in self._models:
            if model.cache.rows <= max_num_seqs:
                raise ValueError(f"max_num_seqs must be under the {model.cache.rows} rows of the caches")
        self._rows = RowTable([model.cache for model in self._models], max_num_seqs)
        self._waiting: deque[Sequence] = deque()
        self._nothing_to_do: list[Sequence] = []
        self._staging = Staging(self._models, max_num_seqs, prefill_chunk)
        self._timer = StepTimer({role: model.timer for role, model in pair.models.items()})
        self._prompt_log_probs: dict[str, list[TokenLogProb]] = {}
        self._batches: dict[Preset, Batch] = {}
        self._last_turn: dict[Preset, int] = {}
        self._num_steps = 0
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
        return len(self._waiting)

    @property
    def num_free_rows(self) -> int:
        return self._rows.num_free

    def has_work(self) -> bool:
        return bool(self._rows.sequences or self._waiting or self._nothing_to_do)

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
        self._validate(sequence)
        if not self.draft_enabled:
            without_draft(sequence)
        if sequence.remaining > 0 or sequence.params.prompt_log_probs:
            self._waiting.append(sequence)
        else:
            self._nothing_to_do.append(sequence)

    def cancel(self, sequence_id: str) -> bool:
        """Forget a sequence wherever it is; its row is free on return. False if it is not known."""
        row = self._rows.find(sequence_id)
        if row is not None:
            self._prompt_log_probs.pop(sequence_id, None)
            self._clear(row)
            self._remove([row])
            return True
        for queue in (self._waiting, self._nothing_to_do):
            for sequence in queue:
                if sequence.id == sequence_id:
                    queue.remove(sequence)
                    return True
        return False

    def retreat(self) -> list[str] | None:
        """After a step that raised: where the draft may be the cause, its sequences go on with `target`.

        Returns the ids of those that cannot, which are forgotten; None where the draft had no part in
        it, so that the state of every sequence is in doubt.
        """
        failed, self._trying = self._trying, []
        if not any(sequence.config.uses_draft for sequence in failed):
            return None
        self._draft_health.note_failure(time.monotonic())
        for sequence in reversed(failed):
            self.cancel(sequence.id)
            if without_draft(sequence):
                self._waiting.appendleft(sequence)
        return [sequence.id for sequence in failed if sequence.config.uses_draft]

    @staticmethod
    def is_device_lost(error: Exception) -> bool:
        """Whether nothing will run on the device in this process any more."""
        return isinstance(error, torch.AcceleratorError)

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """Prefill at most one chunk, decode one group of rows, and return what was delivered."""
        started = time.monotonic()
        self._timer.begin()
        outputs = [empty_output(sequence, None) for sequence in self._nothing_to_do]
        self._nothing_to_do.clear()
        prefill_id, prefill_tokens, cached_tokens, scored = self._admit()
        outputs += scored
        prefilled = time.monotonic()
        group = self._next_group()
        decoded = self._decode(*group) if group else []
        outputs += decoded
        forward_times = self._timer.end()
        self.last_step = StepStats(
            method=group[0].method if group else None,
            preset=group[0].name if group else None,
            num_sequences=group[1].stop - group[1].start if group else 0,
            num_tree_nodes=max((output.num_draft_nodes for output in outputs), default=0),
            prefill_tokens=prefill_tokens,
            prefill_seconds=prefilled - started,
            decode_seconds=time.monotonic() - prefilled,
            prefill_id=prefill_id,
            decode_ids=tuple(output.id for output in decoded),
            cached_prompt_tokens=cached_tokens,
            forward_times=forward_times,
        )
        return outputs

    def check_integrity(self) -> None:
        """Assert the invariants between sequences, rows, caches and device state."""
        self._rows.check_integrity()
        ids = [each.id for each in (*self._rows.sequences, *self._waiting, *self._nothing_to_do)]
        assert len(ids) == len(set(ids)), ids
        for batch in self._batches.values():
            sequences = self._rows.sequences[batch.rows]
            state = torch.stack(
                [batch.lengths, batch.steps, batch.remaining, *batch.last_tokens.unbind(1)], 1
            )
            expected = [[s.num_cached, s.num_steps, s.remaining, *s.last_tokens()] for s in sequences]
            assert to_host(state) == expected, (state, expected)
            if batch.adjustments is not None:
                batch.adjustments.check_integrity(sequences)

    def _validate(self, sequence: Sequence) -> None:
        if self._known(sequence.id):
            raise ValueError(f"id {sequence.id!r} is already being decoded")
        if not sequence.prompt_ids:
            raise ValueError("prompt_ids must hold at least one token")
        if not 0 <= min(sequence.prompt_ids) <= max(sequence.prompt_ids) < self.pair.vocab_size:
            raise ValueError(f"prompt_ids must lie between 0 and {self.pair.vocab_size - 1}")
        if not all(0 <= token_id < self.pair.vocab_size for token_id, _ in sequence.params.logit_bias):
            raise ValueError(f"logit_bias must name token ids between 0 and {self.pair.vocab_size - 1}")
        if sequence.params.num_top_log_probs > self.pair.vocab_size:
            raise ValueError(f"num_top_log_probs must be at most {self.pair.vocab_size}")
        if len(sequence.prompt_ids) + sequence.params.max_tokens > self.pair.max_model_len:
            raise ValueError(f"max_tokens and the prompt must fit {self.pair.max_model_len} tokens together")
        if sequence.config.uses_draft and not self.pair.has_draft:
            raise ValueError(f"method {sequence.config.method!r} needs a draft model and none is loaded")

    def _known(self, sequence_id: str) -> bool:
        queued = (*self._waiting, *self._nothing_to_do)
        return self._rows.find(sequence_id) is not None or any(each.id == sequence_id for each in queued)

    def _admit(self) -> tuple[str | None, int, int, list[SequenceOutput]]:
        """Give free rows to the sequences whose prompt is prefilled.

        Returns the sequence that a chunk was prefilled for, the tokens of the chunk, those that were
        prefilled for others before, and the outputs of sequences that only wanted their prompt scored.
        """
        prefill_id, prefilled, cached, scored = None, 0, 0, []
        while self._waiting and self._rows.num_free:
            sequence = self._waiting[0]
            self._trying = [sequence]
            if self._staging.ready(sequence):
                cached += sequence.num_cached
            else:
                if prefilled:
                    break
                prefill_id, prefilled = sequence.id, self._staging.advance(sequence)
                self._timer.charge("prefill", sequence.config.method, (sequence.id,))
                if not self._staging.ready(sequence):
                    break
            self._waiting.popleft()
            prompt_log_probs = self._staging.prompt_log_probs(sequence)
            if sequence.remaining > 0:
                self._insert(sequence, prompt_log_probs)
            else:
                scored.append(empty_output(sequence, prompt_log_probs))
        return prefill_id, prefilled, cached, scored

    def _insert(self, sequence: Sequence, prompt_log_probs: list[TokenLogProb] | None) -> None:
        self._rows.insert(sequence)
        self._batches.clear()
        if prompt_log_probs is not None:
            self._prompt_log_probs[sequence.id] = prompt_log_probs

    def _next_group(self) -> tuple[Preset, slice] | None:
        """The group that has waited longest for a pass."""
        groups = dict(self._rows.groups())
        if not groups:
            return None
        # Presets are many: those that no row has any more are forgotten.
        self._last_turn = {preset: self._last_turn.get(preset, -1) for preset in groups}
        preset = min(self._last_turn, key=self._last_turn.__getitem__)
        self._num_steps += 1
        self._last_turn[preset] = self._num_steps
        return preset, groups[preset]

    def _decode(self, preset: Preset, rows: slice) -> list[SequenceOutput]:
        sequences = self._trying = self._rows.sequences[rows]
        batch = self._batches.get(preset)
        if batch is None:
            batch = Batch.of(sequences, rows, self.pair.eos_token_ids, self.pair.vocab_size, self.pair.device)
            self._batches[preset] = batch
        step = METHODS_BY_NAME[preset.method].step(self.pair, batch)
        values = to_host(step.packed())
        self._timer.charge("decode", preset.method, tuple(sequence.id for sequence in sequences))
        outputs = [
            self._deliver(sequence, step.unpack(row_values), step.num_nodes)
            for sequence, row_values in zip(sequences, values, strict=True)
        ]
        self._rows.set_lengths(rows)
        ended = [row for row, output in enumerate(outputs, rows.start) if output.finish_reason is not None]
        failed = [row for row in ended if outputs[row - rows.start].finish_reason is FinishReason.ERROR]
        for row in failed:
            self._clear(row)
        self._remove(ended)
        return outputs

    def _deliver(self, sequence: Sequence, row: RowStep, num_nodes: int) -> SequenceOutput:
        """Take one row of a step into its sequence, cut at the first end."""
        sequence.num_steps += 1
        prompt_log_probs = self._prompt_log_probs.pop(sequence.id, None)
        if not row.finite:
            return SequenceOutput(sequence.id, [], [], finish_reason=FinishReason.ERROR)
        ends = sequence_end_ids(sequence, self.pair.eos_token_ids)
        stop = next((index for index, token in enumerate(row.token_ids) if token in ends), None)
        kept = len(row.token_ids) if stop is None else stop + 1
        sequence.output_ids += row.token_ids[:kept]
        reason = FinishReason.STOP if stop is not None else None
        if reason is None and sequence.remaining <= 0:
            reason = FinishReason.LENGTH
        num_top = sequence.params.num_top_log_probs
        return SequenceOutput(
            id=sequence.id,
            token_ids=row.token_ids[:kept],
            log_probs=row.log_probs[:kept],
            finish_reason=reason,
            stop_token_id=None if stop is None else row.token_ids[stop],
            num_draft_tokens=row.num_drafted,
            num_draft_nodes=num_nodes,
            num_accepted_tokens=row.num_accepted,
            top_log_probs=[top[:num_top] for top in row.top_log_probs[:kept]] if num_top else None,
            prompt_log_probs=prompt_log_probs,
        )

    def _clear(self, row: int) -> None:
        for model in self._models:
            model.cache.clear_row(row)

    def _remove(self, rows: Series[int]) -> None:
        for row in sorted(rows, reverse=True):
            self._rows.remove(row)
        if rows:
            self._batches.clear()
