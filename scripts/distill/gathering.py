"""Brings the text together: files that were given, labels for those without, and what is sampled anew.

Everything made here is kept in shards in the user's cache, so that a run that was cut off goes on
with the next one. What a draft's training began with is noted, and never changes under it.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from scripts.distill.errors import DistillError
from scripts.distill.progress import Progress
from scripts.distill.settings import Settings
from scripts.distill.target import ROWS, SEQUENCE_TOKENS, Target, Writer
from scripts.distill.text import Text, joined, load_text, load_token_ids, split

SHARD_SEED_STRIDE = 1_000_003
NOTE = "gathered.json"

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Text to train on and to judge by; `seconds` it took, `sampled` of its tokens the target's new ones."""

    training: Text
    held_out: Text
    seconds: float
    sampled: int


class Gatherer:
    """Makes or loads the text of one run, in at most half of its time."""

    def __init__(self, settings: Settings, target: Target, progress: Progress) -> None:
        self._settings, self._target, self._progress = settings, target, progress
        self._folder = settings.text_folder()
        self._note = settings.training_folder() / NOTE
        self._noted: dict[str, int] = {}
        self._made: dict[str, int] = {}
        self._started = time.monotonic()

    def run(self) -> Gathered:
        """All text; what was noted when training began, if it did."""
        noted = json.loads(self._note.read_text()) if self._note.is_file() else {}
        self._noted = noted.get("shards", {})
        self._check_length()
        self._folder.mkdir(parents=True, exist_ok=True)
        parts = [self._labelled(path, timed=True) for path in self._settings.data]
        new = self._sampled()
        text = joined([*parts, *new])
        validation = self._settings.validation
        if validation is None:
            training, held_out = split(text)
        else:
            training, held_out = text, self._labelled(validation, timed=False)
        seconds = noted.get("seconds", time.monotonic() - self._started)
        self._write_note(seconds)
        return Gathered(training, held_out, seconds, sum(part.num_tokens for part in new))

    @cached_property
    def _num_tokens(self) -> int:
        """Tokens in each sequence: as in the given files, else the usual number."""
        longest = self._target.longest_sequence
        files = [*self._settings.data, *filter(None, [self._settings.validation])]
        if not files:
            return min(SEQUENCE_TOKENS, longest)
        return max(load_token_ids(path, self._target.vocab_size).shape[1] for path in files)

    def _check_length(self) -> None:
        longest = self._target.longest_sequence
        if self._num_tokens > longest:
            raise DistillError(
                f"sequences of {self._num_tokens} tokens exceed the target's {longest}; give shorter ones"
            )

    @cached_property
    def _writer(self) -> Writer:
        return Writer(self._target, self._num_tokens)

    def _labelled(self, path: Path, *, timed: bool) -> Text:
        """The text of a file; without labels, as much of it as could be labelled if `timed`."""
        text = load_text(path, self._target.vocab_size)
        if text is not None:
            return text
        token_ids = load_token_ids(path, self._target.vocab_size)
        name = f"labelled-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
        count = -(-len(token_ids) // ROWS)

        def make(number: int, advance: Advance) -> Text:
            return self._writer.label(_rows(token_ids, number), advance)

        return joined(self._shards(name, f"labelling {path.name}", count, make, timed=timed))

    def _sampled(self) -> list[Text]:
        tokens = self._settings.tokens
        if tokens is None and self._settings.data:
            return []
        count = None if tokens is None else -(-tokens // (ROWS * self._num_tokens))

        def make(number: int, advance: Advance) -> Text:
            return self._writer.sample(self._settings.seed * SHARD_SEED_STRIDE + number, advance)

        return self._shards(f"sampled-{self._num_tokens}", "sampling", count, make, timed=True)

    def _shards(
        self,
        name: str,
        what: str,
        count: int | None,
        make: Callable[[int, Advance], Text],
        *,
        timed: bool,
    ) -> list[Text]:
        """Shards 0 to `count`, loaded or made; if `timed`, those that time allows, one at least."""
        texts: list[Text] = []
        count = self._noted.get(name, count)
        advance: Advance | None = None
        while count is None or len(texts) < count:
            path = self._folder / f"{name}-{len(texts):05}.npz"
            text = load_text(path, self._target.vocab_size) if path.is_file() else None
            if text is None:
                if timed and texts and self._seconds_left() <= 0:
                    self._progress.say(
                        f"{what}: stopped at half of --minutes, {len(texts)} of its parts done"
                    )
                    break
                missing = None if count is None else (count - len(texts)) * ROWS * self._num_tokens
                advance = advance or self._meter(what, missing)
                text = make(len(texts), advance)
                text.save(path)
            texts.append(text)
        self._made[name] = len(texts)
        return texts

    def _meter(self, what: str, most: int | None) -> Advance:
        """Shows progress as tokens are done; `most` is how many there will be, if that is known."""
        started, done, shard = time.monotonic(), 0, ROWS * self._num_tokens

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            seconds = time.monotonic() - started
            # A shard that was begun is finished.
            left = max(self._seconds_left(), -done % shard * seconds / done)
            if most is not None:
                left = min(left, (most - done) * seconds / done)
            self._progress.show(what, tokens=done, seconds=seconds, left=left)

        return advance

    def _seconds_left(self) -> float:
        return self._settings.gathering_seconds - (time.monotonic() - self._started)

    def _write_note(self, seconds: float) -> None:
        self._note.parent.mkdir(parents=True, exist_ok=True)
        partial = self._note.with_suffix(".partial")
        partial.write_text(json.dumps({"seconds": seconds, "shards": self._made}))
        partial.replace(self._note)


def _rows(token_ids: Tensor, number: int) -> Tensor:
    return token_ids[number * ROWS : (number + 1) * ROWS]
