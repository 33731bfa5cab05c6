"""Placement: what fits where, and what a user is told when it does not."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.actors.placement import Node, Shape, plan
from raylm.errors import PlacementError

NODES = st.lists(st.builds(Node, st.text(), st.integers(0, 16), st.integers(0, 8)), max_size=6)
SHAPES = st.builds(Shape, st.sampled_from([0, 0.5, 1, 4]), st.integers(0, 4))


@given(NODES, SHAPES, st.integers(1, 40))
def test_a_plan_fits_its_nodes(nodes: list[Node], shape: Shape, replicas: int) -> None:
    """A plan places every replica on one node and takes no more of any node than it has; else nothing would have."""
    try:
        placed = plan(nodes, shape, replicas)
    except PlacementError:
        room = [
            min(
                node.num_cpus // shape.num_cpus if shape.num_cpus else replicas,
                node.num_gpus // shape.num_gpus if shape.num_gpus else replicas,
            )
            for node in nodes
        ]
        assert sum(room) < replicas
        return
    assert len(placed) == replicas
    for index, node in enumerate(nodes):
        assert placed.count(index) * shape.num_cpus <= node.num_cpus
        assert placed.count(index) * shape.num_gpus <= node.num_gpus


def test_a_refusal_says_how_many_fit() -> None:
    """PlacementError names the shape, how many replicas fit and what each node has."""
    nodes = [Node("a", 16, 8), Node("b", 16, 2)]
    with pytest.raises(PlacementError, match=r"3 replicas of 4 GPUs and 1 CPU each.*room for 2.*b: 16 CPUs, 2 GPUs"):
        plan(nodes, Shape(num_cpus=1, num_gpus=4), 3)


GPUS = """
import asyncio, json, ray
from raylm.actors.manager import PoolManager
from raylm import Pool, SessionConfig, SimulatedConfig

async def main():
    manager = await PoolManager.start([SimulatedConfig(num_gpus=2)] * 2, SessionConfig())
    async with Pool() as pool:
        await asyncio.gather(*[pool.attach(slot, actor) for slot, actor in enumerate(manager.actors)])
        print(json.dumps([slot.gpus for slot in pool.statistics().slots]))
    await manager.aclose()

ray.init(address="local", num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False)
asyncio.run(main())
"""


def test_each_actor_has_its_own_gpus() -> None:
    """Two actors of two logical GPUs each get four different ones."""
    result = subprocess.run([sys.executable, "-c", GPUS], capture_output=True, text=True, check=True)
    first, second = json.loads(result.stdout.splitlines()[-1])
    assert sorted(first + second) == [0, 1, 2, 3]
