"""The whole of scripts/distill-draft on a tiny target: it learns, goes on, and what it writes is served."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from decoding import load_model_pair, loading
from decoding.embedded import OUTPUT_HEAD_FILE, build_draft
from scripts.distill import gathering, target, training
from scripts.distill.__main__ import main
from scripts.distill.errors import DistillError
from scripts.distill.output import LAYERS_FOLDER
from scripts.distill.progress import Progress
from scripts.distill.run import Report, distill
from scripts.distill.settings import Settings
from tests.decoding.checkpoints import VOCAB_SIZE, random_model, save_tokenizer

SECONDS = 4.0
TOKENS = 1500
TINY_ROWS, TINY_TOKENS = 16, 40


@pytest.fixture(autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small batches of short text, a cache of the test's own, and the random state left as it was."""
    monkeypatch.setattr(loading, "CACHE_DIR", tmp_path_factory.getbasetemp() / "tokenizers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in (target, gathering):
        monkeypatch.setattr(module, "ROWS", TINY_ROWS)
    monkeypatch.setattr(gathering, "SEQUENCE_TOKENS", TINY_TOKENS)
    monkeypatch.setattr(training, "WARM_UP_STEPS", 5)
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A target of four layers with tied embeddings; the outer layers do most of the work."""
    folder = tmp_path_factory.mktemp("distill") / "tiny"
    model = random_model("llama", num_hidden_layers=4, tie_word_embeddings=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def settings(tiny: str, tmp_path: Path) -> Settings:
    return Settings(
        target=tiny,
        output=tmp_path / "draft",
        minutes=SECONDS / 60,
        tokens=TOKENS,
        cache_dir=tmp_path / "cache",
    )


def run(settings: Settings) -> Report:
    return distill(settings, Progress())


def test_draft_learns_goes_on_and_is_served(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(settings)
    assert first.end.acceptance > first.start.acceptance + 0.03
    assert "start at step 0" in capsys.readouterr().err

    checkpoint = settings.training_folder() / "checkpoint.safetensors"
    shards = {path: path.stat().st_mtime_ns for path in settings.text_folder().glob("*.npz")}
    assert len(shards) == -(-TOKENS // (TINY_ROWS * TINY_TOKENS))
    longer = replace(settings, minutes=2 * settings.minutes)
    assert longer.training_folder() == settings.training_folder()
    trained = checkpoint.read_bytes()
    second = run(longer)
    assert "going on at step " in capsys.readouterr().err
    assert second.start.acceptance == pytest.approx(first.end.acceptance, abs=2e-3)
    assert second.end.acceptance > first.start.acceptance + 0.03
    assert checkpoint.read_bytes() != trained
    assert {path: path.stat().st_mtime_ns for path in shards} == shards

    pair = load_model_pair(settings.target, str(settings.output), dtype="float32", max_num_seqs=2)
    assert pair.draft is not None
    assert pair.draft.module.config.num_hidden_layers == 2
    card = (settings.output / "README.md").read_text()
    assert f"{second.end.acceptance:.3f}" in card
    assert str(settings.output.parent) not in card
    config = json.loads((settings.output / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert not [name for name in config if name.endswith("_name_or_path")]
    assert {path.stat().st_mode & 0o777 for path in settings.output.glob("*.safetensors")} == {0o644}


def test_finished_run_trains_no_more(settings: Settings) -> None:
    short = replace(settings, minutes=0.01)
    first = run(short)
    again = run(short)
    assert again.start.acceptance == pytest.approx(again.end.acceptance, abs=2e-3)
    assert again.end == first.end


def test_interrupted_run_keeps_its_steps(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    show = Progress.show

    def stop(self: Progress, what: str, **values: object) -> None:
        if what == "training" and values["tokens"] == 3 * training.BATCH * TINY_TOKENS:
            raise KeyboardInterrupt
        show(self, what, **values)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "show", stop)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    checkpoint = load_file(settings.training_folder() / "checkpoint.safetensors")
    assert any(name.startswith("exp_avg_sq ") for name in checkpoint)
    assert run(settings).end.acceptance > 0


def test_layers_alone_become_the_whole_draft_again(settings: Settings, tmp_path: Path) -> None:
    """The form that this repository ships, here with a cut head."""
    cut = replace(settings, minutes=0.01, embedded=True, output_vocabulary=20)
    run(cut)
    built = tmp_path / "built"
    built.mkdir()
    build_draft(cut.output / LAYERS_FOLDER, Path(cut.target), built)
    pair, other = (
        load_model_pair(cut.target, str(folder), dtype="float32", max_num_seqs=2)
        for folder in (built, cut.output)
    )
    assert pair.draft is not None
    assert other.draft is not None
    logits, expected = pair.draft.prefill(0, [5, 6, 7]), other.draft.prefill(0, [5, 6, 7])
    assert int((logits > -torch.inf).sum()) == 20
    # The embedding is float16 in one of them only.
    torch.testing.assert_close(logits, expected, atol=2e-2, rtol=1e-2)
    shipped = load_file(cut.output / LAYERS_FOLDER / "model.safetensors")
    assert {name.split(".")[1] for name in shipped} == {"layers", "norm"}
    assert list(load_file(cut.output / LAYERS_FOLDER / OUTPUT_HEAD_FILE)) == ["output_ids"]


def test_cut_head_keeps_special_and_frequent_ids(settings: Settings) -> None:
    cut = replace(settings, minutes=0.01, output_vocabulary=20)
    report = run(cut)
    head = load_file(cut.output / OUTPUT_HEAD_FILE)
    ids = head["output_ids"].tolist()
    assert head["lm_head.weight"].shape[0] == len(set(ids)) == 20
    assert set(ids) >= {0, 1, 2}
    assert json.loads((cut.output / "config.json").read_text())["tie_word_embeddings"] is False
    assert "The head is cut** to 20" in (cut.output / "README.md").read_text()
    full = run(replace(cut, output_vocabulary=None))
    assert not (cut.output / OUTPUT_HEAD_FILE).exists()
    assert report.end != full.end


def test_given_text_is_labelled_and_used(settings: Settings, tmp_path: Path) -> None:
    """Labels of unlabelled text are the target's own, so equal to those of the same text sampled."""
    run(replace(settings, minutes=0.01))
    shard = min(settings.text_folder().glob("sampled-*.npz"))
    with np.load(shard) as arrays:
        np.savez(tmp_path / "unlabelled.npz", token_ids=arrays["token_ids"])
    given = replace(
        settings,
        minutes=0.01,
        tokens=None,
        data=(tmp_path / "unlabelled.npz",),
        validation=shard,
        output=tmp_path / "other",
    )
    run(given)
    (labelled,) = given.text_folder().glob("labelled-*.npz")
    with np.load(labelled) as found, np.load(shard) as expected:
        assert np.array_equal(found["token_ids"], expected["token_ids"])
        assert np.allclose(found["top_log_probs"], expected["top_log_probs"], atol=1e-2)
        assert (found["top_ids"] == expected["top_ids"]).mean() > 0.99
    assert "Given files: `unlabelled.npz`" in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "0"], "--layers is 0; give a number of 1 or more"),
        (["--layers", "4"], "--layers is 4, but the target has 4; give a number below that"),
        (["--layers", "x"], "invalid int value: 'x'; see scripts/distill-draft --help"),
        (["--minutes", "0"], "--minutes is 0; give a number above 0"),
        (["--tokens", "0"], "--tokens 0 leaves nothing to train on; give more, or text with --data"),
        (["--data", "no.npz"], "data file 'no.npz' does not exist; check the path"),
        (["--target", "no/such"], "cannot load the model from 'no/such'"),
        (["--output", "{target}"], "--output is the target's own folder; name another"),
        (["--output", "{parent}"], "holds something else; name a new folder"),
        (["--output-vocabulary", "2"], "--output-vocabulary is 2; give a number between 4 "),
        (["--output-vocabulary", str(VOCAB_SIZE)], f"and {VOCAB_SIZE - 1}"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
    ],
)
def test_bad_flags_are_told_in_one_line(
    flags: list[str],
    message: str,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "scripts.distill.settings.Settings.text_folder", lambda self: tmp_path / "cache" / "text"
    )
    given = [each.format(target=tiny, parent=Path(tiny).parent) for each in flags]
    base = ["--target", tiny, "--output", str(tmp_path / "draft"), "--minutes", "0.01", "--tokens", "100"]
    try:
        code = main([*base, *given])
    except SystemExit as exit_:
        code = int(str(exit_.code))
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert message in error
    assert error.count("scripts/distill-draft: ") == error.count("\n") == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.zeros((2, 40), np.uint16)}, "data.npz has no array 'token_ids'"),
        ({"token_ids": np.zeros(40, np.uint16)}, "token_ids must have 2 dimensions"),
        ({"token_ids": np.full((2, 40), VOCAB_SIZE, np.uint16)}, "exceeds the target's vocabulary"),
        ({"token_ids": np.zeros((2, 400), np.uint16)}, "sequences of 400 tokens exceed the target's 127"),
        (
            {
                "token_ids": np.zeros((2, 40), np.uint16),
                "top_ids": np.zeros((2, 39, 4), np.uint16),
                "top_log_probs": np.zeros((2, 39, 4), np.float16),
            },
            "the shapes of its arrays do not fit",
        ),
    ],
)
def test_data_of_another_form_is_told(
    arrays: dict[str, np.ndarray], message: str, settings: Settings, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DistillError, match=message):
        run(replace(settings, data=(tmp_path / "data.npz",), tokens=None))


def test_file_that_is_no_archive_is_told(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("text")
    with pytest.raises(DistillError, match="data.npz is not an .npz file"):
        run(replace(settings, data=(tmp_path / "data.npz",)))


@pytest.mark.parametrize(
    ("family", "message"),
    [("qwen2", ""), ("gpt2", ""), ("opt", ""), ("gemma2", "its head is more than one product")],
)
def test_other_families(family: str, message: str, settings: Settings, tmp_path: Path) -> None:
    """A family is judged by what can be done with it, never by its name."""
    folder = tmp_path / family
    changes = {"n_layer": 3} if family == "gpt2" else {"num_hidden_layers": 3, "final_logit_softcapping": 1.0}
    random_model(family, **changes).save_pretrained(folder)
    save_tokenizer(folder)
    other = replace(settings, target=str(folder), minutes=0.01, tokens=100)
    if not message:
        assert run(other).end.acceptance > 0
        return
    with pytest.raises(DistillError, match=message):
        run(other)
