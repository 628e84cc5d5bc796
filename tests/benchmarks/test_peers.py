"""The comparison with transformers in one process, whole, on the small pair."""

import json

import pytest

from benchmarks import peers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers warns of its own options
def test_the_sections_that_run_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pair", "T", "--sections", "one", "batch", "--dtypes", "float32", "--prompts", "1"]
    arguments += ["--batch", "2", "--max-tokens", "8", "--repeats", "1"]
    document = peers.run(peers.parse_arguments(arguments), print)
    assert {row["tokens"] for row in document["rows"]} == {8, 16}
    same = {row["name"]: row["same_tokens"] for row in document["rows"] if "mmtad" not in row["name"]}
    assert set(same.values()) == {1.0}, same
    assert {ratio["group"] for ratio in document["ratios"]} == {"target", "speculative", "batch"}
    assert all("transformers" in row["version"] for row in document["rows"] if not row["ours"])
    assert document == json.loads(json.dumps(document))
    assert "generate_batch" in capsys.readouterr().out


def test_what_cannot_be_asked_together_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.parse_arguments(["--pair", "T"])
    assert "--pair T is for --sections one and batch" in capsys.readouterr().err
