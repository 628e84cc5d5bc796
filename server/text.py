"""Text in, text out: tokenizing off the event loop, incremental detokenizing, stop strings."""

import asyncio
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from decoding import FinishReason
from server.messages import StepEvent

REPLACEMENT = "\ufffd"
PROMPT_TAIL = 6  # ids of the prompt that set the context (leading spaces) of the first new token


class TextCodec:
    """A tokenizer as this server uses it; safe to share between requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.longest_token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())

    @classmethod
    def from_file(cls, path: str) -> "TextCodec":
        return cls(Tokenizer.from_file(path))

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, without tokenizing it."""
        return -(-len(text.encode()) // self.longest_token_bytes)

    async def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids with the tokenizer's own special tokens; runs in a thread.

        Only the batch calls release the interpreter lock while they work.
        """
        encodings = await asyncio.to_thread(self.tokenizer.encode_batch_fast, texts)
        return [encoding.ids for encoding in encodings]


class Detokenizer:
    """Token ids of one choice to text, never emitting half a character."""

    def __init__(self, codec: TextCodec, prompt_ids: list[int], *, skip_special_tokens: bool) -> None:
        self._tokenizer = codec.tokenizer
        self._skip = skip_special_tokens
        self._context = self._tail(prompt_ids)
        self._held: list[int] = []
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)

    def push(self, token_ids: list[int]) -> str:
        """The text that these tokens complete."""
        if not token_ids:
            return ""
        self._held += token_ids
        text = self._stream.step(self._tokenizer, token_ids)
        if text is None:
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """What is still held at the end, broken characters as U+FFFD."""
        if not self._held:
            return ""
        before = self._decode(self._context)
        text = self._decode(self._context + self._held)
        self._held = []
        return text[len(before) :] if text.startswith(before) else ""

    def _tail(self, prompt_ids: list[int]) -> list[int]:
        """The end of the prompt, cut where it decodes to whole characters; else nothing."""
        for start in range(max(0, len(prompt_ids) - PROMPT_TAIL), len(prompt_ids)):
            text = self._decode(prompt_ids[start:])
            if text and not text.startswith(REPLACEMENT) and not text.endswith(REPLACEMENT):
                return prompt_ids[start:]
        return []

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


@dataclass(frozen=True, slots=True)
class StopMatch:
    """The stop string that ended the text, and the last text that the choice keeps."""

    stop: str
    text: str


class StopScanner:
    """Finds the stop string that is completed first, holding back what may still become one.

    The outcome depends on the text alone, not on how it was cut into pieces.
    """

    def __init__(self, stops: list[str], *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    @property
    def active(self) -> bool:
        return bool(self._stops)

    def push(self, text: str) -> str | StopMatch:
        """Text that is safe to show, or the match that ends it."""
        window = self._held + text
        match = self._first_match(window)
        if match is None:
            safe = len(window) - self._longest_partial(window)
            self._held = window[safe:]
            return window[:safe]
        start, end, stop = match
        self._held = ""
        return StopMatch(stop=stop, text=window[: end if self._include else start])

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str) -> tuple[int, int, str] | None:
        """Earliest end wins, of those the earliest start, so that no stop string stays visible."""
        found = [(window.find(stop), stop) for stop in self._stops]
        matches = [(start, start + len(stop), stop) for start, stop in found if start >= 0]
        return min(matches, key=lambda match: (match[1], match[0]), default=None)

    def _longest_partial(self, window: str) -> int:
        return max((_overlap(window, stop) for stop in self._stops), default=0)


def _overlap(window: str, stop: str) -> int:
    """Length of the longest end of `window` that begins `stop`."""
    longest = min(len(window), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if window.endswith(stop[:size])), 0)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event adds to one choice; `num_tokens` counts all of its tokens so far."""

    choice: int
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class ChoiceText:
    """The text of one choice, from step events to deltas; the only place where text ends."""

    def __init__(
        self, detokenizer: Detokenizer, scanner: StopScanner, stop_token_ids: list[int], *, include_stop: bool
    ) -> None:
        self._detokenizer = detokenizer
        self._scanner = scanner
        self._stop_token_ids = stop_token_ids
        self._include_stop = include_stop
        self.num_tokens = 0
        self.finished = False

    def push(self, event: StepEvent) -> Delta:
        """Text that is due, with the end of the choice where one was reached."""
        pieces = self._pieces(event)
        shown = ""
        for position, piece in enumerate(pieces):
            found = self._scanner.push(piece)
            if isinstance(found, StopMatch):
                # One piece a token, and a last one that only the end of the choice released.
                self.num_tokens += min(position + 1, len(event.token_ids))
                return self._end(event.choice, shown + found.text, FinishReason.STOP, found.stop)
            shown += found
        self.num_tokens += len(event.token_ids)
        if event.finish_reason is None:
            return Delta(event.choice, shown, self.num_tokens)
        stop_id = event.stop_token_id if event.stop_token_id in self._stop_token_ids else None
        return self._end(event.choice, shown + self._scanner.flush(), event.finish_reason, stop_id)

    def _pieces(self, event: StepEvent) -> list[str]:
        token_ids = event.token_ids
        if event.finish_reason is FinishReason.STOP and not self._include_stop:
            token_ids = token_ids[:-1]
        if event.finish_reason is None and not self._scanner.active:
            return [self._detokenizer.push(token_ids)]
        pieces = [self._detokenizer.push([token_id]) for token_id in token_ids]
        return [*pieces, self._detokenizer.flush()] if event.finish_reason is not None else pieces

    def _end(self, choice: int, text: str, reason: FinishReason, stop: str | int | None) -> Delta:
        self.finished = True
        return Delta(choice, text, self.num_tokens, reason, stop)
