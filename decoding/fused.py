"""Decoder layers in fewer operations, put in the place of stock ones that compute the same.

At one token on a CPU a stock layer spends two thirds as long between its products as in them. Here
queries, keys and values come from one product, gate and up from another, and one complex product
rotates queries and keys together.
"""

from typing import Any

import torch
from torch import Tensor, nn

from decoding.attention import folded_attention
from decoding.kv_cache import KVCache

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
MAX_RELATIVE_ERROR = 1e-5

_CHECK_ROWS, _CHECK_TOKENS = 2, 3


class FusedNorm(nn.Module):
    """Root mean square norm: x weight / sqrt(mean(x^2) + epsilon), as four operations."""

    floor: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        size, epsilon = norm.weight.shape[0], _epsilon(norm)
        assert epsilon is not None
        self.weight = nn.Parameter(norm.weight.detach() * size**0.5, requires_grad=False)
        self.register_buffer("floor", norm.weight.new_tensor((size * epsilon) ** 0.5), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return (states / torch.hypot(length, self.floor)).mul_(self.weight)


class Rotation:
    """Turns interleaved pairs by the angles of the stock model, prepared once per pass."""

    def __init__(self) -> None:
        self._angles: tuple[Tensor, Tensor] | None = None
        self._turns: Tensor | None = None

    def apply(self, heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """`[rows, tokens, heads, dim]`, turned by cosines and sines `[rows, tokens, dim]`."""
        half = heads.shape[3] // 2
        if angles is not self._angles:
            cosines, sines = angles
            self._turns = torch.complex(cosines[..., :half], sines[..., :half]).unsqueeze(2)
            self._angles = angles
        assert self._turns is not None
        pairs = torch.view_as_complex(heads.view(*heads.shape[:3], half, 2))
        return torch.view_as_real(pairs * self._turns).flatten(-2)


class FusedLayer(nn.Module):
    """Norm, rotary attention with grouped heads, norm, gated MLP, each half around a residual.

    Made of a stock layer's weights, called as the stock model calls its layers: hidden states
    `[rows, tokens, width]` to the same shape. The two halves of each head are interleaved in the
    weights of queries and keys, so that what is rotated together lies together; their products, all
    that attention uses, stay the same.
    """

    def __init__(self, layer: Any, layer_idx: int, rotation: "Rotation") -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx = layer_idx
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.rotation = rotation
        order = _interleaved(self.heads + self.kv_heads, self.head_dim)
        self.attention_norm = FusedNorm(layer.input_layernorm)
        self.query_key_value = _joined([attention.q_proj, attention.k_proj, attention.v_proj], order)
        self.attention_output = attention.o_proj
        self.mlp_norm = FusedNorm(layer.post_attention_layernorm)
        self.gate_up = _joined([mlp.gate_proj, mlp.up_proj])
        self.activation = mlp.act_fn
        self.down = mlp.down_proj

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: KVCache | None = None,
        past_key_values: KVCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`attention_mask` is additive: folded where there is a cache (see `fold_mask`), else stock.

        The cache has one name or the other, by the release of transformers.
        """
        cache = past_key_values if cache is None else cache
        states = self.query_key_value(self.attention_norm(hidden_states))
        attended = self._attend(states, attention_mask, position_embeddings, cache)
        hidden_states = self.attention_output(attended).add_(hidden_states)
        gate, up = self.gate_up(self.mlp_norm(hidden_states)).chunk(2, dim=-1)
        output: Tensor = self.down(self.activation(gate) * up)
        return output.add_(hidden_states)

    def _attend(
        self, states: Tensor, mask: Tensor, position_embeddings: tuple[Tensor, Tensor], cache: KVCache | None
    ) -> Tensor:
        rotated = self.heads + self.kv_heads
        heads = states.view(*states.shape[:2], rotated + self.kv_heads, self.head_dim)
        turned = self.rotation.apply(heads.narrow(2, 0, rotated), position_embeddings)
        query = turned.narrow(2, 0, self.heads).transpose(1, 2)
        key = turned.narrow(2, self.heads, self.kv_heads).transpose(1, 2)
        value = heads.narrow(2, rotated, self.kv_heads).transpose(1, 2)
        if cache is None:
            return self._attend_to(query, key, value, mask.repeat(1, 1, self.heads // self.kv_heads, 1))
        key, value = cache.update(key, value, self.layer_idx)
        if len(cache.pieces) == 1:
            return self._attend_to(query, key, value, mask)
        attended = [
            self._attend_to(query[rows], key[rows, :, :live], value[rows, :, :live], mask[rows, ..., :live])
            for rows, live in cache.pieces
        ]
        return torch.cat(attended)

    def _attend_to(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        attended, _ = folded_attention(self, query, key, value, mask, scaling=self.scaling)
        return attended.flatten(2)


def fuse_layers(model: nn.Module) -> int:
    """Replace the layers of `model`, in float32 or float64, that can be; returns how many were.

    Never by a list of families: a layer is replaced where it has the parts of such a layer, no other,
    and gives the same on random states, masks and positions.
    """
    fused, rotation = 0, Rotation()
    for layers in [part for part in model.modules() if isinstance(part, nn.ModuleList)]:
        for index, layer in enumerate(layers):
            replacement = _replacement(layer, index, rotation)
            if replacement is not None:
                layers[index] = replacement
                fused += 1
    return fused


def _replacement(layer: nn.Module, index: int, rotation: Rotation) -> FusedLayer | None:
    if not _has_parts(layer):
        return None
    fused = FusedLayer(layer, index, rotation)
    return fused if _agree(layer, fused) else None


def _has_parts(layer: Any) -> bool:
    def parts(module: nn.Module) -> set[str]:
        return {name for name, _ in module.named_children()}

    if parts(layer) != LAYER_PARTS:
        return False
    if parts(layer.self_attn) != ATTENTION_PARTS or parts(layer.mlp) != MLP_PARTS:
        return False
    products = [getattr(layer.self_attn, name) for name in ATTENTION_PARTS]
    products += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    return (
        all(type(product) is nn.Linear for product in products)
        and all(_epsilon(norm) is not None and [*norm.state_dict()] == ["weight"] for norm in norms)
        and all(hasattr(layer.self_attn, name) for name in ("head_dim", "scaling"))
    )


@torch.inference_mode()
def _agree(layer: nn.Module, fused: FusedLayer) -> bool:
    """Whether both give the same, up to rounding, with a mask and positions that hide nothing."""
    weight = next(fused.parameters())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=weight.dtype)

    hidden = random(_CHECK_ROWS, _CHECK_TOKENS, fused.query_key_value.in_features)
    angles = random(_CHECK_ROWS, _CHECK_TOKENS, fused.head_dim // 2).repeat(1, 1, 2)
    inputs = {
        "attention_mask": random(_CHECK_ROWS, 1, _CHECK_TOKENS, _CHECK_TOKENS),
        "position_embeddings": (angles.cos(), angles.sin()),
    }
    try:
        expected: Any = layer(hidden, **inputs)
        found = fused(hidden, **inputs)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    return bool((found - expected).abs().max() <= MAX_RELATIVE_ERROR * expected.abs().max())


def _interleaved(heads: int, head_dim: int) -> Tensor:
    """Where each output comes from so that number i of a head lies beside number i + dim / 2."""
    within = torch.arange(head_dim).view(2, -1).t().reshape(-1)
    return (torch.arange(heads)[:, None] * head_dim + within).reshape(-1)


def _joined(linears: list[nn.Linear], order: Tensor | None = None) -> nn.Linear:
    """One product for several with the same input; its first outputs in `order`."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biased = any(linear.bias is not None for linear in linears)
    biases = [
        weight.new_zeros(each.out_features) if each.bias is None else each.bias.detach() for each in linears
    ]
    bias = torch.cat(biases) if biased else None
    if order is not None:
        weight = torch.cat([weight[order], weight[len(order) :]])
        bias = None if bias is None else torch.cat([bias[order], bias[len(order) :]])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=biased, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined


def _epsilon(norm: nn.Module) -> float | None:
    epsilon: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return epsilon
