"""Text that a target wrote, with its likeliest next tokens at each position."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from scripts.distill.errors import DistillError

STORED_TOKENS = 16  # likeliest tokens kept per position
HELD_OUT_SHARE = 20  # one sequence in so many is not trained on
MOST_HELD_OUT = 96


@dataclass(frozen=True, slots=True)
class Text:
    """`token_ids` `[sequences, tokens]` as sampled behind the opening, and the target's view of them.

    `top_ids` and `top_log_probs` `[sequences, tokens, stored]` are the likeliest tokens before the one
    at the same index, best first, and their log-probabilities in nats; -inf where a file stored fewer.
    """

    token_ids: Tensor
    top_ids: Tensor
    top_log_probs: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    def select(self, index: Tensor) -> "Text":
        """The sequences `index` `[chosen]`."""
        return Text(self.token_ids[index], self.top_ids[index], self.top_log_probs[index])

    def to(self, device: torch.device) -> "Text":
        """On `device`, as integers to index with and float32."""
        return Text(
            self.token_ids.long().to(device),
            self.top_ids.long().to(device),
            self.top_log_probs.float().to(device),
        )

    def save(self, path: Path) -> None:
        """Write the file in one rename; ids as 16 bits where they fit."""
        ids = np.uint16 if max(int(self.token_ids.max()), int(self.top_ids.max())) < 2**16 else np.int32
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(
            partial,
            token_ids=self.token_ids.numpy().astype(ids),
            top_ids=self.top_ids.numpy().astype(ids),
            top_log_probs=self.top_log_probs.numpy().astype(np.float16),
        )
        partial.replace(path)


def load_token_ids(path: Path, vocab_size: int) -> Tensor:
    """The sampled ids `[sequences, tokens]` of a file, labelled or not.

    Raises:
        DistillError: the file is not such a file, or has ids outside the vocabulary.
    """
    return _array(path, "token_ids", dimensions=2, vocab_size=vocab_size)


def load_text(path: Path, vocab_size: int) -> Text | None:
    """The text of a file with its labels, None if it has none.

    Raises:
        DistillError: as `load_token_ids`.
    """
    if "top_ids" not in _names(path):
        return None
    token_ids = load_token_ids(path, vocab_size)
    top_ids = _array(path, "top_ids", dimensions=3, vocab_size=vocab_size)
    top_log_probs = _array(path, "top_log_probs", dimensions=3)
    if not top_ids.shape == top_log_probs.shape or top_ids.shape[:2] != token_ids.shape:
        raise DistillError(f"{path.name}: the shapes of its arrays do not fit; see --help for what is read")
    kept = slice(0, STORED_TOKENS)
    return Text(token_ids, top_ids[:, :, kept], top_log_probs[:, :, kept])


def _names(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return list(arrays.files)
    except (OSError, ValueError, AttributeError) as error:
        raise DistillError(f"{path.name} is not an .npz file; see --help for what is read") from error


def _array(path: Path, name: str, *, dimensions: int, vocab_size: int | None = None) -> Tensor:
    if name not in _names(path):
        raise DistillError(f"{path.name} has no array {name!r}; see --help for what is read")
    with np.load(path, allow_pickle=False) as arrays:
        array = arrays[name]
    if array.ndim != dimensions or array.size == 0:
        raise DistillError(f"{path.name}: {name} must have {dimensions} dimensions and not be empty")
    if vocab_size is None:
        return torch.from_numpy(array.astype(np.float16))
    if array.min() < 0 or array.max() >= vocab_size:
        raise DistillError(f"{path.name}: {name} exceeds the target's vocabulary; give text of this target")
    return torch.from_numpy(array.astype(np.int32))


def joined(parts: Iterable[Text]) -> Text:
    """All sequences of `parts`; where a part stored fewer tokens, probability zero fills up.

    Raises:
        DistillError: the sequences differ in length.
    """
    texts = list(parts)
    lengths = {text.token_ids.shape[1] for text in texts}
    if len(lengths) > 1:
        raise DistillError(
            f"sequences of {sorted(lengths)} tokens; give files whose sequences are equally long"
        )
    stored = max(text.top_ids.shape[2] for text in texts)
    missing = [(0, stored - text.top_ids.shape[2]) for text in texts]
    return Text(
        torch.cat([text.token_ids for text in texts]),
        torch.cat([pad(each.top_ids, more) for each, more in zip(texts, missing, strict=True)]),
        torch.cat(
            [
                pad(each.top_log_probs, more, value=-torch.inf)
                for each, more in zip(texts, missing, strict=True)
            ]
        ),
    )


def split(text: Text) -> tuple[Text, Text]:
    """Sequences to train on, and evenly spaced ones to judge the draft on.

    Raises:
        DistillError: there are fewer than two sequences.
    """
    if len(text) < 2:
        raise DistillError("one sequence cannot be split into training and held-out text; give more --tokens")
    count = min(max(1, len(text) // HELD_OUT_SHARE), MOST_HELD_OUT)
    held_out = torch.zeros(len(text), dtype=torch.bool)
    held_out[torch.linspace(0, len(text) - 1, count).long()] = True
    return text.select(~held_out), text.select(held_out)
