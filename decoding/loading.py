"""Load a target and a draft, check that they belong together and can be served, and say what they are."""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from decoding.embedded import OUTPUT_HEAD_FILE
from decoding.errors import ModelLoadError
from decoding.host import to_host
from decoding.linear import apply_float16_linear, float16_linear_available
from decoding.model import CausalModel, ChatFormat, ModelPair, OutputHead, load_causal_lm
from decoding.probe import PROBE_ROWS, probe_tree, refusal
from decoding.timing import timed

MAX_MODEL_LEN = 4096
DTYPES = ("auto", "float16", "bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")
CACHE_DIR = Path.home() / ".cache" / "mmtad"


@dataclass(frozen=True, slots=True)
class _Source:
    """A hub id or folder, and the file in it where it is GGUF."""

    name: str
    gguf_file: str | None

    @classmethod
    def of(cls, name: str) -> "_Source":
        path = Path(name)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelLoadError(f"model file {name!r} does not exist; check the path")
            return cls(str(path.parent), path.name)
        return cls(name, None)

    @property
    def label(self) -> str:
        return self.gguf_file or Path(self.name).name


@dataclass(frozen=True, slots=True)
class _Precision:
    """How weights are held: the dtype they are loaded in, and whether linear layers become float16."""

    dtype: torch.dtype
    float16_linear: bool
    note: str


def load_model_pair(
    target: str,
    draft: str | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
) -> ModelPair:
    """Load both models from hub ids, folders or GGUF files, with caches for `max_num_seqs` sequences.

    On CPUs `auto` and `float16` hold linear layers in float16 and compute in float32; `bfloat16` is
    upcast without AVX-512. `max_model_len` defaults to the models' own, at most 4096 tokens.

    Raises:
        ModelLoadError: the files cannot be loaded, the vocabularies differ or a model cannot run token
            trees; one line that names the cause and the cure.
    """
    place = _device(device)
    precision = _precision(dtype, place)
    sources = [_Source.of(name) for name in (target, draft) if name is not None]
    for source in sources:
        _refuse_own_code(source)
    tokenizers = [_load_tokenizer(source) for source in sources]
    if draft is not None:
        _check_vocabulary(*tokenizers)
    heads = [None, *(_read_output_head(source) for source in sources[1:])]
    loaded = [timed(_load_module, *each, precision) for each in zip(sources, heads, strict=True)]
    modules = [module for module, _ in loaded]
    vocab_size = min(len(tokenizers[0]), *(module.config.get_text_config().vocab_size for module in modules))
    context = _max_model_len(modules, max_model_len)
    sizes = [sum(weight.numel() for weight in module.parameters()) for module in modules]
    shares, models = [], []
    for module, head in zip(modules, heads, strict=True):
        output_ids = None if head is None else head.token_ids
        if output_ids is not None:
            special_ids = {*tokenizers[0].all_special_ids, *_eos_token_ids(modules[0], tokenizers[0])}
            _check_output_ids(output_ids, vocab_size, special_ids)
        shares.append(apply_float16_linear(module) if precision.float16_linear else 0.0)
        rows = max(max_num_seqs + 1, PROBE_ROWS)
        models.append(_serve(module, rows, context, vocab_size, place, output_ids))
    return ModelPair(
        target=models[0],
        draft=models[1] if draft is not None else None,
        vocab_size=vocab_size,
        max_model_len=context,
        eos_token_ids=_eos_token_ids(modules[0], tokenizers[0]),
        bos_token_id=tokenizers[0].bos_token_id,
        tokenizer_file=_save_tokenizer(tokenizers[0]),
        description=_describe(sources, modules, sizes, shares, precision, place),
        chat=ChatFormat.of(tokenizers[0]),
        load_seconds=dict(zip(("target", "draft"), (seconds for _, seconds in loaded), strict=False)),
    )


def _device(name: str) -> torch.device:
    if name not in DEVICES:
        raise ModelLoadError(f"device must be one of {', '.join(DEVICES)}, not {name!r}")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device 'cuda' is not available here; use --device cpu")
    if name == "cpu":
        _use_all_cores()
    return torch.device(name)


def _use_all_cores() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Allowed once per process, before the first parallel work; later pairs keep what the first one set.
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)


def _precision(dtype: str, device: torch.device) -> _Precision:
    if dtype not in DTYPES:
        raise ModelLoadError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if device.type == "cuda":
        name = ("bfloat16" if torch.cuda.is_bf16_supported() else "float16") if dtype == "auto" else dtype
        return _Precision(getattr(torch, name), False, name)
    if dtype == "bfloat16" and "AVX512" in torch.backends.cpu.get_cpu_capability():
        return _Precision(torch.bfloat16, False, "bfloat16")
    if dtype == "bfloat16":
        return _Precision(torch.float32, False, "float32 (bfloat16 upcast: this CPU has no AVX-512)")
    if dtype in ("auto", "float16") and float16_linear_available():
        return _Precision(torch.float32, True, "float16 weights, float32 activations")
    note = "float32" if dtype in ("auto", "float32") else "float32 (this CPU has no float16 linear layers)"
    return _Precision(torch.float32, False, note)


def _refuse_own_code(source: _Source) -> None:
    if source.gguf_file:
        return
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.name)
    except (OSError, ValueError) as cause:
        raise _unreadable(source, cause) from cause
    if "auto_map" in config:
        raise ModelLoadError(
            f"model {source.name!r} wants to run code of its own (auto_map in its config.json), which is "
            "never done; use a model that transformers implements"
        )


def _load_tokenizer(source: _Source) -> PreTrainedTokenizerBase:
    extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, trust_remote_code=False, **extra)
    except (OSError, ValueError, KeyError, ImportError) as cause:
        raise _unreadable(source, cause, "its tokenizer") from cause
    if not tokenizer.is_fast:
        raise ModelLoadError(f"model {source.name!r} has no fast tokenizer; add its tokenizer.json")
    return tokenizer


def _read_output_head(source: _Source) -> OutputHead | None:
    """The head over part of the vocabulary that a draft may have instead of a full one."""
    if source.gguf_file:
        return None
    path = cached_file(
        source.name,
        OUTPUT_HEAD_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    try:
        tensors = load_file(path)
        head = OutputHead(tensors["lm_head.weight"], tensors["output_ids"].long())
    except (OSError, KeyError, SafetensorError) as cause:
        raise _unreadable(source, cause, f"its {OUTPUT_HEAD_FILE}") from cause
    if head.weight.dim() != 2 or head.token_ids.shape != head.weight.shape[:1]:
        raise _unreadable(source, ValueError("weight and ids do not fit"), f"its {OUTPUT_HEAD_FILE}")
    return head


def _load_module(source: _Source, head: OutputHead | None, precision: _Precision) -> PreTrainedModel:
    try:
        return load_causal_lm(source.name, gguf_file=source.gguf_file, dtype=precision.dtype, head=head)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as cause:
        raise _unreadable(source, cause) from cause


def _unreadable(source: _Source, cause: Exception, what: str = "the model") -> ModelLoadError:
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return ModelLoadError(
        f"cannot load {what} from {source.name!r}: {reason[:300]}; give a hub id, a folder with config.json, "
        "tokenizer.json and safetensors, or a GGUF file"
    )


def _check_vocabulary(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> None:
    special = [(each.bos_token_id, each.eos_token_id) for each in (target, draft)]
    if target.get_vocab() != draft.get_vocab() or special[0] != special[1]:
        raise ModelLoadError(
            "the draft's vocabulary differs from the target's (token ids or special ids); "
            "use a draft trained with the target's tokenizer, or serve the target alone"
        )


def _check_output_ids(output_ids: Tensor, vocab_size: int, special_ids: set[int]) -> None:
    """The map from a cut head's rows to token ids must be one to one, in bounds, and keep special ids."""
    ids = to_host(output_ids)
    kept = set(ids)
    if len(kept) == len(ids) and kept.issubset(range(vocab_size)) and kept.issuperset(special_ids):
        return
    raise ModelLoadError(
        f"the token ids in the draft's {OUTPUT_HEAD_FILE} repeat, exceed the vocabulary or lack special ids; "
        "make the draft again with scripts/distill-draft"
    )


def _max_model_len(modules: list[PreTrainedModel], wanted: int | None) -> int:
    configs = [module.config.get_text_config() for module in modules]
    own = min(getattr(config, "max_position_embeddings", None) or MAX_MODEL_LEN for config in configs)
    if wanted is None:
        return min(own, MAX_MODEL_LEN)
    if not 2 <= wanted <= own:
        raise ModelLoadError(f"max_model_len must be between 2 and the models' own {own}, not {wanted}")
    return wanted


def _serve(
    module: PreTrainedModel,
    rows: int,
    max_model_len: int,
    vocab_size: int,
    device: torch.device,
    output_ids: Tensor | None,
) -> CausalModel:
    try:
        model = CausalModel(
            module,
            rows=rows,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            device=device,
            output_ids=output_ids,
        )
    except (AttributeError, TypeError, ValueError) as cause:
        raise refusal(module.config.model_type, "it has no attention cache") from cause
    probe_tree(model)
    return model


def _eos_token_ids(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    configured: Any = getattr(module.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({each for each in (*ids, tokenizer.eos_token_id) if each is not None}))


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the tokenizer as the one file that a process without transformers can read."""
    content = tokenizer.backend_tokenizer.to_str()
    folder = CACHE_DIR / "tokenizers"
    path = folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    return path


def _describe(
    sources: list[_Source],
    modules: list[PreTrainedModel],
    sizes: list[int],
    shares: list[float],
    precision: _Precision,
    device: torch.device,
) -> str:
    parts = [
        f"{source.label} ({module.config.model_type}, {size / 1e6:.0f}M)"
        for source, module, size in zip(sources, modules, sizes, strict=True)
    ]
    reduced = f" ({min(shares):.0%} of weights)" if precision.float16_linear else ""
    where = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)
    return f"{' + draft '.join(parts)}; {precision.note}{reduced}; {where}"
