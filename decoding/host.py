"""The only place where device values are read by Python: one call per engine step."""

from typing import Any

from torch import Tensor


def to_host(values: Tensor) -> list[Any]:
    """Copy one device tensor to the host and return it as nested lists. Synchronises the device."""
    rows: list[Any] = values.cpu().tolist()
    return rows
