"""Placement: what fits where, and what a user is told when it does not."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from raylm.actors.placement import Node, Plan, Replica, Shape, matches, nodes_of, plan, replicas_of, require, shape
from raylm.config import (
    APIServerConfig,
    EngineConfig,
    HTTPConfig,
    LMDeployConfig,
    ModelConfig,
    NodeConfig,
    OpenVINOConfig,
    SimulatedConfig,
    TritonConfig,
)
from raylm.errors import PlacementError

A100 = {"accelerator_type:A100": 1.0}
NODES = st.builds(
    Node,
    st.sampled_from("abc"),
    st.integers(0, 4),
    st.integers(0, 8),
    st.sampled_from([{}, A100, {"NPU": 4.0}]),
    st.sampled_from([{}, {"zone": "x"}, {"zone": "y"}]),
)
SHAPES = st.builds(
    Shape,
    st.sampled_from([0, 0.5, 1]),
    st.sampled_from([0, 0.25, 0.5, 1, 2, 3, 4, 5, 6]),
    accelerator_type=st.sampled_from([None, None, "A100"]),
    labels=st.sampled_from([(), (), (("zone", "x"),), (("zone", "!x"),)]),
) | st.builds(Shape, st.sampled_from([0, 1]), st.integers(1, 4), accelerator=st.just("NPU"))
GROUPS = st.builds(Shape, st.just(1), st.integers(2, 20), st.just(True))


def replicas(*shapes: Shape) -> list[Replica]:
    """Return a slot for each shape."""
    return [Replica(slot, wanted) for slot, wanted in enumerate(shapes)]


def check(planned: Plan) -> None:
    """Assert that a plan takes no more of a node than it has, and puts nothing on a node of the wrong kind."""
    taken: Counter[tuple[int, str]] = Counter()
    shares: dict[int, list[float]] = {}
    for replica, places in zip(planned.replicas, planned.places, strict=True):
        wanted = replica.shape
        if not places:
            continue
        assert len(places) == max(1, int(wanted.num_gpus))
        assert wanted.spans(planned.nodes) or len(set(places)) == 1
        taken[places[0], "CPU"] += round(wanted.num_cpus * 10_000)
        for place in places:
            assert planned.nodes[place].has_kind(wanted)
            if wanted.num_gpus >= 1:
                taken[place, wanted.accelerator] += 10_000
        if 0 < wanted.num_gpus < 1:
            shares.setdefault(places[0], []).append(wanted.num_gpus)
    for index, parts in shares.items():
        gpus: list[float] = []  # no packing of shares takes fewer GPUs than their sum, and this one is one
        for part in sorted(parts, reverse=True):
            gpu = next((n for n, used in enumerate(gpus) if used + part <= 1), None)
            if gpu is None:
                gpus.append(part)
            else:
                gpus[gpu] += part
        taken[index, "GPU"] += 10_000 * len(gpus)
    for (index, name), amount in taken.items():
        assert amount <= planned.nodes[index].free(name) * 10_000


def most_gpus(nodes: Sequence[Node], shapes: Sequence[Shape]) -> float:
    """Return how many accelerators the best of all placements uses, by trying all of them."""

    @cache
    def most(n: int, free: tuple[tuple[float, tuple[float, ...], float], ...]) -> float:
        if n == len(shapes):
            return 0
        wanted = shapes[n]
        best = most(n + 1, free)
        for index, (cpus, gpus, npus) in enumerate(free):
            if not nodes[index].has_kind(wanted) or cpus < wanted.num_cpus:
                continue
            size = wanted.num_gpus
            lefts: list[tuple[tuple[float, ...], float]] = []
            if wanted.accelerator == "NPU":
                lefts = [(gpus, npus - size)] if npus >= size else []
            elif size >= 1:
                lefts = [(gpus[int(size) :], npus)] if gpus[: int(size)].count(1) == size else []
            else:
                for gpu in {gpu for gpu in gpus if gpu >= size}:
                    rest = list(gpus)
                    rest.remove(gpu)
                    lefts.append((tuple(sorted([*rest, gpu - size], reverse=True)), npus))
            for left, npus_left in lefts:
                changed = (*free[:index], (cpus - wanted.num_cpus, left, npus_left), *free[index + 1 :])
                best = max(best, size + most(n + 1, changed))
        return best

    start = tuple((node.num_cpus, (1.0,) * int(node.num_gpus), node.total("NPU")) for node in nodes)
    return most(0, start)


@settings(max_examples=400, deadline=None)
@given(st.lists(NODES, max_size=4), st.lists(SHAPES, max_size=7))
def test_no_gpu_is_idle_that_a_better_plan_would_use(nodes: list[Node], shapes: list[Shape]) -> None:
    """A plan takes no more than there is, and uses as many accelerators as the best of all placements."""
    planned = plan(nodes, replicas(*shapes))
    check(planned)
    assert planned.num_gpus == most_gpus(nodes, [one for one in shapes if one.num_gpus])


@given(st.lists(NODES, max_size=6), st.lists(SHAPES | GROUPS, max_size=12))
def test_a_plan_takes_what_there_is(nodes: list[Node], shapes: list[Shape]) -> None:
    """A plan with replicas over several nodes takes no more of any than it has."""
    check(plan(nodes, replicas(*shapes)))


HELD = st.dictionaries(st.sampled_from(["CPU", "GPU", "NPU"]), st.integers(1, 4))
WITH_RESOURCES = st.builds(Shape, st.sampled_from([0, 1]), st.integers(0, 2), resources=st.just((("NPU", 2.0),)))


@given(
    st.lists(st.builds(replace, NODES, held=HELD), max_size=4), st.lists(SHAPES | GROUPS | WITH_RESOURCES, max_size=6)
)
def test_every_plan_has_words(nodes: list[Node], shapes: list[Shape]) -> None:
    """Whatever does not fit, the text says what is missing of it."""
    planned = plan(nodes, replicas(*shapes))
    check(planned)
    assert len(planned.lines()) == len(nodes)
    assert bool(planned.problems()) != planned.fits
    assert all("does not fit" in problem or "do not fit" in problem for problem in planned.problems())
    assert "What would fit: " in planned.refusal() or planned.fits


@given(st.lists(NODES, max_size=6), SHAPES, st.integers(1, 40))
def test_equal_replicas_fit_where_there_is_room(nodes: list[Node], wanted: Shape, count: int) -> None:
    """Of equal replicas as many are placed as the nodes have room for."""
    planned = plan(nodes, replicas(*[wanted] * count))
    check(planned)
    room = 0.0
    for node in nodes:
        if node.has_kind(wanted):
            cpus = node.num_cpus // wanted.num_cpus if wanted.num_cpus else count
            gpus = node.total(wanted.accelerator) // wanted.num_gpus if wanted.num_gpus else count
            room += min(cpus, gpus)
    assert sum(bool(places) for places in planned.places) == min(count, room)
    assert planned.fits == (room >= count)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 4))
def test_shares_never_overfill_a_gpu(hundredths: list[int], num_gpus: int) -> None:
    """Shares of any size are placed so that each lies within one GPU."""
    check(plan([Node("a", 99, num_gpus)], replicas(*(Shape(0, part / 100) for part in hundredths))))


def test_what_is_held_is_not_given_away() -> None:
    """A plan takes what is free, and an error says when the rest is there but held."""
    nodes = [Node("a", 16, 8, held={"GPU": 4.0})]
    planned = plan(nodes, replicas(Shape(1, 4), Shape(1, 4)))
    assert [bool(places) for places in planned.places] == [True, False]
    assert "missing: 4 GPUs, 4 on each node, which others hold at present" in planned.problems()[0]


def test_a_tight_node_is_filled_first() -> None:
    """A small replica goes where it just fits, so that a large one has a whole node."""
    planned = plan([Node("a", 16, 8), Node("b", 16, 2)], replicas(Shape(1, 2), Shape(1, 8)))
    assert planned.places == ((1, 1), (0,) * 8)


def test_what_is_rare_is_left_to_those_who_need_it() -> None:
    """Of two nodes that would do, a replica takes the one that nobody asks for by its type."""
    nodes = [Node("a", 16, 8, A100), Node("b", 16, 8)]
    planned = plan(nodes, replicas(Shape(1, 8), *[Shape(1, 1, accelerator_type="A100")] * 8))
    assert planned.fits


def test_clients_are_spread_over_the_nodes() -> None:
    """Actors that take a sliver of a CPU go evenly to all nodes, large or small."""
    nodes = [Node("a", 64, 8), Node("b", 4, 0), Node("c", 16, 0)]
    planned = plan(nodes, replicas(*[shape(HTTPConfig(url="http://x"))] * 6))
    assert Counter(places[0] for places in planned.places) == {0: 2, 1: 2, 2: 2}


def test_ranks_over_nodes_are_packed() -> None:
    """Ranks that no node holds together are on as few nodes as can be, the actor on that of rank 0."""
    nodes = [Node("a", 16, 4), Node("b", 16, 2), Node("c", 16, 4)]
    (places,) = plan(nodes, replicas(Shape(1, 8, grouped=True))).places
    assert places == (0, 0, 0, 0, 2, 2, 2, 2)


def test_ranks_stay_on_one_node_where_one_is_large_enough() -> None:
    """A replica that a node could hold waits for it, and does not go over several."""
    nodes = [Node(name, 16, 8, held={"GPU": 4.0}) for name in "ab"]
    assert not plan(nodes, replicas(Shape(1, 8, grouped=True))).fits


def test_a_refusal_says_how_many_fit() -> None:
    """PlacementError names the shape, how many replicas fit, what would fit instead and what each node has."""
    nodes = [Node("a", 16, 8), Node("b", 16, 2)]
    expected = (
        r"3 replicas of 4 GPUs and 1 CPU each.*room for 2; missing: 4 GPUs, 4 on each node\. "
        r"What would fit: 2 replicas, or tp 2, or 1 more node like a\..*b: 16 CPUs, 2 GPUs"
    )
    with pytest.raises(PlacementError, match=expected):
        require(plan(nodes, replicas(*[Shape(num_cpus=1, num_gpus=4)] * 3)))


FOUR = [Node(name, 16, 4, A100, {"zone": name}) for name in "abc"]


@pytest.mark.parametrize(
    ("nodes", "wanted", "said"),
    [
        (
            FOUR,
            Shape(1, 8),
            "no such node has 8 GPUs: the most is 4. What would fit: tp 4, or lmdeploy's pytorch backend",
        ),
        (FOUR, Shape(1, 16, grouped=True), "missing: 4 GPUs. What would fit: tp 8, or 1 more node like a"),
        (FOUR, Shape(1, 1, accelerator_type="H100"), "no node has accelerator type H100 (there is A100)"),
        (FOUR, Shape(1, 1, labels=(("zone", "d"),)), "no node has label zone=d (there is zone=a, zone=b, zone=c)"),
        (FOUR, Shape(1, resources=(("disk", 1),)), "no node has resource disk"),
        ([Node("a", 0, 4)], Shape(1, 4), "no such node has 1 CPU: the most is 0"),
        ([Node("a", 1, 4, held={"CPU": 1.0})], Shape(1, 4), "missing: 1 CPU, which others hold"),
        ([], Shape(1), "no node has anything"),
    ],
)
def test_a_refusal_says_what_is_missing(nodes: list[Node], wanted: Shape, said: str) -> None:
    """What is missing is named: the type, the label, the resource, or how much of it."""
    (problem,) = plan(nodes, replicas(wanted)).problems()
    assert said in problem


def test_what_is_said_to_fit_does() -> None:
    """With each change that an error offers the replicas do fit."""
    nodes = FOUR
    wanted = [Shape(1, 4)] * 5
    (problem,) = plan(nodes, replicas(*wanted)).problems()
    assert problem.endswith("What would fit: 3 replicas, or tp 2, or 2 more nodes like a")
    assert plan(nodes, replicas(*wanted[:3])).fits
    assert plan(nodes, replicas(*[Shape(1, 2)] * 5)).fits
    assert plan([*nodes, *nodes[:2]], replicas(*wanted)).fits


def test_a_plan_reads_node_by_node() -> None:
    """The text says of each node what it has, and which ranks of which slots go there."""
    models = [
        ModelConfig.model_validate(
            {"name": "big", "engines": [{"kind": "lmdeploy", "backend": "pytorch", "path": "big", "tp": 8}]}
        ),
        ModelConfig.model_validate(
            {"name": "small", "engines": [{"kind": "lmdeploy", "path": "small", "num_gpus": 0.5, "replicas": 2}]}
        ),
    ]
    nodes = nodes_of([NodeConfig(name="n", count=3, num_cpus=16, num_gpus=4)])
    assert plan(nodes, replicas_of(models)).text().splitlines() == [
        "n-0: 16 CPUs, 4 GPUs: big slot 0 (ranks 0-3 of 8)",
        "n-1: 16 CPUs, 4 GPUs: big slot 0 (ranks 4-7 of 8)",
        "n-2: 16 CPUs, 4 GPUs: small slots 0-1 (0.5 GPU each)",
        "",
        "it fits: 3 replicas on 3 nodes and 9 of 12 free GPUs",
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LMDeployConfig(tp=4), Shape(1, 4)),
        (LMDeployConfig(backend="pytorch"), Shape(1, 1)),
        (LMDeployConfig(backend="pytorch", tp=4), Shape(1, 4, grouped=True)),
        (LMDeployConfig(device="cpu"), Shape(1)),
        (LMDeployConfig(device="cpu", tp=2), Shape(1, 2, grouped=True)),
        (LMDeployConfig(device="ascend", tp=2), Shape(1, 2, grouped=True, accelerator="NPU")),
        (LMDeployConfig(num_gpus=0.5, accelerator_type="L4"), Shape(1, 0.5, accelerator_type="L4")),
        (APIServerConfig(backend="pytorch", tp=2), Shape(1, 2)),
        (HTTPConfig(url="http://x", label_selector={"zone": "x"}), Shape(0.01, labels=(("zone", "x"),))),
        (TritonConfig(address="x:1", model_name="m", resources={"edge": 1}), Shape(0.01, resources=(("edge", 1),))),
        (OpenVINOConfig(), Shape(1)),
        (SimulatedConfig(num_gpus=2), Shape(0, 2)),
    ],
)
def test_what_an_engine_takes(config: EngineConfig, expected: Shape) -> None:
    """Each kind of engine takes what its ranks need."""
    assert shape(config) == expected


def test_what_ray_is_asked_for() -> None:
    """Types, labels and custom resources are in the actor's options, or in the bundles of a group."""
    settings: dict[str, Any] = {"accelerator_type": "A100", "label_selector": {"zone": "x"}, "resources": {"disk": 1}}
    alone = shape(LMDeployConfig(tp=2, **settings)).actor_options()
    assert alone == {
        "num_cpus": 1,
        "num_gpus": 2,
        "max_restarts": -1,
        "scheduling_strategy": "DEFAULT",
        "accelerator_type": "A100",
        "label_selector": {"zone": "x"},
        "resources": {"disk": 1},
    }
    group = shape(LMDeployConfig(backend="pytorch", tp=2, **settings))
    kind = {"accelerator_type:A100": 0.001}
    assert group.bundles() == [{"CPU": 1, "disk": 1, **kind}, {"GPU": 1, **kind}, {"GPU": 1, **kind}]
    assert group.bundle_labels() == [{"zone": "x"}] * 3
    assert group.actor_options()["num_gpus"] == 0
    npus = shape(LMDeployConfig(device="ascend"))
    assert (npus.actor_options()["num_gpus"], npus.actor_options()["resources"]) == (0, {"NPU": 1})


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_gpus": 0.5, "tp": 2},
        {"num_gpus": 1.5},
        {"num_gpus": 0.5, "device": "cpu"},
        {"resources": {"GPU": 1}},
        {"resources": {"disk": 1.5}},
        {"label_selector": {"zone": "in("}},
        {"device": "ascend", "backend": "turbomind"},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    """A setting that Ray would refuse, or that contradicts another one, is refused at once."""
    with pytest.raises(ValidationError):
        LMDeployConfig(**wrong)


def test_a_shared_gpu_is_shared_memory() -> None:
    """An engine on half a GPU takes half of the KV cache that it would take alone, unless it is told how much."""
    assert LMDeployConfig().cache_share is None
    assert LMDeployConfig(num_gpus=0.5).cache_share == 0.4
    assert LMDeployConfig(num_gpus=0.5, cache_max_entry_count=0.3).cache_share == 0.3


@pytest.mark.parametrize(
    ("label", "selector", "expected"),
    [
        ("x", "x", True),
        ("y", "x", False),
        (None, "x", False),
        ("x", "!x", False),
        (None, "!x", True),
        ("x", "in(x, y)", True),
        ("z", "in(x,y)", False),
        ("z", "!in(x,y)", True),
        ("y", "!in(x,y)", False),
    ],
)
def test_label_selectors(label: str | None, selector: str, expected: bool) -> None:
    """A selector means what it means to Ray."""
    assert matches(label, selector) is expected


GPUS = """
import asyncio, json, ray
from raylm.actors.manager import PoolManager
from raylm import Pool, SessionConfig, SimulatedConfig

async def main():
    manager = await PoolManager.start([SimulatedConfig(num_gpus=2)] * 2, SessionConfig())
    async with Pool() as pool:
        await asyncio.gather(*[pool.attach(slot, actor) for slot, actor in manager.actors.items()])
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
