"""Write a Llama checkpoint as a float16 GGUF file, for llama.cpp."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file

# What a checkpoint calls the parts of one layer, and what GGUF does.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OWN_KEYS = ("llama.block_count", "general.file_type", "general.architecture", "general.quantization_version")


def write_gguf(checkpoint: Path, described_by: Path, file: Path) -> None:
    """Write `checkpoint` as `file`: matrices in float16, vectors in float32.

    `described_by` is a GGUF file of the same family and vocabulary; its tokenizer and numbers are taken
    over, since a checkpoint folder does not hold them in GGUF's terms. The number of layers is the
    checkpoint's own.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _copy_description(gguf.GGUFReader(described_by), writer)
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if (folded := _rotated(name, weight, config)).dim() > 1:
            writer.add_tensor(gguf_name(name), folded.to(torch.float16).numpy())
        else:
            writer.add_tensor(gguf_name(name), folded.to(torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """GGUF's name of a Llama checkpoint's tensor; raises KeyError for one that such a model does not have."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part.removesuffix('.weight')]}.weight"


def _rotated(name: str, weight: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rows of queries and keys as llama.cpp rotates them: in neighbouring pairs, not halves of a head."""
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config.get("num_key_value_heads", config["num_attention_heads"]),
    }
    part = name.split(".")[-2]
    if part not in heads:
        return weight
    halves = weight.view(heads[part], 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _copy_description(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in OWN_KEYS:
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
