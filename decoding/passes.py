"""What one forward of a model is given, whoever runs it: the model itself or a graph of it."""

from dataclasses import dataclass

import torch
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

    @classmethod
    def blank(cls, rows: int, tokens: int, live: int, device: torch.device) -> "Pass":
        """Tensors of a shape, to be filled."""

        def numbers(size: int) -> Tensor:
            return torch.empty(rows, size, dtype=torch.long, device=device)

        mask = torch.empty(rows, tokens, live, dtype=torch.bool, device=device)
        return cls(numbers(tokens), numbers(tokens), numbers(tokens), mask, numbers(live))

    def pad(self, trash_column: int) -> None:
        """Make every row one that belongs to nobody: it sees its first column alone, and writes to trash.

        It must see something: a row that sees nothing has no finite states, and would leave them there.
        """
        self.token_ids.zero_()
        self.columns.fill_(trash_column)
        self.positions.zero_()
        self.mask.zero_()
        self.mask[:, :, 0] = True
        self.key_positions.zero_()

    def take(self, rows: slice, other: "Pass") -> None:
        """Copy `other`, of the same tokens and live length, into `rows`."""
        self.token_ids[rows] = other.token_ids
        self.columns[rows] = other.columns
        self.positions[rows] = other.positions
        self.mask[rows] = other.mask
        self.key_positions[rows] = other.key_positions
