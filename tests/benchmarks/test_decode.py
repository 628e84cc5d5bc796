"""The engine benchmark's rows add up, and its log-probabilities are the target's own."""

import json
from pathlib import Path

import pytest

from benchmarks import decode
from benchmarks.generation import Generation, generate, score
from benchmarks.judge import Judge
from benchmarks.methods import configurations, equal_trees, nodes
from benchmarks.table import COLUMNS, describe, header, line
from benchmarks.tasks import Task
from decoding import DecodingConfig, SamplingParams
from tests.decoding.tiny import make_pair, perturbed, tiny_llama

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
PARAMS = SamplingParams(max_tokens=12, temperature=0.0)


def test_every_method_has_a_configuration_the_reference_first() -> None:
    configs = list(configurations([2], [2], [0.5]))
    assert configs[0].method == "target"
    assert {config.method for config in configs} == {
        "target", "draft", "speculative", "multi_candidate", "mtjd", "mtad", "mmtad",
    }  # fmt: skip
    assert {c.acceptance_reference for c in configs if c.method == "mmtad"} == {"draft", "target"}


@pytest.mark.parametrize(("depth", "width"), [(2, 2), (3, 4), (4, 4), (8, 2), (4, 1)])
def test_trees_have_as_many_nodes_as_the_beams(depth: int, width: int) -> None:
    exact, *bushy = equal_trees(depth, width)
    assert nodes(exact) == depth * width
    assert all(nodes(each) <= depth * width and len(each) == depth for each in bushy)
    config = DecodingConfig(method="multi_candidate", candidates_per_level=exact)
    assert config.preset.num_nodes - 1 == depth * width


def test_greedy_speculative_changes_nothing_but_the_steps() -> None:
    target = tiny_llama()
    pair = make_pair(target, perturbed(target, 0.05))
    judge = Judge(Task("none", PROMPTS))
    rows = {}
    for method in ("target", "speculative"):
        config = DecodingConfig(method=method, num_speculative_tokens=2)  # type: ignore[arg-type]
        results, timing = generate(pair, PROMPTS, PARAMS, config, batch=3)
        rows[method] = judge.row(results)
        assert timing.num_tokens == rows[method]["tokens"] == 36
        assert sum(timing.step_tokens) <= 36
        assert len(timing.step_seconds) == len(timing.step_tokens) > 0
    assert rows["target"]["BE"] == 1
    assert rows["target"]["survival"] == []
    assert rows["speculative"]["BE"] > 1
    assert len(rows["speculative"]["survival"]) == 2
    assert rows["speculative"]["difference"] == pytest.approx(0, abs=1e-9)
    assert rows["speculative"]["ppl_ratio"] == pytest.approx(1, abs=1e-9)


def test_scores_equal_what_the_engine_reported() -> None:
    pair = make_pair(tiny_llama(), tiny_llama(1))
    results, _ = generate(pair, PROMPTS, PARAMS, DecodingConfig(method="target"), batch=3)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert score(pair, prompt, result.token_ids) == pytest.approx(result.log_probs, abs=1e-9)


def test_judge_compares_scores_with_the_first_texts() -> None:
    task = Task("none", [[1], [2]], lambda results: [len(result.token_ids) > 1 for result in results])
    judge = Judge(task)
    short, long = Generation([1], [-1.0], num_steps=1), Generation([1, 2], [-0.5, -0.5], num_steps=1)
    assert judge.row([short, long])["right"] == 0.5
    row = judge.row([long, long])
    assert row["right_ratio"] == 2
    assert row["difference"] == pytest.approx(0.25)
    assert row["BE"] == 2


def test_gap_shares_are_of_exact_joint_decoding() -> None:
    rows: list[decode.Row] = [
        {"method": name, "difference": value} for name, value in [("target", 0.0), ("mmtad", 0.3)]
    ]
    decode.add_gap_shares(rows)
    assert "gap_share" not in rows[0]
    rows.append({"method": "exact mtjd", "difference": 0.4})
    for interval in ([-0.1, 0.9], [1e-6, 2e-6]):
        rows[-1]["interval"] = interval
        decode.add_gap_shares(rows)
        assert "gap_share" not in rows[0]
    rows[-1]["interval"] = [0.3, 0.5]
    decode.add_gap_shares(rows)
    assert [row["gap_share"] for row in rows] == pytest.approx([0, 0.75, 1])


def test_a_row_prints_one_cell_per_column() -> None:
    row = {**describe(DecodingConfig(method="mmtad")), "interval": [0.1, 0.2], "BE": float("nan")}
    assert line(row).split()[:2] == ["mmtad", "-"]
    assert "0.100..0.200" in line(row)
    assert len(header().split()) == len(COLUMNS)


@pytest.mark.slow
def test_the_whole_program_on_the_shipped_pair(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pair", "T", "--prompts", "3", "--timed-prompts", "1", "--repeats", "2"]
    arguments += ["--depths", "2", "--widths", "2", "--temperatures", "1", "--max-tokens", "24"]
    document = decode.run(decode.parse_arguments(arguments), print)
    methods = [row["method"] for row in document["rows"]]
    assert {"target", "spec. block", "mmtad"} <= set(methods)
    assert {"greedy", "beam search", "repetition", "exact mtjd"} <= set(methods)
    target = document["rows"][0]
    assert target["S"] == pytest.approx(1, abs=1e-6)
    assert all(row["S"] > 0 for row in document["rows"] if "S" in row)
    assert {"copy_gb_per_s", "bytes_per_step", "pair", "commit"} <= set(target)
    assert document == json.loads(json.dumps(document))
    assert "right_ratio" in capsys.readouterr().out
    assert Path(document["settings"]["pair"]).name == "T"
