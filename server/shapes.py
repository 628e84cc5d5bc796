"""How one generation is written: as a completion or as a chat completion."""

from collections.abc import Iterable
from typing import Any, Protocol

from server.choice_text import Delta
from server.logprobs import TokenEntry, chat_log_probs, completion_log_probs
from server.text import TextCodec


class Shape(Protocol):
    """The parts in which the answers of the routes differ."""

    whole_object: str
    chunk_object: str

    def whole(self, codec: TextCodec, index: int, text: str, end: Delta) -> dict[str, Any]:
        """A finished choice; `end` is its last delta, with the entries of all."""

    def chunk(self, codec: TextCodec, delta: Delta, *, first: bool) -> dict[str, Any]:
        """What one delta adds to a choice; `first` for the first one of the choice."""


class CompletionShape:
    whole_object = chunk_object = "text_completion"

    def whole(self, codec: TextCodec, index: int, text: str, end: Delta) -> dict[str, Any]:
        shown = None if end.entries is None else completion_log_probs(codec, end.entries)
        return {"index": index, "text": text, "logprobs": shown, **_ends(end)}

    def chunk(self, codec: TextCodec, delta: Delta, *, first: bool) -> dict[str, Any]:
        return self.whole(codec, delta.choice, delta.text, delta)


class ChatShape:
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, codec: TextCodec, index: int, text: str, end: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": _chat(codec, end.entries), **_ends(end)}

    def chunk(self, codec: TextCodec, delta: Delta, *, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        added = role | ({"content": delta.text} if delta.text or first else {})
        shown = _chat(codec, delta.entries)
        return {"index": delta.choice, "delta": added, "logprobs": shown, **_ends(delta)}


def _chat(codec: TextCodec, entries: Iterable[TokenEntry] | None) -> dict[str, Any] | None:
    return None if entries is None else chat_log_probs(codec, entries)


def _ends(delta: Delta) -> dict[str, Any]:
    return {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
