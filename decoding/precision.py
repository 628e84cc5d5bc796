"""Where a pair runs and how its weights are held: device, threads, number types."""

import contextlib
from dataclasses import dataclass

import torch

from decoding.errors import ModelLoadError
from decoding.linear import float16_linear_available

DTYPES = ("auto", "float16", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are held: the dtype they are loaded in, and whether linear layers become float16."""

    dtype: torch.dtype
    float16_linear: bool
    note: str


def choose_device(name: str, ranks: int = 1) -> torch.device:
    """The device that `name` of `DEVICES` means here.

    On a CPU torch computes with every core that this process may use, or as many as `OMP_NUM_THREADS` says;
    `ranks` processes of one target divide them.

    Raises:
        ModelLoadError: no such name, or no such device.
    """
    if name not in DEVICES:
        raise ModelLoadError(f"device must be one of {', '.join(DEVICES)}, not {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device 'cuda' is not available here; use --device cpu")
    if name == "cpu":
        _share_cores(ranks)
    return torch.device(name)


def _share_cores(ranks: int) -> None:
    if ranks > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    # Allowed once per process, before the first parallel work; later pairs keep what the first one set.
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)


def choose_precision(dtype: str, device: torch.device, ranks: int = 1) -> Precision:
    """What `dtype` of `DTYPES` means on `device`; a CPU's types without instructions of their own are upcast.

    Weights that are split over `ranks` have no float16 layers of their own.

    Raises:
        ModelLoadError: no such name.
    """
    if dtype not in DTYPES:
        raise ModelLoadError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if device.type == "cuda":
        name = ("bfloat16" if torch.cuda.is_bf16_supported() else "float16") if dtype == "auto" else dtype
        return Precision(getattr(torch, name), False, name)
    if dtype == "bfloat16" and "AVX512" in torch.backends.cpu.get_cpu_capability():
        return Precision(torch.bfloat16, False, "bfloat16")
    if dtype == "bfloat16":
        return Precision(torch.float32, False, "float32 (bfloat16 upcast: this CPU has no AVX-512)")
    if ranks > 1:
        return Precision(torch.float32, False, "float32 (a split target has no float16 and no fused layers)")
    if dtype in ("auto", "float16") and float16_linear_available():
        return Precision(torch.float32, True, "float16 weights, float32 activations")
    note = "float32" if dtype in ("auto", "float32") else "float32 (this CPU has no float16 linear layers)"
    return Precision(torch.float32, False, note)
