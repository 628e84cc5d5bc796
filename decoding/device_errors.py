"""What an error of the device means: memory that ran out comes back, a device that is lost does not."""

import logging
import traceback

import torch

from decoding.errors import RankError, one_line

MEMORY_SIGNS = ("out of memory", "alloc_failed", "can't allocate memory")

logger = logging.getLogger(__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether only memory was missing: PyTorch's own error, that of a library, or of a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in MEMORY_SIGNS)


def is_device_lost(error: Exception) -> bool:
    """Whether nothing will run in this process any more: every other error of CUDA, any of a split target."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError | RankError) or str(error).startswith("CUDA error")


def release_memory(error: Exception, device: torch.device) -> None:
    """Give back what the step that raised `error` still holds, and what the allocator keeps for later.

    A recording that failed may have left the allocator unable to: the rest is done without it.
    """
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError as refusal:
            logger.warning("the device's allocator gives nothing back: %s", one_line(refusal, 200))
