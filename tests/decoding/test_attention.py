"""Folded attention against attention head by head."""

import pytest
import torch
from torch import Tensor, nn

from decoding.attention import fold_mask, folded_attention

ROWS, HEADS, KV_HEADS, TOKENS, KEYS, DIM = 2, 6, 2, 3, 7, 4


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`[rows, tokens, heads, dim]` by a loop over heads."""
    outputs = []
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        scores = query[:, head] @ key[:, kv_head].transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~mask, -torch.inf).exp()
        sink = 0 if sinks is None else sinks[head].exp()
        outputs.append(weights / (weights.sum(-1, keepdim=True) + sink) @ value[:, kv_head])
    return torch.stack(outputs, dim=2)


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, HEADS)])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_folded_equals_head_by_head(
    sinks: Tensor | None, softcap: float | None, scaling: float | None
) -> None:
    """Guards the order in which heads and tokens are folded, and sinks given to the wrong head."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(ROWS, heads, count, DIM) for heads, count in [(6, 3), (2, 7), (2, 7)])
    mask = torch.rand(ROWS, TOKENS, KEYS) < 0.6
    mask[:, :, 0] = True
    found, _ = folded_attention(
        nn.Module(),
        query,
        key,
        value,
        fold_mask(mask, HEADS // KV_HEADS, torch.float32),
        scaling=scaling,
        softcap=softcap,
        s_aux=sinks,
    )
    expected = plain(query, key, value, mask, scaling or DIM**-0.5, softcap, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_mask_is_folded_once_for_all_heads_of_a_group() -> None:
    mask = torch.tensor([[[True, False], [True, True]]])
    folded = fold_mask(mask, 2, torch.float64)
    inf = -torch.inf
    assert folded.dtype == torch.float64
    assert folded.tolist() == [[[[0.0, inf], [0.0, 0.0], [0.0, inf], [0.0, 0.0]]]]
