"""Time and memory of choosing a slot, at a size no pool should reach: 1,000 slots and 1,000,000 pinned sessions.

Every slot has room for 256 requests and 70 % of all room is taken. A step releases a random outstanding request and
chooses a slot for a new one, so the load stays. Half of the requests belong to one of the pinned sessions, picked at
random; the others to none. Each call is timed alone; an empty call timed the same way is taken off the mean.

`choose_us`: mean time of `Router.choose`. `choose_p99_us` and `choose_max_us` show what hides behind the mean.
`choose_new_session_us`: the same for sessions that have no pin yet, when the table of pins is full and each new pin has
to push out the least recently used one.
`release_us`: mean time of `Router.release`.
`bytes_per_pin`: growth of this process's resident memory while a million sessions get their pins, their 32-character
ids included, by number of sessions.

Baseline, in the same run and on the same slots: `min` over the loads of all slots that have room.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import uuid
from collections.abc import Callable
from typing import Any

import psutil
from harness import Figure, publish, quick_asked, say

from raylm.routing import Reservation, Router

NUM_SLOTS = 1000
CAPACITY = 256
NUM_PINS = 1_000_000
LOAD = 0.7


class Timings:
    """Times of many calls of one kind, in ns."""

    def __init__(self) -> None:
        self.ns: list[int] = []

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function and note the time it took."""
        start = time.perf_counter_ns()
        result = function(*arguments)
        self.ns.append(time.perf_counter_ns() - start)
        return result

    @property
    def mean_us(self) -> float:
        """Mean, in us."""
        return statistics.fmean(self.ns) / 1e3

    def quantile_us(self, share: float) -> float:
        """The time that `share` of the calls do not exceed, in us."""
        return sorted(self.ns)[min(len(self.ns) - 1, int(share * len(self.ns)))] / 1e3


def pin_sessions(router: Router, rng: random.Random) -> tuple[list[str], float]:
    """Let a million sessions take one turn each; return their ids and the memory that one takes, in bytes."""
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    sessions = [session_id(rng) for _ in range(NUM_PINS)]
    for session in sessions:
        router.release(reserved(router.choose(1000, session)))
    gc.collect()
    # The list is the benchmark's own: 8 bytes a session.
    return sessions, (process.memory_info().rss - before) / NUM_PINS - 8


def session_id(rng: random.Random) -> str:
    """Return a random id like those that clients make up."""
    return uuid.UUID(int=rng.getrandbits(128)).hex


def reserved(reservation: Reservation | None) -> Reservation:
    """Return the reservation; the load leaves room, so there is one."""
    if reservation is None:
        raise AssertionError("unreachable: there is room")
    return reservation


def scan(slots: range, router: Router) -> int:
    """The baseline: look at every slot."""
    return min((number for number in slots if router.running(number) < CAPACITY), key=router.load)


def measure(num_steps: int) -> list[Figure]:
    """Run all parts and return the figures."""
    rng = random.Random(0)
    slots = range(NUM_SLOTS)
    router = Router(max_pins=NUM_PINS)
    for number in slots:
        router.up(number, CAPACITY)
    sessions, bytes_per_pin = pin_sessions(router, rng)
    say(f"{NUM_PINS:,} sessions pinned, {bytes_per_pin:.0f} bytes each")
    outstanding = [reserved(router.choose(rng.randrange(100, 4000))) for _ in range(int(LOAD * NUM_SLOTS * CAPACITY))]
    choose, new, release, scanning, empty = (Timings() for _ in range(5))

    def step(timings: Timings, session: str | None) -> None:
        index = rng.randrange(len(outstanding))
        release.call(router.release, outstanding[index])
        reservation = timings.call(router.choose, rng.randrange(100, 4000), session)
        # A slot can be full by chance, and the request has to wait: nothing was reserved.
        outstanding[index] = reservation or reserved(router.choose(0))

    for index in range(num_steps):
        step(choose, rng.choice(sessions) if rng.random() < 0.5 else None)
        empty.call(lambda *_: None, 0, None)
        if index % 100 == 0:
            scanning.call(scan, slots, router)
    for _ in range(num_steps // 2):
        step(new, session_id(rng))

    overhead = empty.mean_us
    say(f"timing a call takes {overhead:.2f} us, which is taken off the means")
    return [
        Figure("choose_us", choose.mean_us - overhead, "us", 20, "lower"),
        Figure("choose_p99_us", choose.quantile_us(0.99), "us", better="lower"),
        Figure("choose_max_us", choose.quantile_us(1), "us", better="lower"),
        Figure("choose_new_session_us", new.mean_us - overhead, "us", better="lower"),
        Figure("choose_new_session_p99_us", new.quantile_us(0.99), "us", better="lower"),
        Figure("release_us", release.mean_us - overhead, "us", better="lower"),
        Figure("bytes_per_pin", bytes_per_pin, "bytes", better="lower"),
        Figure("scan_us", scanning.mean_us - overhead, "us", better="lower"),
    ]


def main() -> None:
    """Run the benchmark."""
    quick = quick_asked(__doc__)
    publish("routing", measure(200_000 if quick else 1_000_000))


if __name__ == "__main__":
    main()
