"""From an engine's settings and a cluster's nodes to Ray actor options. Pure: no Ray call, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raylm.errors import PlacementError


@dataclass(frozen=True)
class Node:
    """What one node has in all, used or not.

    Attributes:
        name: For people.
        num_cpus: Logical CPUs.
        num_gpus: Logical GPUs.
    """

    name: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Shape:
    """What one replica takes of one node.

    Attributes:
        num_cpus: Logical CPUs, a part of one allowed.
        num_gpus: Logical GPUs: `tp`, or 0 for an engine that runs on CPU.
        grouped: The engine's ranks are Ray actors themselves, one a GPU. The replica then is a placement group, its own
            actor takes no GPU, and the ranks find theirs in the group.
    """

    num_cpus: float
    num_gpus: int = 0
    grouped: bool = False

    def actor_options(self) -> dict[str, Any]:
        """Return the options of the replica's Ray actor. Ray starts it again as often as it dies."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": 0 if self.grouped else self.num_gpus,
            "max_restarts": -1,
            "scheduling_strategy": "SPREAD",
        }

    def bundles(self) -> list[dict[str, float]]:
        """Return the bundles of the placement group of a grouped replica: its own actor's first, then the ranks'."""
        return [{"CPU": self.num_cpus}, *({"GPU": 1.0} for _ in range(self.num_gpus))]

    def __str__(self) -> str:
        gpus = f"{self.num_gpus} GPU{'s' if self.num_gpus > 1 else ''} and " if self.num_gpus else ""
        return f"{gpus}{self.num_cpus:g} CPU{'s' if self.num_cpus > 1 else ''}"


def plan(nodes: Sequence[Node], shape: Shape, replicas: int) -> list[int]:
    """Place replicas on nodes, the emptiest first.

    Returns:
        The index in `nodes` of each replica's node.

    Raises:
        PlacementError: they do not fit even on an idle cluster. The text says how many do.
    """
    free = [[node.num_cpus, node.num_gpus] for node in nodes]
    placed: list[int] = []
    for _ in range(replicas):
        fitting = [
            index for index, (cpus, gpus) in enumerate(free) if cpus >= shape.num_cpus and gpus >= shape.num_gpus
        ]
        if not fitting:
            have = "; ".join(f"{node.name}: {node.num_cpus:g} CPUs, {node.num_gpus:g} GPUs" for node in nodes)
            raise PlacementError(
                f"{replicas} replicas of {shape} each, on one node each, do not fit: room for {len(placed)} "
                f"({have or 'the cluster has no node'}). Ask for fewer replicas, a smaller tp, or add nodes"
            )
        chosen = max(fitting, key=lambda index: (free[index][1], free[index][0]))
        free[chosen][0] -= shape.num_cpus
        free[chosen][1] -= shape.num_gpus
        placed.append(chosen)
    return placed
