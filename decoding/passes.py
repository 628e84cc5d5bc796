"""What one forward of a model is given, whoever runs it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward: `token_ids`, `columns`, `positions` `[rows, tokens]`, `mask` `[rows, tokens, live]`.

    `key_positions` `[rows, live]` is the position of each column, for sliding windows.
    """

    token_ids: Tensor
    columns: Tensor
    positions: Tensor
    mask: Tensor
    key_positions: Tensor
