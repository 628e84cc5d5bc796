"""A Ray cluster on this machine: `python -m tests.e2e.ray_cluster CORES...`, a node for each number of cores.

Says the cluster's address once it is there. Reads `remove`, which kills the oldest node without warning, and
`add CORES` from standard input, answers each with a line, and takes the cluster down at its end.
"""

import os
import sys
from typing import Any

from ray.cluster_utils import Cluster

MEMORY = 80 * 2**20  # Ray's least for objects
ADDRESS = "127.0.0.2"  # of this machine alone; 127.0.0.1 is what Ray replaces
# A node that says nothing for two seconds is lost: by default it takes half a minute.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    each: dict[str, Any] = {"node_ip_address": ADDRESS, "object_store_memory": MEMORY}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH, **each}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=int(cores), **each) for cores in sys.argv[1:]]
        say(cluster.address)
        for line in sys.stdin:
            order, *cores = line.split()
            if order == "remove":
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
            else:
                nodes.append(cluster.add_node(num_cpus=int(cores[0]), **each))
            say(order)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
