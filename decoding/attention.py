"""The attention function that stock models run: query heads folded per KV head, any additive mask."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "folded_heads"


def fold_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Turn a bool mask `[rows, tokens, keys]` into the additive `[rows, 1, groups * tokens, keys]`.

    Stock models hand a 4-D mask through untouched, so it is folded once per pass, not once per layer.
    """
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return additive.repeat(1, groups, 1).unsqueeze(1)


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend `query` `[rows, heads, tokens, dim]` to `key`, `value` `[rows, kv_heads, keys, dim]`.

    `attention_mask` comes from `fold_mask`; sliding windows are already in it. `softcap` bounds the
    scores (Gemma 2), `s_aux` is one learned sink per head (gpt-oss). Returns `[rows, tokens, heads, dim]`.
    """
    rows, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    folded = query.reshape(rows, kv_heads, heads // kv_heads * tokens, dim)
    scale = dim**-0.5 if scaling is None else scaling
    if softcap is None and s_aux is None:
        output = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scale)
    else:
        output = _explicit_attention(folded, key, value, attention_mask, scale, softcap, s_aux)
    return output.reshape(rows, heads, tokens, dim).transpose(1, 2), None


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores + mask).float()
    if sinks is not None:
        scores = torch.cat([scores, _sink_column(sinks, scores)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value


def _sink_column(sinks: Tensor, scores: Tensor) -> Tensor:
    rows, kv_heads, folded_tokens, _ = scores.shape
    tokens = folded_tokens * kv_heads // sinks.numel()
    per_head = sinks.float().view(kv_heads, -1, 1).expand(-1, -1, tokens)
    return per_head.reshape(1, kv_heads, folded_tokens, 1).expand(rows, -1, -1, -1)


def register_attention() -> None:
    """Make `ATTENTION_NAME` a name that `set_attn_implementation` knows."""
    AttentionInterface.register(ATTENTION_NAME, folded_attention)
