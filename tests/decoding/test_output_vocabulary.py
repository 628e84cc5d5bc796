"""A draft whose head is cut to part of the vocabulary: loaded, lossless, refused where its map is wrong."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding import (
    METHODS,
    DecodingConfig,
    Engine,
    ModelLoadError,
    ModelPair,
    SamplingParams,
    Sequence,
    load_model_pair,
    loading,
)
from decoding.embedded import OUTPUT_HEAD_FILE, _draft_source
from decoding.model import CausalModel
from decoding.probe import probe_tree
from tests.decoding.checkpoints import VOCAB_SIZE, save_checkpoint
from tests.decoding.tiny import CPU, perturbed, tiny_llama

SPECIAL_IDS = (0, 1, 2)
OUTPUT_IDS = (*SPECIAL_IDS, *range(40, 4, -3))  # not in order: the map is a map
NUM_TOKENS = 24

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CACHE_DIR", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def target(tmp_path: Path) -> str:
    return save_checkpoint(tmp_path / "target")


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """The target with its head cut: wherever the target's choice is among the ids, the draft agrees."""
    folder = Path(save_checkpoint(tmp_path / "draft"))
    weights = load_file(folder / "model.safetensors")
    head = weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_head(folder, {"output_ids": torch.tensor(OUTPUT_IDS), "lm_head.weight": head[list(OUTPUT_IDS)]})
    return folder


def write_head(folder: Path, tensors: Tensors) -> None:
    kept = {name: each.contiguous() for name, each in tensors.items()}
    save_file(kept, folder / OUTPUT_HEAD_FILE, metadata={"format": "pt"})


def load(target: str, draft: Path, dtype: str = "float32") -> ModelPair:
    return load_model_pair(target, str(draft), device="cpu", dtype=dtype, max_num_seqs=4)


def texts(pair: ModelPair, method: str, params: SamplingParams) -> list[list[int]]:
    engine = Engine(pair, 4)
    config = DecodingConfig(method=method, num_speculative_tokens=3)  # type: ignore[arg-type]
    for index, prompt in enumerate(([5, 6, 7], [11], [8, 2, 9, 40])):
        engine.add(Sequence(str(index), prompt, params, config, choice=index))
    found: list[list[int]] = [[], [], []]
    while engine.has_work():
        for output in engine.step():
            found[int(output.id)] += output.token_ids
        engine.check_integrity()
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_draft_gives_nothing_outside_its_ids(target: str, draft: Path, dtype: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = load(target, draft, dtype)
    assert pair.draft is not None
    assert (pair.vocab_size, pair.draft.vocab_size) == (VOCAB_SIZE, VOCAB_SIZE)
    cut, full = (model.prefill(0, [5, 6, 7], keep=2) for model in (pair.draft, pair.target))
    inside = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    inside[list(OUTPUT_IDS)] = True
    assert cut.shape == full.shape == (2, VOCAB_SIZE)
    assert torch.equal(cut > -math.inf, inside.expand_as(cut))
    torch.testing.assert_close(cut[:, inside], full[:, inside])
    assert torch.equal(cut.softmax(-1)[:, ~inside], torch.zeros(2, VOCAB_SIZE - len(OUTPUT_IDS)))


def test_loading_says_nothing_of_a_missing_head(
    target: str, draft: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    load(target, draft)
    assert caplog.messages == []
    assert "lm_head" not in capfd.readouterr().err


@pytest.mark.parametrize("method", ["speculative", "multi_candidate"])
def test_greedy_text_is_the_targets(target: str, draft: Path, method: str) -> None:
    pair = load(target, draft)
    greedy = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    found = texts(pair, method, greedy)
    assert found == texts(pair, "target", greedy)
    assert not {token for text in found for token in text} <= set(OUTPUT_IDS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_method_runs_with_filters_and_penalties(
    target: str, draft: Path, method: str, temperature: float
) -> None:
    params = SamplingParams(
        max_tokens=NUM_TOKENS,
        temperature=temperature,
        top_k=30,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        logit_bias=((3, 2.0), (40, 1.0)),
        min_tokens=3,
        seed=7,
    )
    found = texts(load(target, draft), method, params)
    assert all(3 <= len(text) <= NUM_TOKENS for text in found)
    if method == "draft":
        assert {token for text in found for token in text} <= set(OUTPUT_IDS)


def test_state_that_is_not_a_number_shows_in_every_logit() -> None:
    """What tells a broken row looks at one logit, which a cut head may not have."""
    model = cut_model(output_ids=torch.tensor([3, 5]))
    model.module.model.norm.weight.data.fill_(math.nan)
    assert model.prefill(0, [1, 2]).isnan().all()


def test_probe_compares_what_the_head_gives() -> None:
    assert probe_tree(cut_model(output_ids=torch.tensor([9, 3, 5]))) < 1e-4


def cut_model(output_ids: Tensor) -> CausalModel:
    module = perturbed(tiny_llama(), 0.1)
    weight = module.get_output_embeddings().weight[output_ids]
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    head.weight = torch.nn.Parameter(weight)
    module.set_output_embeddings(head)
    return CausalModel(module, rows=4, max_model_len=64, vocab_size=24, device=CPU, output_ids=output_ids)


def with_ids(*ids: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        return {"output_ids": torch.tensor(ids), "lm_head.weight": tensors["lm_head.weight"][: len(ids)]}

    return change


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "an id twice": (with_ids(0, 1, 2, 7, 7), "repeat, exceed the vocabulary or lack special ids"),
    "an id beyond": (with_ids(0, 1, 2, VOCAB_SIZE), "repeat, exceed the vocabulary"),
    "an id below": (with_ids(0, 1, 2, -1), "repeat, exceed the vocabulary"),
    "no end": (with_ids(0, 1, 3, 4), "repeat, exceed the vocabulary or lack special ids"),
    "more rows than ids": (lambda each: each | {"output_ids": torch.tensor(SPECIAL_IDS)}, "do not fit"),
    "no ids": (lambda each: {"lm_head.weight": each["lm_head.weight"]}, "output_ids"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_map_that_is_none_is_refused(fault: str, target: str, draft: Path) -> None:
    change, message = FAULTS[fault]
    write_head(draft, change(load_file(draft / OUTPUT_HEAD_FILE)))
    with pytest.raises(ModelLoadError, match=message) as error:
        load(target, draft)
    assert "\n" not in str(error.value)


def test_truncated_head_is_told(target: str, draft: Path) -> None:
    path = draft / OUTPUT_HEAD_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelLoadError, match="cannot load its output_head.safetensors from "):
        load(target, draft)


def test_shipped_cut_head_is_part_of_what_a_draft_is_made_from(draft: Path) -> None:
    """Another map must not be served from the folder that an earlier one left in the cache."""
    before = _draft_source(draft)
    write_head(draft, {"output_ids": torch.tensor(SPECIAL_IDS)})
    changed = _draft_source(draft)
    (draft / OUTPUT_HEAD_FILE).unlink()
    assert len({before, changed, _draft_source(draft)}) == 3


def test_target_must_have_a_full_head(target: str, draft: Path) -> None:
    with pytest.raises(ModelLoadError, match="lack 1 weights, lm_head.weight"):
        load_model_pair(str(draft), target, device="cpu", dtype="float32", max_num_seqs=2)
