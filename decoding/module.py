"""Loads the module of a stock causal language model, with a head of its own where one is given."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig


@dataclass(frozen=True, slots=True)
class OutputHead:
    """A head over part of the vocabulary: `weight` `[outputs, width]`, the ids of its rows `[outputs]`."""

    weight: Tensor
    token_ids: Tensor


def load_causal_lm(
    source: str,
    *,
    gguf_file: str | None,
    dtype: torch.dtype,
    head: OutputHead | None = None,
    ranks: int = 1,
) -> PreTrainedModel:
    """Load a stock model from a folder or hub id; safetensors or GGUF only, never the model's own code.

    `head` takes the place of the model's own, which its files then need not hold. Of several `ranks`, the
    processes of the current group, each loads its share.

    Raises:
        ValueError: the files lack some of the weights, which would be left random.
    """
    extra: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    if head is not None:
        # A tied head is neither looked for in the files nor allocated.
        extra["tie_word_embeddings"] = True
    if ranks > 1:
        extra["distributed_config"] = DistributedConfig(tp_size=ranks)
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **extra)
    model: PreTrainedModel = loaded[0]
    missing_keys: set[str] = loaded[1]["missing_keys"]
    if missing_keys:
        missing = sorted(missing_keys)
        raise ValueError(f"its files lack {len(missing)} weights, {missing[0]} for one")
    model.train(False)
    if head is not None:
        _replace_head(model, head.weight.to(dtype))
    return model


def _replace_head(model: PreTrainedModel, weight: Tensor) -> None:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(linear)  # type: ignore[no-untyped-call]
