"""What pools tell of themselves, and how the reports of several pools on the same actors add up."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from raylm.messages import EngineStatistics

BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of a histogram's buckets, in seconds; one more bucket takes what is above the last."""

MAX_FAILURES = 20
"""Failed requests that are kept to be shown."""


class Histogram(msgspec.Struct):
    """How many times fell into which bucket, as Prometheus counts them.

    Attributes:
        counts: By bucket, one more than there are `BOUNDS_S`.
        total_s: Sum of all times.
    """

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one time."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def add(self, other: Histogram) -> None:
        """Count all that another one has counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total_s += other.total_s


class SlotStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One slot at one moment.

    Attributes:
        slot: Its number.
        state: `starting`, `up`, `suspected`, `down`, `failed` or `draining`; of a served model also `waiting` for room.
        detail: Why it is not up, for people; empty when it is, or is about to be.
        model: The model it serves, or "" before it has started.
        device: Where that computes, for people, or "" before it has started.
        num_running: Requests of this pool at the actor.
        capacity: How many it takes.
        outstanding_tokens: Tokens those requests may still need.
        num_deaths: Actors lost in this slot.
        actor: Id of its actor, or "" before it has started.
        node: Host name of the actor's node.
        pid: Process of its actor, on the actor's node; None before it has started.
        gpus: The GPUs that Ray gave it, by their number on the node.
        engine: The engine's own figures, as of the last poll.
    """

    slot: int
    state: str
    detail: str
    model: str
    device: str
    num_running: int
    capacity: int
    outstanding_tokens: int
    num_deaths: int
    actor: str
    node: str
    pid: int | None
    gpus: list[int]
    engine: EngineStatistics | None


class FailedRequest(msgspec.Struct, frozen=True):
    """A request that ended with an error.

    Attributes:
        at: When, in seconds since 1970.
        type: Class of the error.
        message: Its text.
        request_id: The request's.
    """

    at: float
    type: str
    message: str
    request_id: str


class PoolStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A pool at one moment, and what it has done so far.

    Attributes:
        slots: Its slots, by number.
        num_waiting: Requests in the queue.
        waiting_tokens: Tokens those requests may need.
        num_running: Requests at actors.
        num_finished: Requests answered.
        num_failed: Requests that ended with an error.
        num_aborted: Requests that their clients left before the end.
        num_attempts: Attempts to answer one.
        num_moved: Attempts that were lost and taken up elsewhere.
        moves: The same by cause: `died`, `failed`, `full`, `silent`, `lease` or `drained`.
        num_tokens: Tokens of answered requests.
        first_token_timeout_s: The watchdog's bound at present.
    """

    slots: tuple[SlotStatistics, ...]
    num_waiting: int
    waiting_tokens: int
    num_running: int
    num_finished: int
    num_failed: int
    num_aborted: int
    num_attempts: int
    num_moved: int
    moves: dict[str, int]
    num_tokens: int
    first_token_timeout_s: float


class PoolReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool tells whoever watches over several.

    Attributes:
        statistics: Counts and loads.
        first_token_s: Seconds from a request's arrival to its first token; of `Request.stream` alone, whose tokens come
            as they are produced.
        token_gap_s: Mean seconds between the tokens of a request; of the same.
        queue_s: Seconds in the queue.
        failures: The latest requests that ended with an error.
    """

    statistics: PoolStatistics
    first_token_s: Histogram
    token_gap_s: Histogram
    queue_s: Histogram
    failures: list[FailedRequest]


class ModelState(msgspec.Struct, kw_only=True):
    """All pools on the actors of one model together.

    Attributes:
        name: The model's.
        problem: Why nothing else is known of it; empty when it is.
        num_clients: Pools that use it now.
        num_sessions: Sessions that its store remembers; None where this process has not the store's password, or
            the store does not say.
        num_wanted: Slots that there should be.
        outdated: Those whose actors are not wanted, or no longer; each until its actor has ended.
        num_waiting: As in `PoolStatistics`, and so are the others of these names.
        slots: Its slots; `num_running` is what the engine itself says, where it does.
        failures: The latest requests that ended with an error.
    """

    name: str
    problem: str = ""
    num_clients: int = 0
    num_sessions: int | None = 0
    num_wanted: int = 0
    outdated: list[int] = []
    num_waiting: int = 0
    num_running: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_aborted: int = 0
    num_attempts: int = 0
    num_moved: int = 0
    moves: dict[str, int] = {}
    num_tokens: int = 0
    slots: list[SlotStatistics] = []
    failures: list[FailedRequest] = []
    first_token_s: Histogram = msgspec.field(default_factory=Histogram)
    token_gap_s: Histogram = msgspec.field(default_factory=Histogram)
    queue_s: Histogram = msgspec.field(default_factory=Histogram)

    def count(self, report: PoolReport) -> None:
        """Add what a pool has done since it began; what it does now is for `watch`."""
        pool = report.statistics
        self.num_finished += pool.num_finished
        self.num_failed += pool.num_failed
        self.num_aborted += pool.num_aborted
        self.num_attempts += pool.num_attempts
        self.num_moved += pool.num_moved
        self.moves = dict(Counter(self.moves) + Counter(pool.moves))
        self.num_tokens += pool.num_tokens
        self.first_token_s.add(report.first_token_s)
        self.token_gap_s.add(report.token_gap_s)
        self.queue_s.add(report.queue_s)
        self.failures = sorted([*self.failures, *report.failures], key=lambda failed: failed.at)[-MAX_FAILURES:]

    def watch(self, reports: Sequence[PoolReport]) -> None:
        """Add the load that living pools make."""
        self.num_clients = len(reports)
        self.num_waiting = sum(report.statistics.num_waiting for report in reports)
        self.num_running = sum(report.statistics.num_running for report in reports)
        views: dict[int, list[SlotStatistics]] = {}
        for report in reports:
            for slot in report.statistics.slots:
                views.setdefault(slot.slot, []).append(slot)
        self.slots = [_combined(views[number]) for number in sorted(views)]


def _combined(views: Sequence[SlotStatistics]) -> SlotStatistics:
    """Return one slot as several pools see it."""
    # The engine counts up; the view with the most tokens is the latest.
    best = max(views, key=lambda view: (view.state == "up", view.engine.num_tokens if view.engine else -1))
    return msgspec.structs.replace(
        best,
        num_running=best.engine.num_running if best.engine else sum(view.num_running for view in views),
        outstanding_tokens=sum(view.outstanding_tokens for view in views),
        num_deaths=max(view.num_deaths for view in views),
    )
