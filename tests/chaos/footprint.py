"""What a process holds at rest, and whether a series of such looks shows a leak."""

from dataclasses import dataclass
from typing import Self

import psutil

from tests.chaos.conftest import ChaosServer

MEBIBYTE = 2**20
LIMIT_MIB = {"api": 20.0, "worker": 50.0}


@dataclass(frozen=True)
class Footprint:
    """Resident memory in MiB, open files and threads of one process."""

    memory_mib: float
    num_files: int
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> Self:
        process = psutil.Process(pid)
        return cls(process.memory_info().rss / MEBIBYTE, process.num_fds(), process.num_threads())


def num_connections(server: ChaosServer) -> int:
    """Those that the server holds: established, or left by the other end and not yet closed."""
    connections = psutil.Process(server.process.pid).net_connections(kind="tcp")
    held = (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
    return sum(each.laddr.port == server.port and each.status in held for each in connections)


Footprints = dict[str, Footprint]


def footprints(server: ChaosServer) -> Footprints:
    """Of the API process and its only worker."""
    (worker,) = server.workers()
    return {"api": Footprint.of(server.process.pid), "worker": Footprint.of(worker)}


def growth_mib(at_rest: list[Footprints], name: str) -> float:
    return at_rest[-1][name].memory_mib - at_rest[0][name].memory_mib


def leaks(at_rest: list[Footprints]) -> list[str]:
    """What grew from the first look to the last by more than it may, in words."""
    found = []
    for name, limit in LIMIT_MIB.items():
        first, last = at_rest[0][name], at_rest[-1][name]
        if growth_mib(at_rest, name) >= limit:
            found.append(f"{name}: memory")
        if last.num_files > first.num_files:
            found.append(f"{name}: open files")
    return found
