"""A checkpoint written as GGUF is the same model to a reader that nobody here wrote."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.peer.llama_gguf import gguf_name, write_gguf


def description(config: LlamaConfig, file: Path) -> Path:
    """A GGUF file with a model's numbers and no tensors; its number of layers is another model's."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(9)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_transformers_reads_the_same_model_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "checkpoint")
    assert json.loads((tmp_path / "checkpoint" / "config.json").read_text())["num_hidden_layers"] == 2
    write_gguf(
        tmp_path / "checkpoint", description(config, tmp_path / "other.gguf"), tmp_path / "written.gguf"
    )
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="written.gguf", dtype=torch.float32)
    ids = torch.tensor([[1, 5, 9, 20]])
    assert torch.allclose(read(ids).logits, model(ids).logits, atol=2e-3)


def test_a_tensor_that_such_a_model_does_not_have_is_refused() -> None:
    with pytest.raises(KeyError, match="q_norm"):
        gguf_name("model.layers.0.self_attn.q_norm.weight")
