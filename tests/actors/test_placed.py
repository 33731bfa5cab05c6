"""Placement on a Ray cluster of several nodes: what is planned is where Ray puts it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.actors.nodes import ENVIRONMENT, Nodes

pytestmark = pytest.mark.timeout(600)

RAYLM = str(Path(sys.executable).with_name("raylm"))

PROGRAM = """
import asyncio, json, os, sys
import ray
from ray.util.placement_group import placement_group_table
from pydantic import TypeAdapter
from raylm.actors.cluster import actor_record, connect, nodes
from raylm.actors.manager import PoolManager
from raylm.actors.placement import Replica, plan, shape
from raylm.config import EngineConfig, SessionConfig
from raylm.errors import PlacementError

async def until(condition):
    while not await asyncio.to_thread(condition):
        await asyncio.sleep(0.05)

def all_free():
    return not any(node.held for node in nodes())

def where(actor):
    return actor_record(actor)["Address"]["NodeID"]

async def main():
    configs = TypeAdapter(list[EngineConfig]).validate_json(sys.argv[1])
    await until(all_free)
    found = nodes()
    planned = plan(found, [Replica(slot, shape(config)) for slot, config in enumerate(configs)])
    manager = await PoolManager.start(configs, SessionConfig(), placement_timeout_s=float(sys.argv[2]))
    real = []
    for slot, (config, actor) in enumerate(zip(configs, manager.actors.values())):
        if slot in manager._groups:
            bundles = placement_group_table(manager._groups[slot])["bundles_to_node_id"]
            real.append([where(actor), [bundles[rank + 1] for rank in range(config.tp)]])
        else:
            real.append([where(actor), []])
    print(json.dumps({"planned": [[found[place].id for place in places] for places in planned.places], "real": real}))
    await manager.aclose()
    await until(all_free)

connect(os.environ["RAY_ADDRESS"])
try:
    asyncio.run(main())
except PlacementError as error:
    print(json.dumps({"error": str(error)}))
"""


WAITING = """
import os
import time
import ray
from raylm.actors.cluster import actor_record, connect, placed

@ray.remote(num_gpus=4)
class Big:
    pass

connect(os.environ["RAY_ADDRESS"])
actors = [Big.remote() for _ in range(3)]
ray.get([actor.__ray_ready__.remote() for actor in actors])
actors += [Big.remote() for _ in range(4)]
while not all(map(actor_record, actors)):  # Ray registers actors without names by and by
    time.sleep(0.01)
while not all(actor_record(actor)["Address"]["Port"] for actor in actors):  # of a raylet, for those that wait
    assert placed(dict(enumerate(actors))) == {0, 1, 2}
assert placed(dict(enumerate(actors))) == {0, 1, 2}
assert actor_record(actors[3])["State"] == "PENDING_CREATION"
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head without GPUs and three nodes with four each, of two types in two zones."""
    started = Nodes(
        [
            {"num_gpus": 4, "labels": {"zone": "x"}, "resources": {"accelerator_type:A100": 1}},
            {"num_gpus": 4, "labels": {"zone": "y"}, "resources": {"accelerator_type:A100": 1}},
            {"num_gpus": 4, "labels": {"zone": "y"}, "resources": {"accelerator_type:L4": 1, "NPU": 2}},
        ]
    )
    yield started
    started.close()


def environment(nodes: Nodes) -> dict[str, str]:
    """Return the environment of a program on the cluster."""
    return {**ENVIRONMENT, "RAY_ADDRESS": nodes.address, "COLUMNS": "400"}


def run(nodes: Nodes, program: str, *arguments: str) -> str:
    """Run a program on the cluster; return the last line of what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment(nodes),
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def place(nodes: Nodes, *engines: dict[str, Any], timeout_s: float = 0) -> Any:
    """Start a pool and end it; return where its ranks were planned to go and where they were, or its error."""
    return json.loads(run(nodes, PROGRAM, json.dumps(engines), str(timeout_s)))


SIMULATED = {"kind": "simulated"}
PYTORCH = {"kind": "lmdeploy", "backend": "pytorch", "path": "any"}


def test_actors_are_where_they_were_planned(nodes: Nodes) -> None:
    """Each actor is on the node that the plan named, whatever the order they were asked for in."""
    engines = [{**SIMULATED, "num_gpus": gpus} for gpus in (1, 3, 2, 2, 0.5, 0.5, 2, 1)]
    placed = place(nodes, *engines)
    assert [actor for actor, _ in placed["real"]] == [places[0] for places in placed["planned"]]


def test_ranks_over_nodes_are_where_they_were_planned(nodes: Nodes) -> None:
    """Eight ranks fill two nodes, with their actor beside the first, and another replica of four has the third."""
    placed = place(nodes, {**PYTORCH, "tp": 4}, {**PYTORCH, "tp": 8})
    (other, other_ranks), (actor, ranks) = placed["real"]
    assert sorted(ranks.count(node) for node in set(ranks)) == [4, 4]
    assert actor == ranks[0]
    assert set(other_ranks) == {other}
    assert other not in ranks


def test_types_labels_and_resources_are_kept_to(nodes: Nodes) -> None:
    """An accelerator type, a label and a custom resource each lead to the nodes that have them."""
    first, second, third = nodes.ids
    placed = place(
        nodes,
        {**SIMULATED, "num_gpus": 1, "accelerator_type": "L4"},
        {**SIMULATED, "num_gpus": 1, "label_selector": {"zone": "x"}},
        {**PYTORCH, "tp": 2, "accelerator_type": "A100", "label_selector": {"zone": "!x"}},
        {"kind": "lmdeploy", "device": "ascend", "path": "any", "tp": 2},
    )
    assert [actor for actor, _ in placed["real"]] == [third, first, second, third]
    assert set(placed["real"][2][1]) == {second}


def test_clients_are_on_all_nodes(nodes: Nodes) -> None:
    """Four clients are on four nodes."""
    placed = place(nodes, *[{"kind": "http", "url": "http://127.0.0.1:9"}] * 4)
    assert len({actor for actor, _ in placed["real"]}) == 4


def test_what_does_not_fit_is_refused_after_the_bound(nodes: Nodes) -> None:
    """Actors that no node holds are asked of Ray, and refused when the bound has passed."""
    placed = place(nodes, {**SIMULATED, "num_gpus": 8}, timeout_s=1)
    assert "the actors are not up after" in placed["error"]
    assert "no such node has 8 GPUs: the most is 4. What would fit: tp 4" in placed["error"]


def test_an_actor_waits_until_its_room_is_taken(nodes: Nodes) -> None:
    """An actor that Ray has sent on to a full node is known to wait there."""
    run(nodes, WAITING)


def test_a_node_that_joins_is_used(nodes: Nodes) -> None:
    """Actors that wait for room go to a node that joins meanwhile."""
    command = [sys.executable, "-c", PROGRAM, json.dumps([{**SIMULATED, "num_gpus": 6}]), "300"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(nodes)
    ) as waiting:
        assert waiting.stderr is not None
        assert waiting.stdout is not None
        said = next(line for line in waiting.stderr if "waiting for room" in line)
        assert "no such node has 6 GPUs" in said
        joined = nodes.add(num_gpus=6)
        placed = json.loads(waiting.stdout.read().splitlines()[-1])
    nodes.remove(joined)
    assert placed["real"] == [[joined, []]]


def raylm_plan(nodes: Nodes, tmp_path: Path, *engines: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run `raylm plan` for a model with some engines."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"models": [{"name": "big", "engines": list(engines)}]}))
    return subprocess.run(
        [RAYLM, "plan", str(config)], capture_output=True, text=True, check=False, env=environment(nodes)
    )


def test_raylm_plan_on_a_cluster(nodes: Nodes, tmp_path: Path) -> None:
    """`raylm plan` shows the cluster's nodes and who would go there, and exits with 0."""
    result = raylm_plan(nodes, tmp_path, {**PYTORCH, "tp": 8, "replicas": 1})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("big slot 0 (ranks ") == 2
    assert "it fits: 1 replica on 4 nodes and 8 of 12 free GPUs" in result.stdout


def test_raylm_plan_of_too_much(nodes: Nodes, tmp_path: Path) -> None:
    """`raylm plan` exits with 1 and says what would fit when it does not."""
    result = raylm_plan(nodes, tmp_path, {"kind": "lmdeploy", "path": "any", "tp": 8})
    assert result.returncode == 1
    assert "no such node has 8 GPUs: the most is 4. What would fit: tp 4" in result.stdout
    assert result.stderr == ""
