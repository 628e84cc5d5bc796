"""What workers ask of nodes, which may come after them."""

import pytest

from server.ray_nodes import (
    GATHER_SECONDS,
    LACKING_SECONDS,
    Demand,
    NoClusterError,
    NodesAwaitedError,
    cores_per_worker,
)

HEAD = {"memory": 1.0}
CORES = {"CPU": 2.0}
ONE_GPU = {"CPU": 4.0, "GPU": 1.0}
TWO_GPUS = {"CPU": 4.0, "GPU": 2.0}
START = 1000.0  # of the clock


@pytest.mark.parametrize(
    ("node_cores", "num_workers", "cores"),
    [
        ([8], 1, 8),
        ([8], 3, 2),
        ([8, 4], 2, 4),
        ([8, 4], 1, 8),
        ([0, 2, 2], 2, 2),
        ([2, 2], 3, 1),
        ([1], 4, 1),  # the others wait for nodes
        ([0], 1, 1),
        ([], 2, 1),
    ],
)
def test_workers_get_as_many_whole_cores_as_all_can_have(
    node_cores: list[int], num_workers: int, cores: int
) -> None:
    assert cores_per_worker(node_cores, num_workers) == cores


def test_a_late_node_with_cores_counts() -> None:
    demand = Demand(2, "cpu", 1)
    for now, nodes in ((START, [HEAD]), (START + 600, [HEAD, CORES])):
        with pytest.raises(NodesAwaitedError):
            demand.options(nodes, now)
    assert demand.options([HEAD, CORES, CORES], START + 601) == {"num_cpus": 2}


def test_nodes_with_cores_are_not_waited_for_without_end() -> None:
    demand = Demand(2, "cpu", 1)
    with pytest.raises(NodesAwaitedError):
        demand.options([HEAD], START)
    with pytest.raises(NodesAwaitedError, match="so far: 1"):
        demand.options([HEAD, CORES], START + 600)
    assert demand.options([HEAD, CORES], START + 600 + GATHER_SECONDS) == {"num_cpus": 1}
    # Whoever asks later is told of the nodes of its moment.
    assert demand.options([HEAD, CORES, CORES], START + 700) == {"num_cpus": 2}


def test_auto_waits_for_a_gpu_and_then_takes_cores() -> None:
    late, never = Demand(1, "auto", 1), Demand(1, "auto", 1)
    for demand in (late, never):
        with pytest.raises(NodesAwaitedError):
            demand.options([CORES], START)
    assert late.options([CORES, ONE_GPU], START + 1) == {"num_gpus": 1, "num_cpus": 1}
    assert never.options([CORES], START + GATHER_SECONDS) == {"num_cpus": 2}


@pytest.mark.parametrize("nodes", [[], [HEAD], [CORES], [ONE_GPU]])
def test_ray_itself_waits_for_a_free_gpu(nodes: list[dict[str, float]]) -> None:
    assert Demand(2, "cuda", 1).options(nodes, START) == {"num_gpus": 1, "num_cpus": 1}


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_several_gpus_of_a_late_node_count(device: str) -> None:
    demand = Demand(1, device, 2)
    with pytest.raises(NodesAwaitedError):
        demand.options([ONE_GPU], START)
    assert demand.options([ONE_GPU, TWO_GPUS], START + 1) == {"num_gpus": 2, "num_cpus": 2}


@pytest.mark.parametrize(("nodes", "most"), [([HEAD], 0), ([ONE_GPU, ONE_GPU], 1), ([TWO_GPUS], 2)])
def test_gpus_that_no_node_has_are_told_after_a_while(nodes: list[dict[str, float]], most: int) -> None:
    demand = Demand(1, "cuda", 4)
    for waited in (0, LACKING_SECONDS - 1):
        with pytest.raises(NodesAwaitedError, match=f"more than {most} of 4 GPUs so far"):
            demand.options(nodes, START + waited)
    with pytest.raises(NoClusterError, match=rf"size 4: no node .* more than {most} GPUs; give a"):
        demand.options(nodes, START + LACKING_SECONDS)
