"""The pool at the size of a large cluster.

`plan_s`: time to place 1,000 replicas on 200 nodes of 8 GPUs: tp 1 to 8 and halves of a GPU, a tenth of them bound to
an accelerator type that half of the nodes have. The replicas are cut from full nodes and shuffled, so there is a
placement, it uses every GPU, and one that wastes any leaves a replica out. The slowest of several such clusters.
`plan_idle_gpus`: GPUs that it left idle, of 1,600, the most in any of them.
`plan_gap_gpus`: GPUs that the planner left idle and an exact solver did not, over all of some hundred small clusters of
one to three nodes and up to eight replicas, where trying every placement is possible.
`plan_unfit_s`: the time for replicas of tp 3, 5, 6 and 7 that want a little more than the nodes' 8 or 10 GPUs hold, so
that not all can fit and the planner searches for the packing that uses most. The slowest.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import cache

from harness import Figure, publish, quick_asked, say

from raylm.actors.placement import Node, Plan, Replica, Shape, plan

NUM_NODES = 200
NUM_REPLICAS = 1000
GPUS = 8
A100 = {"accelerator_type:A100": 1.0}


def replicas_of(shapes: Sequence[Shape], rng: random.Random) -> list[Replica]:
    """Return slots of the shapes, in random order."""
    shuffled = list(shapes)
    rng.shuffle(shuffled)
    return [Replica(slot, shape) for slot, shape in enumerate(shuffled)]


def cut(rng: random.Random) -> list[list[float]]:
    """Cut full nodes into as many replicas as are wanted; return the sizes by node."""
    sizes: list[list[float]] = [[float(GPUS)] for _ in range(NUM_NODES)]
    count = NUM_NODES
    while count < NUM_REPLICAS:
        node = rng.choice(sizes)
        size = node.pop(rng.randrange(len(node)))
        if size == 0.5:
            node.append(size)
            continue
        # Few halves: most replicas are whole GPUs.
        part = float(rng.randint(1, int(size) - 1)) if size > 1 else 0.5
        if size == 1 and rng.random() > 0.1:
            node.append(size)
            continue
        node += [part, size - part]
        count += 1
    return sizes


def full_cluster(rng: random.Random) -> tuple[list[Node], list[Replica]]:
    """Return nodes, and replicas that fit them exactly."""
    nodes = [Node(f"node-{n}", 64, GPUS, A100 if n % 2 else {}) for n in range(NUM_NODES)]
    shapes = [
        Shape(1, size, accelerator_type="A100" if n % 2 and rng.random() < 0.2 else None)
        for n, sizes in enumerate(cut(rng))
        for size in sizes
    ]
    return nodes, replicas_of(shapes, rng)


def timed(nodes: Sequence[Node], replicas: Sequence[Replica]) -> tuple[Plan, float]:
    """Return a plan and the seconds that it took."""
    start = time.perf_counter()
    planned = plan(nodes, replicas)
    return planned, time.perf_counter() - start


def most_gpus(nodes: Sequence[Node], shapes: Sequence[Shape]) -> float:
    """Return how many GPUs the best of all placements of whole GPUs uses, by trying them all."""

    @cache
    def most(n: int, free: tuple[float, ...]) -> float:
        if n == len(shapes):
            return 0
        shape = shapes[n]
        best = most(n + 1, free)
        for index, gpus in enumerate(free):
            if gpus >= shape.num_gpus and nodes[index].has_kind(shape):
                left = (*free[:index], gpus - shape.num_gpus, *free[index + 1 :])
                best = max(best, shape.num_gpus + most(n + 1, left))
        return best

    return most(0, tuple(node.num_gpus for node in nodes))


def gap(rng: random.Random) -> float:
    """Return how many GPUs of a small random cluster the planner leaves idle and an exact solver does not."""
    nodes = [Node(str(n), 64, rng.randint(1, GPUS), rng.choice([{}, A100])) for n in range(rng.randint(1, 3))]
    types = [None, None, "A100"]
    shapes = [Shape(1, rng.randint(1, 6), accelerator_type=rng.choice(types)) for _ in range(rng.randint(1, 8))]
    return most_gpus(nodes, shapes) - plan(nodes, replicas_of(shapes, rng)).num_gpus


def measure(num_clusters: int) -> list[Figure]:
    """Run all parts and return the figures."""
    rng = random.Random(0)
    seconds, idle, unfit = [], [], []
    for _ in range(num_clusters):
        planned, taken = timed(*full_cluster(rng))
        seconds.append(taken)
        idle.append(NUM_NODES * GPUS - planned.num_gpus)
        nodes = [Node(f"node-{n}", 64, rng.choice([8, 10])) for n in range(NUM_NODES)]
        shapes = []
        while sum(shape.num_gpus for shape in shapes) < 1.05 * sum(node.num_gpus for node in nodes):
            shapes.append(Shape(1, rng.choice([3, 5, 6, 7])))
        unfit.append(timed(nodes, replicas_of(shapes, rng))[1])
    say(f"{num_clusters} clusters of {NUM_NODES} nodes, {NUM_REPLICAS} replicas each")
    gaps = [gap(rng) for _ in range(50 * num_clusters)]
    return [
        Figure("plan_s", max(seconds), "s", 1, "lower"),
        Figure("plan_idle_gpus", max(idle), "GPUs", 0, "lower"),
        Figure("plan_gap_gpus", sum(gaps), "GPUs", 0, "lower"),
        Figure("plan_unfit_s", max(unfit), "s", better="lower"),
    ]


def main() -> None:
    """Run the benchmark."""
    quick = quick_asked(__doc__)
    publish("scale", measure(4 if quick else 20))


if __name__ == "__main__":
    main()
