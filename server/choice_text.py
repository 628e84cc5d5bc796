"""The text of one choice: from step events to deltas, with its log-probabilities, up to its end."""

import dataclasses
import itertools
from dataclasses import dataclass

from decoding import FinishReason
from server.logprobs import Origin, TokenEntry
from server.messages import StepEvent, TokenScore
from server.text import Detokenizer, StopMatch, StopScanner, TextCodec


@dataclass(frozen=True, slots=True)
class Prefix:
    """An echoed prompt: its text, and where in it each of its tokens begins, in characters."""

    text: str
    token_ids: list[int]
    offsets: list[int]

    @classmethod
    def of(
        cls, codec: TextCodec, prompt: str | None, token_ids: list[int], *, skip_special_tokens: bool
    ) -> "Prefix":
        """`prompt` is the text that was sent, None where it was token ids: then it is their text."""
        detokenizer = Detokenizer(codec, [], skip_special_tokens=skip_special_tokens and prompt is None)
        pieces = [detokenizer.push([token_id]) for token_id in token_ids]
        text = "".join(pieces) + detokenizer.flush()
        starts = [0, *itertools.accumulate(len(piece) for piece in pieces)][: len(token_ids)]
        if prompt is None:
            return cls(text, token_ids, starts)
        # What the tokenizer itself put in front, such as BOS, is not in the text that was sent.
        added = len(text) - len(prompt) if text.endswith(prompt) else 0
        offsets = [min(max(start - added, 0), len(prompt)) for start in starts]
        return cls(prompt, token_ids, offsets)

    def entries(self, scores: list[TokenScore], origin: Origin | None = None) -> list[TokenEntry]:
        first = TokenEntry(self.token_ids[0], None, [], self.offsets[0], origin)
        rest = zip(self.token_ids[1:], scores, self.offsets[1:], strict=True)
        return [first, *(TokenEntry(each, score.log_prob, score.top, at, origin) for each, score, at in rest)]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to one choice; `num_tokens` counts all of its tokens so far.

    `entries` are the tokens that begin in the text shown so far and were in no delta before; None
    where no log-probabilities were asked for.
    """

    choice: int
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    entries: list[TokenEntry] | None = None


@dataclass(frozen=True, slots=True)
class TextRules:
    """What of a choice's tokens becomes text, and whether its log-probabilities are wanted.

    With `origins` they say which model proposed each token.
    """

    stop_token_ids: list[int]
    include_stop: bool
    min_tokens: int = 0
    log_probs: bool = False
    origins: bool = False


class ChoiceText:
    """The text of one choice; the only place where text ends."""

    def __init__(
        self, detokenizer: Detokenizer, scanner: StopScanner, rules: TextRules, prefix: Prefix | None = None
    ) -> None:
        self._detokenizer = detokenizer
        self._scanner = scanner
        self._rules = rules
        self._prefix = prefix
        self._num_decoded = 0  # characters, shown or held back by the scanner
        self._num_shown = 0
        self._entries: list[TokenEntry] = []  # of text that is not shown yet
        self.num_tokens = 0
        self.log_prob_sum = 0.0
        self.finished = False

    def push(self, event: StepEvent) -> Delta:
        """Text that is due, with the end of the choice where one was reached."""
        shown = self._echo(event)
        num_new = len(event.token_ids)
        before = self.num_tokens
        for position, piece in enumerate(self._pieces(event)):
            # One piece a token, and a last one that only the end of the choice released.
            num_tokens = before + min(position + 1, num_new)
            if position < num_new:
                self._note(event, position)
            self._num_decoded += len(piece)
            found = self._scanner.push(piece, search=num_tokens > self._rules.min_tokens)
            if isinstance(found, StopMatch):
                return self._end(event.choice, shown + found.text, FinishReason.STOP, found.stop)
            shown += found
        if event.finish_reason is None:
            return self._delta(event.choice, shown)
        stop_ids = self._rules.stop_token_ids
        stop_id = event.stop_token_id if event.stop_token_id in stop_ids else None
        return self._end(event.choice, shown + self._scanner.flush(), event.finish_reason, stop_id)

    @property
    def log_prob_mean(self) -> float:
        return self.log_prob_sum / self.num_tokens if self.num_tokens else float("-inf")

    def _echo(self, event: StepEvent) -> str:
        """The prompt, in front of the first event's text."""
        prefix, self._prefix = self._prefix, None
        if prefix is None:
            return ""
        if self._rules.log_probs:
            origin: Origin | None = "prompt" if self._rules.origins else None
            self._entries += prefix.entries(event.prompt_log_probs or [], origin)
        self._num_decoded += len(prefix.text)
        return prefix.text

    def _pieces(self, event: StepEvent) -> list[str]:
        """The text of each token: of an end that is left out it is empty."""
        token_ids = event.token_ids
        pieces = [self._detokenizer.push([token_id]) for token_id in token_ids[:-1]]
        left_out = event.finish_reason is FinishReason.STOP and not self._rules.include_stop
        pieces += ["" if left_out else self._detokenizer.push(token_ids[-1:])] if token_ids else []
        return pieces if event.finish_reason is None else [*pieces, self._detokenizer.flush()]

    def _note(self, event: StepEvent, position: int) -> None:
        """Count a token, and keep its log-probability for the delta that shows where it begins."""
        log_prob = event.log_probs[position]
        self.num_tokens += 1
        self.log_prob_sum += log_prob
        if self._rules.log_probs:
            top = event.top_log_probs[position] if event.top_log_probs else []
            token_id, at = event.token_ids[position], self._num_decoded
            self._entries.append(TokenEntry(token_id, log_prob, top, at, self._origin(event, position)))

    def _origin(self, event: StepEvent, position: int) -> Origin | None:
        if not self._rules.origins:
            return None
        return "draft" if position in event.draft_positions else "target"

    def _end(self, choice: int, text: str, reason: FinishReason, stop: str | int | None) -> Delta:
        self.finished = True
        return self._delta(choice, text, reason, stop)

    def _delta(
        self, choice: int, text: str, reason: FinishReason | None = None, stop: str | int | None = None
    ) -> Delta:
        self._num_shown += len(text)
        entries = self._release() if self._rules.log_probs else None
        return Delta(choice, text, self.num_tokens, reason, stop, entries)

    def _release(self) -> list[TokenEntry]:
        """The entries whose place in the text is certain: shown, or at the end of a text that ended."""
        shown = self._num_shown
        if self.finished:
            due = [dataclasses.replace(each, offset=min(each.offset, shown)) for each in self._entries]
        else:
            due = list(itertools.takewhile(lambda each: each.offset < shown, self._entries))
        del self._entries[: len(due)]
        return due
