"""Text in, text out: tokenizing off the event loop, incremental detokenizing, stop strings."""

import asyncio
import json
import re
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in the manner of SentencePiece
WORD_START = "\u2581"
PROMPT_TAIL = 6  # ids of the prompt that set the context (leading spaces) of the first new token


class TextCodec:
    """A tokenizer as this server uses it; safe to share between requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.longest_token_bytes = max(len(token.encode()) for token in tokenizer.get_vocab())
        self._added = _added_tokens(tokenizer)
        self._texts: dict[int, str] = {}  # of tokens already shown: a scored prompt shows thousands
        self._byte_of = _byte_alphabet() if _is_byte_level(tokenizer) else {}

    @classmethod
    def from_file(cls, path: str) -> "TextCodec":
        return cls(Tokenizer.from_file(path))

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, without tokenizing it."""
        return -(-len(text.encode()) // self.longest_token_bytes)

    async def encode(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids, with the special tokens that the tokenizer itself adds; runs in a thread.

        Only the batch calls release the interpreter lock while they work.
        """
        encodings = await asyncio.to_thread(
            self.tokenizer.encode_batch_fast, texts, add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def strings(self, token_ids: list[int]) -> list[str | None]:
        """The tokens as the vocabulary writes them."""
        return [self.tokenizer.id_to_token(token_id) for token_id in token_ids]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, whatever its neighbours."""
        token: str = self._added.get(token_id) or self.tokenizer.id_to_token(token_id) or ""
        if token_id in self._added:
            return token.encode()
        if self._byte_of:
            return bytes(self._byte_of[character] for character in token if character in self._byte_of)
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        return token.replace(WORD_START, " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token as text; part of a character is `bytes:` and its bytes in hexadecimal, as in OpenAI."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = _as_text(self.token_bytes(token_id))
        return text


def _as_text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _added_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    return {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its tokens are written in the byte-level alphabet; tokenizers shows parts only as JSON."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    return any(part["type"] == "ByteLevel" for part in [*decoder.get("decoders", []), decoder] if part)


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of the byte-level alphabet: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


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

    def push(self, text: str, *, search: bool = True) -> str | StopMatch:
        """Text that is safe to show, or the match that ends it.

        Without `search` nothing ends here, but a stop string may begin here and end later.
        """
        if not self._stops:
            return text
        window = self._held + text
        match = self._first_match(window, len(self._held)) if search else None
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

    def _first_match(self, window: str, num_old: int) -> tuple[int, int, str] | None:
        """Of the matches that end beyond `num_old` characters the one that ends first.

        Of those that end together the one that starts first, so that no stop string stays visible.
        """
        found = [(window.find(stop, max(0, num_old - len(stop) + 1)), stop) for stop in self._stops]
        matches = [(start, start + len(stop), stop) for start, stop in found if start >= 0]
        return min(matches, key=lambda match: (match[1], match[0]), default=None)

    def _longest_partial(self, window: str) -> int:
        return max((_overlap(window, stop) for stop in self._stops), default=0)


def _overlap(window: str, stop: str) -> int:
    """Length of the longest end of `window` that begins `stop`."""
    longest = min(len(window), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if window.endswith(stop[:size])), 0)
