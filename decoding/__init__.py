"""Token ids in, token ids out: the batched decoding engine. Knows nothing of text, HTTP or metrics.

`Engine`, `load_model_pair` and the rest of what needs torch are loaded at first use, so that a
process which only needs the configuration types never imports it.
"""

from typing import TYPE_CHECKING, Any

from decoding.config import (
    ACCEPTANCE_REFERENCES,
    ADAPTIVE_METHODS,
    GREEDY_THRESHOLD,
    MAX_BEAM_WIDTH,
    MAX_SPECULATIVE_TOKENS,
    MAX_TREE_NODES,
    METHODS,
    SAMPLING_THRESHOLD,
    DecodingConfig,
    default_threshold,
)
from decoding.errors import ModelLoadError
from decoding.sequence import GREEDY_TEMPERATURE, FinishReason, SamplingParams, Sequence, SequenceOutput

if TYPE_CHECKING:
    from decoding.cost_measurement import load_costs
    from decoding.embedded import prepare_embedded_pair
    from decoding.engine import Engine
    from decoding.graph_warmup import record_graphs
    from decoding.loading import load_model_pair
    from decoding.model_pair import ModelPair
    from decoding.policy import Policy
    from decoding.statistics import ForwardTime, Retreat, StepStats

_LAZY = {
    "load_costs": "decoding.cost_measurement",
    "Policy": "decoding.policy",
    "Engine": "decoding.engine",
    "ForwardTime": "decoding.statistics",
    "Retreat": "decoding.statistics",
    "StepStats": "decoding.statistics",
    "ModelPair": "decoding.model_pair",
    "load_model_pair": "decoding.loading",
    "prepare_embedded_pair": "decoding.embedded",
    "record_graphs": "decoding.graph_warmup",
}

__all__ = [
    "ACCEPTANCE_REFERENCES",
    "ADAPTIVE_METHODS",
    "GREEDY_TEMPERATURE",
    "GREEDY_THRESHOLD",
    "MAX_BEAM_WIDTH",
    "MAX_SPECULATIVE_TOKENS",
    "MAX_TREE_NODES",
    "METHODS",
    "SAMPLING_THRESHOLD",
    "DecodingConfig",
    "Engine",
    "FinishReason",
    "ForwardTime",
    "ModelLoadError",
    "ModelPair",
    "Policy",
    "Retreat",
    "SamplingParams",
    "Sequence",
    "SequenceOutput",
    "StepStats",
    "default_threshold",
    "load_costs",
    "load_model_pair",
    "prepare_embedded_pair",
    "record_graphs",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'decoding' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
