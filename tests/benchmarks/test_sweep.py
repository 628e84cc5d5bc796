"""The sweep covers its grid once, resumes, and compares the paper's references."""

import json
from typing import Any

import pytest
import torch

from benchmarks import sweep
from benchmarks.references import DRAFT_REFERENCES, draft_reference, max_reference, own_reference
from decoding.acceptance import best_reference
from decoding.methods import step
from decoding.token_tree import TokenTree


def small_tree() -> tuple[TokenTree, torch.Tensor, torch.Tensor]:
    """Depth 2, width 2: nodes 1 (ends) and 2 at depth 1, node 3 below 2, node 4 padding."""
    tree = TokenTree.of_roots(torch.tensor([0]), 5)
    scores = torch.tensor([[-0.5, -1.0]]).double()
    ids = torch.tensor([[1, 2]])
    tree.add_level(
        1, 1, token_ids=ids, parents=torch.zeros_like(ids), draft_log_probs=scores,
        ended=torch.tensor([[True, False]]),
    )  # fmt: skip
    tree.add_level(
        3, 2, token_ids=ids, parents=torch.tensor([[2, 2]]),
        draft_log_probs=torch.tensor([[-1.5, -torch.inf]]).double(), ended=torch.zeros_like(ids).bool(),
    )  # fmt: skip
    return tree, torch.tensor([1]), torch.tensor([2])


def test_references_by_hand() -> None:
    tree, final, limits = small_tree()
    assert best_reference(tree, final, limits, 2)[0, 1:4].tolist() == [-0.5, -0.5, -0.5]
    assert max_reference(tree, final, limits, 2)[0, 1:4].tolist() == [-0.5, -0.5, -0.5]
    assert own_reference(tree, final, limits, 2)[0, 1:4].tolist() == [-0.5, -1.0, -1.5]
    tree.ended[:] = False
    assert max_reference(tree, final, limits, 2)[0, 1:4].tolist() == [-0.5, -0.5, -1.5]


def test_the_served_reference_comes_back() -> None:
    served: Any = step.best_reference  # type: ignore[attr-defined]
    with draft_reference("own"):
        assert step.best_reference is DRAFT_REFERENCES["own"]  # type: ignore[attr-defined]
    assert step.best_reference is served  # type: ignore[attr-defined]


def test_grid_holds_every_configuration_once() -> None:
    found = list(sweep.grid(sweep.parse_arguments([])))
    assert len(found) == len(set(found)) == 3 * 5 * (2 + 3 * 4)
    assert {c.acceptance_reference for name, c in found if name == "target"} == {"target"}
    assert {c.acceptance_reference for name, c in found if name != "target"} == {"draft"}


SMALL = ("--depths", "2", "--widths", "2", "--thresholds", "0.5", "--temperatures", "1", "--repeats", "1")


@pytest.mark.slow
def test_a_second_run_measures_only_what_is_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "lines.jsonl"
    command = ["sweep", "--out", str(out), "--prompts", "2", "--max-tokens", "8", "--timed-prompts", "1"]
    command += SMALL

    def rows(*more: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", [*command, *more])
        sweep.main()
        return [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]

    judged = rows("--no-timed")
    assert len(judged) == 4 + 3 + 4
    assert not any("timed" in row for row in judged)
    everything = rows()
    assert everything[: len(judged)] == judged
    timed = everything[len(judged) :]
    assert [row["method"] for row in timed] == ["target", "spec. block", "multi 4x1", "mmtad"]
    assert all(row["timed"] and row["step_cost"] > 0 for row in timed)
    assert rows() == everything
