"""Loading a pair: what is read, what is said of it, and every fault in one line with its cure."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from decoding import ModelLoadError, ModelPair, load_model_pair, loading
from decoding.checkpoint import Source, refuse_split
from tests.decoding.checkpoints import VOCAB_SIZE, random_model, save_checkpoint, save_tokenizer

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def load(target: Path | str, draft: Path | str | None = None, **settings: Any) -> ModelPair:
    settings = {"device": "cpu", "dtype": "float32", "max_num_seqs": 2, **settings}
    return load_model_pair(str(target), None if draft is None else str(draft), **settings)


def refused(*args: Any, **settings: Any) -> str:
    with pytest.raises(ModelLoadError) as error:
        load(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def cut(name: str, size: int) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def set_json(name: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


FAULTS: dict[str, tuple[Change, str]] = {
    "truncated weights": (
        cut("model.safetensors", -100),
        "cannot load the model from .*deserializing header",
    ),
    "truncated header": (cut("model.safetensors", 20), "cannot load the model from .*deserializing header"),
    "truncated config": (cut("config.json", -5), "cannot load the model from .*not a valid JSON"),
    "truncated tokenizer": (cut("tokenizer.json", -5), "cannot load its tokenizer from "),
    "no weights": (remove("model.safetensors"), "no file named model.safetensors"),
    "no config": (remove("config.json"), "cannot load the model from .*model_type"),
    "no tokenizer": (remove("tokenizer.json"), "cannot load its tokenizer from "),
    "pickled weights only": (only_bin, "no file named model.safetensors"),
    "a weight missing": (without_a_weight, "lack 1 weights, model.layers.1.mlp.up_proj.weight"),
    "a layer missing": (set_json("config.json", num_hidden_layers=3), "lack 9 weights"),
    "other shapes": (set_json("config.json", intermediate_size=64), "cannot load the model from "),
    "unknown type": (set_json("config.json", model_type="nothing"), "cannot load the model from .*nothing"),
    "own code": (
        set_json("config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "wants to run code of its own",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_told_in_one_line(fault: str, checkpoint: Path, tmp_path: Path) -> None:
    """Silence would be worse: missing weights are left random by the library."""
    change, message = FAULTS[fault]
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    change(folder)
    found = refused(folder)
    assert re.search(message, found), found


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody/nothing"])
def test_name_that_leads_nowhere_is_told(name: str) -> None:
    assert "cannot load the model from " in refused(name)


def test_missing_gguf_file_is_told() -> None:
    assert refused("no/such/model.gguf") == "model file 'no/such/model.gguf' does not exist; check the path"


@pytest.mark.parametrize("words", [VOCAB_SIZE - 1, VOCAB_SIZE])
def test_draft_with_another_vocabulary_is_refused(words: int, checkpoint: Path, tmp_path: Path) -> None:
    """Another token, or the same tokens with another end."""
    random_model("llama", seed=1).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, words, eos="</s>" if words < VOCAB_SIZE else "w5")
    assert "the draft's vocabulary differs from the target's" in refused(checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float16, bfloat16, float32, not 'int8'"),
        ({"max_model_len": 1}, "max_model_len must be between 2 and the models' own 128, not 1"),
        ({"max_model_len": 129}, "max_model_len must be between 2 and the models' own 128, not 129"),
    ],
)
def test_setting_out_of_bounds_is_named(settings: dict[str, Any], message: str, checkpoint: Path) -> None:
    assert refused(checkpoint, **settings) == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_told(checkpoint: Path) -> None:
    assert refused(checkpoint, device="cuda").startswith("device 'cuda' is not available here")


@pytest.mark.parametrize(
    ("model_type", "ranks", "reason"),
    [
        ("llama", 3, "it has 4 heads over 2 of keys and values; use a number that divides both"),
        ("llama", 4, "it has 4 heads over 2 of keys and values; use a number that divides both"),
        ("gpt2", 2, "transformers has no plan that splits the heads of 'gpt2'; leave the flag out"),
        ("phi3", 2, "transformers has no plan that splits the heads of 'phi3'; leave the flag out"),
    ],
)
def test_a_target_that_cannot_be_split_is_refused(
    model_type: str, ranks: int, reason: str, tmp_path: Path
) -> None:
    message = refused(save_checkpoint(tmp_path, model_type), tensor_parallel_size=ranks)
    assert message.endswith(f"cannot be served with --tensor-parallel-size {ranks}: {reason}")


def test_a_gguf_file_is_not_split(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"GGUF files are not split; give safetensors"):
        refuse_split(Source(str(tmp_path), "model.gguf"), 2)


def test_ranks_need_as_many_gpus(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert refused(checkpoint, device="cuda", tensor_parallel_size=2).startswith(
        "--tensor-parallel-size 2 needs as many GPUs, of which 1 are visible; give a smaller number"
    )
    assert "hide them with CUDA_VISIBLE_DEVICES=" in refused(checkpoint, tensor_parallel_size=2)


def test_pair_is_loaded_as_it_is_described(checkpoint: Path, cache_dir: Path) -> None:
    pair = load(checkpoint, checkpoint, max_model_len=64)
    assert pair.draft is not None
    assert (pair.vocab_size, pair.max_model_len) == (VOCAB_SIZE, 64)
    assert (pair.eos_token_ids, pair.bos_token_id) == ((2,), 1)
    assert pair.description.startswith("tiny (llama, 0M) + draft tiny (llama, 0M); float32; cpu, ")
    assert pair.target.cache.rows == 3
    assert not pair.target.module.training
    tokenizer = Tokenizer.from_file(str(pair.tokenizer_file))
    assert tokenizer.encode("w7 w3 </s>").ids == [7, 3, 2]
    assert pair.tokenizer_file.is_relative_to(cache_dir)
    assert load(checkpoint).tokenizer_file == pair.tokenizer_file
    assert [path.name for path in pair.tokenizer_file.parent.iterdir()] == [pair.tokenizer_file.name]


def test_context_defaults_to_the_models_own(checkpoint: Path) -> None:
    assert load(checkpoint).max_model_len == 128


def test_every_configured_end_counts(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    set_json("generation_config.json", eos_token_id=[2, 5])(tmp_path / "copy")
    assert load(tmp_path / "copy").eos_token_ids == (2, 5)


def test_padded_embedding_is_cut_to_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    """Both models' rows beyond the tokenizer's tokens are padding of no meaning."""
    random_model("llama", vocab_size=64).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    pair = load(tmp_path, checkpoint)
    assert pair.vocab_size == VOCAB_SIZE
    assert pair.target.prefill(0, [1, 2]).shape == (1, VOCAB_SIZE)


def test_float16_is_told_with_its_share(checkpoint: Path) -> None:
    description = load(checkpoint, dtype="float16").description
    assert "float16 weights, float32 activations (" in description or "no float16 linear" in description
