"""What workers ask of the nodes of a Ray cluster, some of which come late."""

from collections.abc import Mapping, Sequence

GATHER_SECONDS = 20.0  # from the first node with cores on: nodes that are started together are all there
LACKING_SECONDS = 120.0  # from joining on: then a node that nobody has started is taken for a mistake


class NoClusterError(Exception):
    """There is no cluster that serves; the message is one line with the cure."""


class NodesAwaitedError(Exception):
    """Nodes that are still to come decide what workers ask for; the message says what is there."""


def cores_per_worker(node_cores: Sequence[int], num_workers: int) -> int:
    """The most whole cores that each of `num_workers` can have on nodes with so many; at least 1."""
    most = max(node_cores, default=1)
    fitting = (
        cores for cores in range(most, 0, -1) if sum(each // cores for each in node_cores) >= num_workers
    )
    return next(fitting, 1)


class Demand:
    """What each of `num_workers` workers needs of its node, by the nodes there are when it is asked.

    What an actor was promised once it keeps, so a cluster that still gathers is waited for.
    """

    def __init__(self, num_workers: int, device: str, num_gpus: int) -> None:
        self._num_workers = num_workers
        self._device = device
        self._num_gpus = num_gpus
        self._asked: float | None = None  # when for the first time, in seconds
        self._found: float | None = None  # when a node had cores for the first time

    def options(self, nodes: Sequence[Mapping[str, float]], now: float) -> dict[str, int]:
        """Ray's options of an actor, from the resources of each node and a clock's seconds.

        Raises NodesAwaitedError: ask again. Raises NoClusterError: no node will do.
        """
        if self._asked is None:
            self._asked = now
        gpus = max((int(node.get("GPU", 0)) for node in nodes), default=0)
        if self._device == "cuda" or (self._device == "auto" and gpus):
            return self._on_gpus(gpus, now - self._asked)
        return self._on_cores([int(node.get("CPU", 0)) for node in nodes], now)

    def _on_gpus(self, most: int, waited: float) -> dict[str, int]:
        """Ray itself waits for a node with a free GPU, but several that no node has would never come."""
        if most < self._num_gpus and self._num_gpus > 1:
            if waited < LACKING_SECONDS:
                raise NodesAwaitedError(f"no node has more than {most} of {self._num_gpus} GPUs so far")
            raise NoClusterError(
                f"--tensor-parallel-size {self._num_gpus}: no node of the cluster has more than {most} GPUs; "
                "give a smaller number, or add a node"
            )
        return {"num_gpus": self._num_gpus, "num_cpus": self._num_gpus}

    def _on_cores(self, cores: Sequence[int], now: float) -> dict[str, int]:
        found = sum(each > 0 for each in cores)
        if not found:
            raise NodesAwaitedError("no node has a core so far")
        if self._found is None:
            self._found = now
        # Under `auto` a node with a GPU may follow those that have none.
        complete = self._device == "cpu" and found >= self._num_workers
        if not complete and now - self._found < GATHER_SECONDS:
            raise NodesAwaitedError(f"nodes with cores so far: {found}; more may come")
        return {"num_cpus": cores_per_worker(cores, self._num_workers)}
