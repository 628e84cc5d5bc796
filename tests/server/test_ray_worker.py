"""What crosses to another node, and what a launch asks of the nodes of its moment."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'mmtad-server[ray]'")

from server.messages import LoadCommand
from server.ray_nodes import NoClusterError, NodesAwaitedError
from server.ray_worker import RayCluster, with_whole_paths


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


async def test_options_are_those_of_the_nodes_that_are_there_now(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    cluster = RayCluster("auto", 2, "cpu")
    with pytest.raises(NodesAwaitedError):
        await cluster.options()
    nodes += [{"Alive": alive, "Resources": {"CPU": 4.0}} for alive in (True, False)]
    with pytest.raises(NodesAwaitedError, match="so far: 1"):
        await cluster.options()
    nodes[1]["Alive"] = True
    assert await cluster.options() == {"num_cpus": 4}


async def test_what_failed_at_joining_is_tried_anew_but_no_wrong_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster, errors = RayCluster("auto", 1, "cpu"), [OSError("for now"), NoClusterError("for good")]

    def connect() -> None:
        raise errors.pop(0)

    monkeypatch.setattr(cluster, "_connect", connect)
    with pytest.raises(OSError, match="for now"):
        await cluster.options()
    for _ in range(2):
        with pytest.raises(NoClusterError, match="for good"):
            await cluster.options()
