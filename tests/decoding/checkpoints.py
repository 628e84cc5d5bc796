"""Random checkpoints on disk, one per model family, as `load_model_pair` reads them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 60
OWN_NAMES = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
UNGROUPED = OWN_NAMES | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
COMMON = UNGROUPED | {"num_key_value_heads": 2}
SERVED: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": COMMON | {"head_dim": 16},
    "mistral": COMMON | {"sliding_window": 4},
    "gemma2": COMMON | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "gemma3_text": COMMON
    | {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": OWN_NAMES | {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": UNGROUPED | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": UNGROUPED,
    "phi3": COMMON | {"sliding_window": 4},
}
REFUSED: dict[str, dict[str, Any]] = {
    "gpt_neo": OWN_NAMES
    | {
        "max_position_embeddings": 128,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "mamba": OWN_NAMES | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def random_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model whose weights are large enough that every part of it shows in its logits."""
    settings = (SERVED | REFUSED)[model_type] | changes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
    return model.eval()


def save_tokenizer(folder: Path, words: int = VOCAB_SIZE, eos: str = "</s>") -> None:
    names = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, words))]
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=eos
    ).save_pretrained(folder)


def save_checkpoint(folder: Path, model_type: str = "llama", seed: int = 0, **changes: Any) -> str:
    """Write a random model and its tokenizer; returns the folder as `load_model_pair` wants it."""
    random_model(model_type, seed, **changes).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)
