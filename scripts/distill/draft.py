"""The draft: some of the target's layers, its embedding and its head, in the target's own architecture."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from decoding.module import load_causal_lm
from scripts.distill.errors import DistillError
from scripts.distill.target import split_source

HEAD_TOLERANCE = 1e-3  # relative to the largest logit


@dataclass(slots=True)
class Draft:
    """A model in float32 whose embedding and head are the target's, frozen; `opening` `[tokens]`."""

    module: PreTrainedModel
    opening: Tensor
    vocab_size: int

    @property
    def device(self) -> torch.device:
        return self.opening.device

    @property
    def head(self) -> Tensor:
        """Weight `[vocab, width]` of the head over the shared vocabulary."""
        weight: Tensor = head_of(self.module).weight
        return weight[: self.vocab_size].detach()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: each for name, each in self.module.named_parameters() if each.requires_grad}

    def hidden(self, token_ids: Tensor) -> Tensor:
        """States `[sequences, tokens, width]` that predict `token_ids` `[sequences, tokens]`."""
        opening = self.opening.expand(len(token_ids), -1)
        inputs = torch.cat([opening, token_ids[:, :-1]], dim=1)
        states: Tensor = self.module.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        return states[:, len(self.opening) - 1 :]

    @torch.no_grad()
    def round_to_float16(self) -> None:
        """Take the values that are written, so that they are what is measured."""
        for weight in self.module.parameters():
            weight.copy_(weight.half())


def head_of(module: PreTrainedModel) -> nn.Linear:
    """The product at the end of a model."""
    head: nn.Linear = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def build_draft(
    source: str, layers: int, *, opening: list[int], vocab_size: int, device: torch.device
) -> Draft:
    """A draft of `layers` of the target's layers, evenly spaced, the first and the last among them.

    Raises:
        DistillError: the target has no such layers, or its head is more than a product.
    """
    name, gguf_file = split_source(source)
    module = load_causal_lm(name, gguf_file=gguf_file, dtype=torch.float32)
    total = getattr(module.config, "num_hidden_layers", 0)
    if not 0 < layers < total:
        raise DistillError(f"--layers is {layers}, but the target has {total}; give a number below that")
    copied = _with_layers(module, _evenly_spaced(layers, total))
    # Dropout, where an architecture has any, stays off.
    copied.train(False)
    for part in (copied.get_input_embeddings(), head_of(copied)):
        part.requires_grad_(False)
    draft = Draft(nn.Module.to(copied, device), torch.tensor(opening, device=device), vocab_size)
    if not _head_is_a_product(draft):
        raise _refusal(module.config, "its head is more than one product")
    return draft


def _evenly_spaced(layers: int, total: int) -> list[int]:
    if layers == 1:
        return [0]
    return [round(index * (total - 1) / (layers - 1)) for index in range(layers)]


def _refusal(config: PreTrainedConfig, reason: str) -> DistillError:
    return DistillError(
        f"model type {config.model_type!r} gives no draft ({reason}); name a target whose layers are alike, "
        "such as llama, qwen2, qwen3, mistral or phi3"
    )


def _with_layers(module: PreTrainedModel, chosen: list[int]) -> PreTrainedModel:
    """A new model of the same class with only the `chosen` layers of `module`, and all else of it."""
    stack = _layer_stack(module)
    config = copy.deepcopy(module.config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in chosen]
    # A target out of a GGUF file would have its draft quantised again.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    places = {f"{stack}.{layer}.": f"{stack}.{place}." for place, layer in enumerate(chosen)}
    state = {}
    for name, weight in module.state_dict().items():
        layer = next((each for each in places if name.startswith(each)), None)
        if layer is not None:
            state[places[layer] + name.removeprefix(layer)] = weight
        elif not name.startswith(f"{stack}."):
            state[name] = weight
    draft: PreTrainedModel = nn.Module.to(type(module)(config), torch.float32)
    try:
        draft.load_state_dict(state)
    except RuntimeError as error:
        raise _refusal(module.config, "its layers cannot be copied") from error
    return draft


def _layer_stack(module: PreTrainedModel) -> str:
    """Name of the list of layers, the outermost one of the right length."""
    if module.config.get_text_config() is not module.config:
        raise _refusal(module.config, "it is more than a language model")
    total = module.config.num_hidden_layers
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == total:
            return str(name)
    raise _refusal(module.config, "its layers cannot be copied")


@torch.no_grad()
def _head_is_a_product(draft: Draft) -> bool:
    ids = torch.arange(min(8, draft.vocab_size), device=draft.device)[None]
    states = draft.module.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = draft.module(input_ids=ids, use_cache=False).logits[..., : draft.vocab_size]
    error = (states @ draft.head.T - logits).abs().max()
    return bool(error <= HEAD_TOLERANCE * logits.abs().max())
