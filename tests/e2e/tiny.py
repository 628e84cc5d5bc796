"""A random Llama pair with a byte-level tokenizer, small enough to be made in a test."""

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 260
BOS, EOS = 256, 257
POSITIONS = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per byte: 0 to 255 in the order of the byte-level alphabet, then BOS and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    vocabulary |= {"<s>": BOS, "</s>": EOS, "<pad>": 258, "<unused>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_model(
    folder: Path,
    *,
    seed: int,
    layers: int,
    hidden: int,
    vocab_size: int = VOCAB_SIZE,
    positions: int = POSITIONS,
) -> Path:
    """A checkpoint folder with random weights whose logits are spread enough to decode real sequences."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    return folder


def write_pair(folder: Path, *, positions: int = POSITIONS) -> tuple[Path, Path]:
    target = write_model(folder / "tiny-target", seed=1, layers=2, hidden=64, positions=positions)
    draft = folder / "tiny-draft"
    write_perturbed(target, draft, noise=0.02)
    return target, draft


def write_perturbed(source: Path, folder: Path, noise: float) -> None:
    """A copy whose weights differ by `noise` of their spread: a draft that often agrees."""
    model = LlamaForCausalLM.from_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
