"""Log-probabilities as a client reads them: the objects of completions and of chat."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from server.messages import TopLogProbs
from server.text import TextCodec

LOWEST_LOG_PROB = -9999.0  # what -inf is written as

Origin = Literal["prompt", "draft", "target"]


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token of a choice: `offset` is where it begins in the choice's text, in characters.

    The first token of an echoed prompt has no log-probability. `origin` says where it comes from: the
    model that proposed it, where that was asked for.
    """

    token_id: int
    log_prob: float | None
    top: TopLogProbs
    offset: int
    origin: Origin | None = None


def completion_log_probs(codec: TextCodec, entries: Iterable[TokenEntry]) -> dict[str, Any]:
    """The log-prob object of `/v1/completions`: parallel lists, one element per token."""
    listed = list(entries)
    shown: dict[str, Any] = {
        "tokens": [codec.token_text(entry.token_id) for entry in listed],
        "token_logprobs": [_finite(entry.log_prob) for entry in listed],
        "top_logprobs": [_top(codec, entry) for entry in listed],
        "text_offset": [entry.offset for entry in listed],
    }
    origins = [entry.origin for entry in listed if entry.origin is not None]
    return shown | {"origins": origins} if origins else shown


def _top(codec: TextCodec, entry: TokenEntry) -> dict[str, float | None] | None:
    """The likeliest tokens and the one that was taken; of equal texts the likelier counts."""
    if entry.log_prob is None:
        return None
    top: dict[str, float | None] = {}
    for token_id, log_prob in [*entry.top, (entry.token_id, entry.log_prob)]:
        top.setdefault(codec.token_text(token_id), _finite(log_prob))
    return top


def chat_log_probs(codec: TextCodec, entries: Iterable[TokenEntry]) -> dict[str, Any]:
    """The log-prob object of `/v1/chat/completions`: one object per token."""
    content = [
        _chat_token(codec, entry.token_id, entry.log_prob)
        | {"top_logprobs": [_chat_token(codec, token_id, value) for token_id, value in entry.top]}
        | ({} if entry.origin is None else {"origin": entry.origin})
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(codec: TextCodec, token_id: int, log_prob: float | None) -> dict[str, Any]:
    return {
        "token": codec.token_text(token_id),
        "logprob": _finite(log_prob),
        "bytes": list(codec.token_bytes(token_id)),
    }


def _finite(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, LOWEST_LOG_PROB)
