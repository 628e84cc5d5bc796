"""How a cluster's cores are divided, and what crosses to another node."""

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'mmtad-server[ray]'")

from server.messages import LoadCommand
from server.ray_worker import NoClusterError, RayCluster, check_gpus, cores_per_worker, with_whole_paths


@pytest.mark.parametrize(
    ("node_cores", "num_workers", "cores"),
    [
        ([8.0], 1, 8),
        ([8.0], 3, 2),
        ([8.0, 4.0], 2, 4),
        ([8.0, 4.0], 1, 8),
        ([0.0, 2.0, 2.0], 2, 2),
        ([2.0, 2.0], 3, 1),
        ([1.0], 4, 1),  # the others wait for nodes
        ([0.0], 1, 1),
        ([], 2, 1),
    ],
)
def test_workers_get_as_many_whole_cores_as_all_can_have(
    node_cores: list[float], num_workers: int, cores: int
) -> None:
    assert cores_per_worker(node_cores, num_workers) == cores


@pytest.mark.parametrize(("node_gpus", "num_gpus"), [([], 1), ([1.0], 1), ([1.0, 2.0], 2), ([8.0], 4)])
def test_gpus_that_some_node_has_are_waited_for(node_gpus: list[float], num_gpus: int) -> None:
    check_gpus(node_gpus, num_gpus)


@pytest.mark.parametrize(("node_gpus", "num_gpus", "most"), [([], 2, 0), ([1.0, 1.0], 2, 1), ([4.0], 8, 4)])
def test_gpus_that_no_node_has_are_told(node_gpus: list[float], num_gpus: int, most: int) -> None:
    with pytest.raises(NoClusterError, match=rf"size {num_gpus}: no node .* more than {most} GPUs; give a"):
        check_gpus(node_gpus, num_gpus)


def test_a_folder_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path)
    load = LoadCommand(
        target="target", draft="org/draft", device="cpu", dtype="auto", max_model_len=None, max_num_seqs=2
    )
    whole = with_whole_paths(load)
    assert (whole.target, whole.draft) == (str(tmp_path / "target"), "org/draft")


def test_a_file_of_another_node_is_kept_under_its_content() -> None:
    cluster = RayCluster("auto", 1, "cpu")
    first, same, other = (cluster.keep(content) for content in (b"{}", b"{}", b"[]"))
    assert first == same != other
    assert (Path(first).read_bytes(), Path(other).read_bytes()) == (b"{}", b"[]")
    cluster.close()
    assert not Path(first).exists()
