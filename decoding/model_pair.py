"""The pair of models that a worker holds resident, and what goes with it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from decoding.linear import Float16Linear
from decoding.model import CausalModel


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The target's chat template as text, if it has one, and the special tokens that it may name."""

    template: str | None = None
    special_tokens: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatFormat":
        """Of several named templates the one called `default`."""
        template: Any = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        special = tokenizer.special_tokens_map.items()
        return cls(template, tuple((name, str(token)) for name, token in special))


@dataclass(slots=True)
class ModelPair:
    """What one worker holds: the target, the draft unless it serves without one, and their vocabulary."""

    target: CausalModel
    draft: CausalModel | None
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    tokenizer_file: Path
    description: str
    chat: ChatFormat = ChatFormat()
    load_seconds: dict[str, float] = field(default_factory=dict)  # of the weights, by role

    @property
    def has_draft(self) -> bool:
        return self.draft is not None

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def models(self) -> dict[str, CausalModel]:
        """The resident models by role."""
        return {"target": self.target} if self.draft is None else {"target": self.target, "draft": self.draft}

    @property
    def memory_bytes(self) -> int:
        """Weights and caches of both models, in bytes (cache pages count whether touched or not)."""
        return sum(_weight_bytes(model.module) + model.cache.num_bytes for model in self.models.values())


def _weight_bytes(module: nn.Module) -> int:
    kept = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return kept + sum(part.num_bytes for part in module.modules() if isinstance(part, Float16Linear))
