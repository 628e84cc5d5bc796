"""The row where a prompt is prefilled chunk by chunk, and scored if its log-probabilities are asked for."""

from collections.abc import Sequence as Series

import torch
from torch import Tensor

from decoding.host import to_host
from decoding.model import CausalModel
from decoding.prefix_cache import PrefixCache
from decoding.sequence import Sequence, TokenLogProb, top_log_probs


class Staging:
    """One row of every model's cache, behind those of the batch, and what it holds.

    Sequences with the same cached tokens, such as the choices of one prompt, share one prefill; others
    begin with what `prefixes` knows of theirs. `models` are the target and, if there is one, the draft.
    """

    def __init__(self, models: Series[CausalModel], row: int, prefixes: PrefixCache) -> None:
        self._models = list(models)
        self.row = row
        self._prefixes = prefixes
        self._token_ids: list[int] = []
        self._salt = ""
        self._chunk = 0  # most tokens of the last one
        self._scores: list[TokenLogProb] = []
        self._scored: Sequence | None = None

    @property
    def device(self) -> torch.device:
        return self._models[0].device

    def ready(self, sequence: Sequence) -> bool:
        """Whether the row holds all that `sequence` must have cached; else it is emptied of other prompts."""
        cached = (sequence.prompt_ids + sequence.output_ids)[:-1]
        known = cached == self._token_ids and sequence.cache_salt == self._salt
        if not (known and self._scores_fit(sequence)):
            self._begin_with(sequence, cached)
        if sequence.num_reused is None:
            staged = self._models[_serving_role(sequence)].cache.lengths[self.row]
            sequence.num_reused = min(staged, len(sequence.prompt_ids))
        return not self._pending(sequence)

    def advance(self, sequence: Sequence, most: int) -> int:
        """Prefill a chunk of at most `most` tokens; returns its tokens. Call `ready` before and after.

        A model that is ahead runs the rest of the chunk, or waits.
        """
        models, self._chunk = self._pending(sequence), most
        first = min(model.cache.lengths[self.row] for model in models)
        end = min(first + most, len(self._token_ids))
        for model in models:
            start = model.cache.lengths[self.row]
            chunk, scored = self._token_ids[start:end], self._scored
            if not chunk:
                continue
            if scored is None or model is not self._models[_serving_role(scored)]:
                model.prefill(self.row, chunk)
            else:
                self._score(model.prefill(self.row, chunk, keep=len(chunk)), scored, start)
        return end - first

    def begin_anew(self) -> None:
        """Forget what the row holds: a prompt without numbers, or what a pass that raised has left."""
        for model in self._models:
            model.cache.clear_row(self.row, written=self._chunk)
        self._token_ids, self._scores, self._scored = [], [], None

    def prompt_log_probs(self, sequence: Sequence) -> list[TokenLogProb] | None:
        """Log-probs of the prompt's tokens from the second on, None if they were not asked for."""
        return list(self._scores) if sequence.params.prompt_log_probs else None

    def _begin_with(self, sequence: Sequence, cached: list[int]) -> None:
        self._token_ids, self._salt = cached, sequence.cache_salt
        self._scores = []
        self._scored = sequence if sequence.params.prompt_log_probs else None
        # Scores need the logits of every token, which columns do not hold.
        self._stage(cached, sequence.cache_salt, reuse=self._scored is None)
        sequence.num_reused = None

    def _stage(self, token_ids: list[int], salt: str, *, reuse: bool) -> None:
        self._prefixes.stage(token_ids, salt, reuse=reuse)

    def _scores_fit(self, sequence: Sequence) -> bool:
        if not sequence.params.prompt_log_probs:
            return True
        return self._scored is not None and _scoring_key(self._scored) == _scoring_key(sequence)

    def _pending(self, sequence: Sequence) -> list[CausalModel]:
        used = (sequence.config.uses_target, sequence.prefills_draft)
        return [
            model
            for model, is_used in zip(self._models, used, strict=False)
            if is_used and model.cache.lengths[self.row] < len(self._token_ids)
        ]

    def _score(self, logits: Tensor, sequence: Sequence, start: int) -> None:
        """Add the scores of the tokens that follow those of a chunk, `logits` `[chunk, vocab]`."""
        following = sequence.prompt_ids[start + 1 : start + 1 + len(logits)]
        logits = logits[: len(following)]
        log_probs = logits.log_softmax(-1)
        chosen = torch.tensor(following, dtype=torch.long, device=logits.device)[:, None]
        num_top = sequence.params.num_top_log_probs
        best = log_probs.topk(num_top, dim=-1)
        parts = (log_probs.gather(1, chosen), best.indices, best.values)
        packed = torch.cat([part.double() for part in parts], dim=1)
        for row in to_host(packed):
            top = top_log_probs(row[1 : 1 + num_top], row[1 + num_top :])
            self._scores.append(TokenLogProb(row[0], top))


class SideStaging(Staging):
    """The same in a free row of the batch, for a prompt of one chunk; it takes over nothing of others."""

    def begin_anew(self) -> None:
        super().begin_anew()
        self._prefixes.forget(self.row)

    def _stage(self, token_ids: list[int], salt: str, *, reuse: bool) -> None:
        self._prefixes.stage_aside(self.row, token_ids, salt)


def _serving_role(sequence: Sequence) -> int:
    """Whose log-probabilities are reported: the target's (0), or of the draft alone its own (1)."""
    return 0 if sequence.config.uses_target else 1


def _scoring_key(sequence: Sequence) -> tuple[int, int, list[int]]:
    # The prompt's last token is scored but not cached, so equal cached tokens do not make equal scores.
    return _serving_role(sequence), sequence.params.num_top_log_probs, sequence.prompt_ids
