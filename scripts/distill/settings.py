"""What a run was asked for, and where its unfinished work lies in the user's cache."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.hub import cached_file

from scripts.distill.errors import DistillError

RECIPE_VERSION = 1  # raised whenever older unfinished work no longer fits the code
CACHE_DIR = Path.home() / ".cache" / "mmtad" / "distill"
CARD_MARK = "scripts/distill-draft"  # a folder whose card holds it may be written again


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. `minutes` is wall-clock time of sampling and training together, over all resumed runs.

    `tokens` bounds what is sampled; None means half of the time without `data`, nothing with it.
    `output_vocabulary` is the number of rows the head is cut to, None for a full head. `embedded` is
    true for the pair that this repository ships.
    """

    target: str
    output: Path
    layers: int = 2
    minutes: float = 30.0
    tokens: int | None = None
    data: tuple[Path, ...] = ()
    validation: Path | None = None
    output_vocabulary: int | None = None
    seed: int = 0
    embedded: bool = False
    cache_dir: Path = CACHE_DIR

    def __post_init__(self) -> None:
        for name, lowest in (("layers", 1), ("tokens", 0), ("output_vocabulary", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                flag = name.replace("_", "-")
                raise DistillError(f"--{flag} is {value}; give a number of {lowest} or more")
        if not self.minutes > 0:
            raise DistillError(f"--minutes is {self.minutes:g}; give a number above 0")
        for path in (*self.data, *filter(None, [self.validation])):
            if not path.is_file():
                raise DistillError(f"data file {str(path)!r} does not exist; check the path")
        if self.tokens == 0 and not self.data:
            raise DistillError("--tokens 0 leaves nothing to train on; give more, or text with --data")
        self._check_output()

    @property
    def gathering_seconds(self) -> float:
        """Longest time that is spent on sampling and labelling text."""
        return self.minutes * 60 / 2

    def text_folder(self) -> Path:
        """Where sampled text is kept: by target and seed, so that drafts of other shapes share it."""
        return self.cache_dir / _digest([RECIPE_VERSION, _target_identity(self.target), self.seed])

    def training_folder(self) -> Path:
        """Where a draft in training is kept; not by `minutes`: more of them continue what is there."""
        files = [_file_identity(path) for path in (*self.data, *filter(None, [self.validation]))]
        return self.text_folder() / _digest([self.layers, self.tokens, files])

    def _check_output(self) -> None:
        if self.output.resolve() == Path(self.target).resolve():
            raise DistillError("--output is the target's own folder; name another")
        card = self.output / "README.md"
        ours = card.is_file() and CARD_MARK in card.read_text(encoding="utf-8")
        if self.output.exists() and not (self.output.is_dir() and (ours or not any(self.output.iterdir()))):
            raise DistillError(f"--output {str(self.output)!r} holds something else; name a new folder")


def _target_identity(target: str) -> list[str]:
    path = Path(target)
    if path.is_dir():
        return [str(path.resolve()), *(_file_identity(each) for each in sorted(path.iterdir()))]
    if path.is_file():
        return [_file_identity(path)]
    # Of a hub id the folder of the revision that is loaded; a name that leads nowhere is told at loading.
    return [str(cached_file(target, "config.json", _raise_exceptions_for_missing_entries=False))]


def _file_identity(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
