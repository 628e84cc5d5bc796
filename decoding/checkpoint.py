"""Reads the files of one model: its weights, its tokenizer, a cut head.

Whatever cannot be read raises `ModelLoadError`, one line that names the cause and the cure.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from decoding.embedded import OUTPUT_HEAD_FILE
from decoding.errors import ModelLoadError, one_line
from decoding.module import OutputHead, load_causal_lm


@dataclass(frozen=True, slots=True)
class Source:
    """A hub id or folder, and the file in it where it is GGUF."""

    name: str
    gguf_file: str | None

    @classmethod
    def of(cls, name: str) -> "Source":
        """Of a hub id, a folder or a path that ends in `.gguf`."""
        path = Path(name)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelLoadError(f"model file {name!r} does not exist; check the path")
            return cls(str(path.parent), path.name)
        return cls(name, None)

    @property
    def label(self) -> str:
        """What the load line calls it."""
        return self.gguf_file or Path(self.name).name


def refuse_own_code(source: Source) -> None:
    """Raise where the model's configuration asks for code that comes with its files."""
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


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer."""
    extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, trust_remote_code=False, **extra)
    except (OSError, ValueError, KeyError, ImportError) as cause:
        raise _unreadable(source, cause, "its tokenizer") from cause
    if not tokenizer.is_fast:
        raise ModelLoadError(f"model {source.name!r} has no fast tokenizer; add its tokenizer.json")
    return tokenizer


def read_output_head(source: Source) -> OutputHead | None:
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


def refuse_split(source: Source, ranks: int) -> None:
    """Raise where the model's heads cannot be divided among `ranks` processes."""
    if source.gguf_file:
        raise _not_split(source, ranks, "GGUF files are not split", "give safetensors")
    try:
        config = AutoConfig.from_pretrained(source.name).get_text_config()
    except (OSError, ValueError, KeyError) as cause:
        raise _unreadable(source, cause) from cause
    plan = getattr(config, "base_model_tp_plan", None) or {}
    if not any(name.endswith(".k_proj") and style == "colwise" for name, style in plan.items()):
        raise _not_split(
            source,
            ranks,
            f"transformers has no plan that splits the heads of {config.model_type!r}",
            "leave the flag out",
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % ranks or kv_heads % ranks:
        reason = f"it has {heads} heads over {kv_heads} of keys and values"
        raise _not_split(source, ranks, reason, "use a number that divides both")


def _not_split(source: Source, ranks: int, reason: str, cure: str) -> ModelLoadError:
    return ModelLoadError(
        f"model {source.name!r} cannot be served with --tensor-parallel-size {ranks}: {reason}; {cure}"
    )


def load_module(
    source: Source, head: OutputHead | None, dtype: torch.dtype, ranks: int = 1
) -> PreTrainedModel:
    """The model's weights in `dtype`, with `head` in the place of its own; this rank's share of them."""
    try:
        return load_causal_lm(source.name, gguf_file=source.gguf_file, dtype=dtype, head=head, ranks=ranks)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as cause:
        raise _unreadable(source, cause) from cause


def _unreadable(source: Source, cause: Exception, what: str = "the model") -> ModelLoadError:
    reason = one_line(cause, 300) or type(cause).__name__
    return ModelLoadError(
        f"cannot load {what} from {source.name!r}: {reason}; give a hub id, a folder with config.json, "
        "tokenizer.json and safetensors, or a GGUF file"
    )
