"""What stands for CUDA graphs on a CPU: operations are recorded, and repeated on the same tensors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decoding import ModelPair
from tests.decoding.host_reads import host_read

Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


def tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    """Operations on tensors, without the Python around them: what that reads is what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if read := host_read(func, args):
            raise RuntimeError(f"{read} is not permitted when the stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        """All again; before each operation its result holds rubbish, as memory of a pool does."""
        for func, args, kwargs, recorded in self.calls:
            inputs = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
            fresh = [each for each in tensors(recorded) if each.untyped_storage().data_ptr() not in inputs]
            for each in fresh:
                each.fill_(math.nan if each.is_floating_point() else 1)
            again = func(*args, **kwargs)
            for old, new in zip(tensors(recorded), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """Records on a CPU; `tapes` are what was recorded, oldest first."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        # Outside inference mode operations are seen in their parts, and what a caller made in it would fail.
        with torch.inference_mode(False), torch.no_grad():
            work()
            with Tape() as tape:
                work()
        self.tapes.append(tape)
        return tape.replay


def with_graphs(pair: ModelPair, recorder: Any = None) -> ModelPair:
    """The same pair, whose passes are replayed from now on."""
    recorder = TapeRecorder() if recorder is None else recorder
    for model in pair.models.values():
        model.use_graphs(recorder)
    return pair
