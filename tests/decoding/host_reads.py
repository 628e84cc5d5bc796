"""What makes Python wait for a device, noticed on a CPU, where nothing waits."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")


def host_read(func: Any, args: Any) -> str | None:
    """The operation, if its result or its shape must be read from the device."""
    name: str = func.overloadpacket.__name__
    if name in HOST_READS:
        return name
    indices = args[1] if name in ("index", "index_put", "index_put_") else ()
    return "boolean mask" if any(each is not None and each.dtype == torch.bool for each in indices) else None


class NoHostReads(TorchDispatchMode):
    """Fails on operations that read from the device, or copy numbers to it, out of inference mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = host_read(func, args)
        assert read is None, read
        # A single number, as in an assignment, goes with the operation that writes it.
        upload = func.overloadpacket.__name__ == "lift_fresh" and args[0].dim()
        assert not upload, "a tensor made of Python's numbers"
        return func(*args, **(kwargs or {}))
