"""The one reader of device values."""

import torch

from decoding.host import to_host


def test_to_host_keeps_shape_and_values() -> None:
    assert to_host(torch.tensor([[1.5, -2.0], [0.1, 3.0]], dtype=torch.float64)) == [[1.5, -2.0], [0.1, 3.0]]
    assert to_host(torch.tensor([], dtype=torch.long)) == []
