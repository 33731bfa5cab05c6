"""The pool at the size of a large cluster.

`plan_s`: time to place 1,000 replicas on 200 nodes of 8 GPUs: tp 1 to 8 and halves of a GPU, a tenth of them bound to
an accelerator type that half of the nodes have. The replicas are cut from full nodes and shuffled, so there is a
placement, it uses every GPU, and one that wastes any leaves a replica out. The slowest of several such clusters.
`plan_idle_gpus`: GPUs that it left idle, of 1,600, the most in any of them.
`plan_gap_gpus`: GPUs that the planner left idle and an exact solver did not, over all of some hundred small clusters of
one to three nodes and up to eight replicas, where trying every placement is possible.
`plan_unfit_s`: the time for replicas of tp 3, 5, 6 and 7 that want a little more than the nodes' 8 or 10 GPUs hold, so
that not all can fit and the planner searches for the packing that uses most. The slowest.

`dispatch_us_SLOTS`: CPU time of one request's way through a `Pool` over 10, 100 and 1,000 slots on 50 nodes: from
`Pool.stream` to the submit call, and from its two replies (a first token, later its end) until it is done. Requests
come one at a time: each ends one that was running, and 8 a slot run throughout. Half of them belong to sessions that
are pinned, 100 to a slot.
`dispatch_growth`: that of 1,000 slots by that of 10.
`dispatch_burst_us_SLOTS`: the same when 64 come at once, by request.
`membership_us`: attaching, draining and detaching one slot beside 1,000 under that load.
`slot_bytes`: memory of one slot of an idle pool, of 1,000.

1,000 Ray actors do not fit on a machine that runs benchmarks, so stand-ins take the place of the slots' actor handles:
objects in this process that speak the real messages and generate nothing. Ray's own part of a call is therefore not in
these figures (`ray_alone_us` of `token_plane.py` has it). What stand-ins and load take by themselves is measured the
same way and taken off. Each round is a process of its own, and rounds of the three sizes take turns; medians.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import statistics
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import msgspec
import uvloop
from harness import Figure, publish, quick_asked, say

from raylm import heap
from raylm.actors.engine_actor import ActorInfo, PollReply, Submission
from raylm.actors.placement import Node, Plan, Replica, Shape, plan
from raylm.messages import Delta, EngineInfo, EngineStatistics, GenerationConfig, Request, Usage
from raylm.pool import Pool

NUM_NODES = 200
NUM_REPLICAS = 1000
GPUS = 8
A100 = {"accelerator_type:A100": 1.0}

SIZES = (10, 100, 1000)  # of pools, in slots
NUM_POOL_NODES = 50
NUM_RUNNING = 8  # requests a slot
NUM_SESSIONS = 100  # a slot
BURST = 64
NUM_CHANGES = 50  # of the slots
ENGINE = EngineInfo(
    engine="simulated", engine_version="", model="stand-in", max_context=8192, capacity=64, device="none"
)
LOAD = EngineStatistics(num_running=NUM_RUNNING, num_tokens=0)
FIRST, LAST = Delta("word ", 1), Delta("word ", 2, finish_reason="length", usage=Usage(8, 2))
REQUESTS = [
    Request(request_id="request", prompt="question", config=GenerationConfig(max_new_tokens=num_tokens))
    for num_tokens in range(100, 4000, 30)
]


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


def measure_plan(num_clusters: int) -> list[Figure]:
    """Measure placement."""
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


class Keys(msgspec.Struct, array_like=True):
    """Of a `Submission`, what a stand-in reads."""

    keys: list[int]
    requests: msgspec.Raw


_encode = msgspec.msgpack.Encoder().encode
_decode_keys = msgspec.msgpack.Decoder(Keys).decode


class Count:
    """Tells when so many of something have come."""

    def __init__(self) -> None:
        self._left = 0
        self._reached: asyncio.Future[None] | None = None

    def expect(self, number: int) -> Awaitable[None]:
        """Count from here on; the result is done with the last."""
        self._left = number
        self._reached = asyncio.get_running_loop().create_future()
        return self._reached

    def add(self, number: int = 1) -> None:
        """Count what has come."""
        self._left -= number
        if not self._left and self._reached is not None:
            self._reached.set_result(None)


class Call:
    """A method of a stand-in, to be called as those of Ray's handles are.

    Args:
        function: Does it at once.
        wraps: It returns the result, which is made an awaitable; else it returns the awaitable.
    """

    def __init__(self, function: Callable[..., Any], *, wraps: bool = True) -> None:
        self._function = function
        self.remote = self._done if wraps else function

    def _done(self, *arguments: Any) -> Awaitable[Any]:
        done = asyncio.get_running_loop().create_future()
        done.set_result(self._function(*arguments))
        return done


class StandIn:
    """What a pool sees of an `EngineActor`: a submission is answered with first tokens, and `finish` with the ends.

    Args:
        number: Its slot.
        submitted: Counts the requests that it gets.
        running: Where it puts down each of them, as itself and the key.
    """

    def __init__(self, number: int, submitted: Count, running: list[tuple[StandIn, int]]) -> None:
        self._submitted = submitted
        self._running = running
        self._waiting: asyncio.Future[bytes] | None = None  # the poll in flight
        self._keys: list[int] = []  # of deltas that wait for one
        self._deltas: list[Delta] = []
        info = _encode(ActorInfo(ENGINE, f"actor-{number}", f"node-{number % NUM_POOL_NODES}", number, []))
        self.describe = Call(lambda: info)
        self.submit = Call(self._submit)
        self.poll = Call(self._poll, wraps=False)
        self.cancel = Call(lambda _client_id, _keys: None)
        self.forget = Call(lambda _client_id: None)

    def finish(self, keys: list[int]) -> None:
        """End requests."""
        self._tell(keys, LAST)

    def _submit(self, _client_id: str, submission: bytes) -> None:
        keys = _decode_keys(submission).keys
        self._running += [(self, key) for key in keys]
        self._tell(keys, FIRST)
        self._submitted.add(len(keys))

    def _poll(self, _client_id: str) -> Awaitable[bytes]:
        poll = self._waiting = asyncio.get_running_loop().create_future()
        if self._keys:
            self._reply(poll)
        return poll

    def _tell(self, keys: list[int], delta: Delta) -> None:
        self._keys += keys
        self._deltas += [delta] * len(keys)
        if self._waiting is not None:
            self._reply(self._waiting)

    def _reply(self, poll: asyncio.Future[bytes]) -> None:
        poll.set_result(_encode(PollReply(self._keys, self._deltas, [], LOAD)))
        self._waiting = None
        self._keys, self._deltas = [], []


class Work:
    """Requests that come to slots and end there, by stand-ins alone: what the figures are freed from.

    Args:
        num_slots: How many stand-ins.
    """

    def __init__(self, num_slots: int) -> None:
        self.rng = random.Random(0)
        self.submitted, self.ended = Count(), Count()
        self.running: list[tuple[StandIn, int]] = []
        self.actors = [StandIn(number, self.submitted, self.running) for number in range(num_slots)]
        self._submission = _encode(Submission([0], REQUESTS[:1]))

    def start(self, request: Request, session_id: str | None) -> None:  # noqa: ARG002 - the pool's way wants them
        """Have a request come."""
        actor = self.actors[self.rng.randrange(len(self.actors))]
        actor.poll.remote("")
        actor.submit.remote("", self._submission)

    def finish(self, actor: StandIn, keys: list[int]) -> None:
        """Have requests end."""
        actor.poll.remote("")
        actor.finish(keys)
        self.ended.add(len(keys))

    async def fill(self) -> None:
        """Start what is to run throughout."""
        for _ in range(NUM_RUNNING):
            await self._start(len(self.actors))

    async def turn(self, number: int) -> None:
        """Have that many requests come, and as many end that were running."""
        await self._start(number)
        ended = self.ended.expect(number)
        ending: dict[StandIn, list[int]] = {}
        for _ in range(number):
            index = self.rng.randrange(len(self.running))
            self.running[index], self.running[-1] = self.running[-1], self.running[index]
            actor, key = self.running.pop()
            ending.setdefault(actor, []).append(key)
        for actor, keys in ending.items():
            self.finish(actor, keys)
        await ended

    async def cpu_us(self, num_turns: int, number: int) -> float:
        """Return the CPU time that one request takes."""
        for _ in range(num_turns // 4):
            await self.turn(number)
        before = time.process_time_ns()
        for _ in range(num_turns):
            await self.turn(number)
        return (time.process_time_ns() - before) / 1e3 / num_turns / number

    async def _start(self, number: int) -> None:
        submitted = self.submitted.expect(number)
        num_sessions = NUM_SESSIONS * len(self.actors)
        for _ in range(number):
            session = self.rng.randrange(2 * num_sessions)
            self.start(self.rng.choice(REQUESTS), session_name(session) if session < num_sessions else None)
        await submitted


class PoolWork(Work):
    """The same through a pool."""

    def __init__(self, pool: Pool, num_slots: int) -> None:
        super().__init__(num_slots)
        self._pool = pool

    async def attach(self) -> float:
        """Attach all slots and pin the sessions; return the memory of a slot, in bytes."""
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        await asyncio.gather(*(self._pool.attach(number, actor) for number, actor in enumerate(self.actors)))
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        for number in range(NUM_SESSIONS * len(self.actors)):
            self._pool.router.pin(session_name(number), number % len(self.actors))
        return (after - before) / len(self.actors)

    def start(self, request: Request, session_id: str | None) -> None:
        """Have a request come."""
        self._pool.stream(request, session_id=session_id, ended=self.ended.add)

    def finish(self, actor: StandIn, keys: list[int]) -> None:
        """Have requests end."""
        actor.finish(keys)

    async def change_us(self) -> float:
        """Return the CPU time that it takes to attach a slot, drain it and detach it."""
        first = len(self.actors)
        actors = [StandIn(number, self.submitted, self.running) for number in range(first, first + NUM_CHANGES)]
        before = time.process_time_ns()
        for number, actor in enumerate(actors, first):
            await self._pool.attach(number, actor)
            self._pool.drain(number)
            self._pool.detach(number)
            for _ in range(3):  # until the tasks that this leaves are done
                await asyncio.sleep(0)
        return (time.process_time_ns() - before) / 1e3 / NUM_CHANGES


class Dispatched(msgspec.Struct):
    """One round with one pool.

    Attributes:
        us: CPU time of a request, when they come one at a time.
        burst_us: The same when they come 64 at a time.
        change_us: CPU time of a membership change.
        slot_bytes: Memory of a slot.
        bare_us: What was taken off `us`.
    """

    us: float
    burst_us: float
    change_us: float
    slot_bytes: float
    bare_us: float


def session_name(number: int) -> str:
    """Return the id of a session."""
    return f"session-{number:08}"


async def dispatch(num_slots: int, num_turns: int) -> Dispatched:
    """Run one round."""
    heap.settle()
    bare = Work(num_slots)
    await bare.fill()
    bare_us, bare_burst_us = await bare.cpu_us(num_turns, 1), await bare.cpu_us(num_turns // BURST, BURST)
    async with Pool() as pool:
        work = PoolWork(pool, num_slots)
        slot_bytes = await work.attach()
        await work.fill()
        us, burst_us = await work.cpu_us(num_turns, 1), await work.cpu_us(num_turns // BURST, BURST)
        return Dispatched(us - bare_us, burst_us - bare_burst_us, await work.change_us(), slot_bytes, bare_us)


def dispatch_round(num_slots: int, num_turns: int) -> Dispatched:
    """Run one round, in a process of its own, on raylm's own event loop."""
    return uvloop.run(dispatch(num_slots, num_turns))


def measure_dispatch(num_rounds: int, num_turns: int) -> list[Figure]:
    """Measure the way of a request."""
    rounds: list[dict[int, Dispatched]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for _ in range(num_rounds):
            rounds.append({size: processes.submit(dispatch_round, size, num_turns).result() for size in SIZES})
            for size, found in rounds[-1].items():
                say(
                    f"{size:>5} slots: {found.us:.1f} us a request, {found.burst_us:.1f} in bursts of {BURST}, "
                    f"stand-ins' own {found.bare_us:.1f} taken off"
                )

    def median(value: Callable[[dict[int, Dispatched]], float]) -> float:
        return statistics.median(map(value, rounds))

    smallest, largest = SIZES[0], SIZES[-1]
    return [
        *(Figure(f"dispatch_us_{n}", median(lambda r, n=n: r[n].us), "us", None, "lower") for n in SIZES),
        Figure("dispatch_growth", median(lambda r: r[largest].us / r[smallest].us), "", 1.5, "lower"),
        *(Figure(f"dispatch_burst_us_{n}", median(lambda r, n=n: r[n].burst_us), "us", None, "lower") for n in SIZES),
        Figure("membership_us", median(lambda r: r[largest].change_us), "us", None, "lower"),
        Figure("slot_bytes", median(lambda r: r[largest].slot_bytes), "bytes", None, "lower"),
    ]


def main() -> None:
    """Run the benchmark."""
    quick = quick_asked(__doc__)
    say("stand-ins in this process take the place of the actors of 10, 100 and 1,000 slots")
    dispatched = measure_dispatch(3, 4000) if quick else measure_dispatch(9, 10_000)
    publish("scale", [*dispatched, *measure_plan(4 if quick else 20)])


if __name__ == "__main__":
    main()
