"""The list of mutations fits the source that it breaks."""

import shutil
from pathlib import Path

import pytest

from tests.decoding.mutations import MUTATIONS, ROOT, Mutation, apply


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_mutation_changes_valid_source(mutation: Mutation, tmp_path: Path) -> None:
    path = tmp_path / mutation.file
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutation.file, path)
    before = path.read_text(encoding="utf-8")
    apply(mutation, tmp_path)
    after = path.read_text(encoding="utf-8")
    assert after != before
    compile(after, str(path), "exec")


def test_a_mutation_without_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("kept = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="0 places in rule.py"):
        apply(Mutation("lost", "rule.py", "dropped = 1", "", ""), tmp_path)
