"""Several Ray nodes on this machine, each with GPUs in name only, in a process that takes orders on stdin.

    python -m tests.actors.nodes '[{"num_gpus": 4, "labels": {"zone": "a"}}, ...]'

Prints the cluster's address, then does what each line says: `add JSON` joins a node and prints its id, `remove ID` has
it leave.
The head has CPUs alone. The nodes end with stdin.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from ray.cluster_utils import Cluster

ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",  # such nodes know no token, and programs that send one would not be called back
    "RAY_raylet_start_wait_time_s": "180",  # a busy machine takes longer than Ray's 30 s
}
"""Environment of the nodes, and of the programs that use them."""

_STORE_BYTES = 80 * 2**20


class Nodes:
    """A cluster whose nodes are in another process.

    Args:
        nodes: What each has beside four CPUs, as `ray.cluster_utils.Cluster.add_node` takes it.
        environment: Their environment.

    Attributes:
        address: Where their GCS listens.
        ids: Ray's ids of them, without the head.
        pid: The process that has started them all.
    """

    def __init__(self, nodes: list[dict[str, Any]], environment: Mapping[str, str] = ENVIRONMENT) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.actors.nodes", json.dumps(nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.pid = self._process.pid
        answer = self._answer()
        self.address: str = answer["address"]
        self.ids: list[str] = answer["ids"]

    def add(self, **node: Any) -> str:
        """Join another node; return its id."""
        found: str = self._ask(f"add {json.dumps(node)}")["id"]
        return found

    def remove(self, node_id: str) -> None:
        """Have a node leave; return when Ray knows that it is gone."""
        self._ask(f"remove {node_id}")

    def close(self) -> None:
        """End all nodes."""
        self._process.communicate()

    def _ask(self, order: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the nodes did not come up; exit code {self._process.wait()}")


def main() -> None:
    """Start nodes and take orders."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "include_dashboard": False, "object_store_memory": _STORE_BYTES},
    )
    nodes = {}

    def add(node: dict[str, Any]) -> str:
        added = cluster.add_node(num_cpus=4, object_store_memory=_STORE_BYTES, **node)
        nodes[added.node_id] = added
        return str(added.node_id)

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)

    try:
        ids = [add(node) for node in json.loads(sys.argv[1])]
        answer(address=cluster.address, ids=ids)
        for line in sys.stdin:
            order, _, argument = line.strip().partition(" ")
            if order == "add":
                answer(id=add(json.loads(argument)))
            else:
                cluster.remove_node(nodes.pop(argument))
                # One that had no time to sign off is missed by and by.
                while argument in cluster.global_state._live_node_ids():
                    time.sleep(0.1)
                answer()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
