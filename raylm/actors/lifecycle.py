"""What becomes of the actors of a served model. Pure: no Ray, no clock, no await.

`steps` compares the actors that there are with those that are wanted, and says which to create and which to drain now.
Called again after each change, it scales, rolls an update, and replaces what was drained by hand. What it holds to:

1.  While old actors are replaced by new ones, never fewer serve than are wanted, and there is never more than one more
    than are wanted. Only where the new one has no room, and could have it, does an old one make some: one at a time,
    and one for each. Where fewer serve already, one less does meanwhile.
2.  A new one that does not start holds the update up: the old ones go on.
3.  Of those that are too many, the ones that do least work go.

`Autoscaler` says how many are wanted, by the work that there is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from raylm.config import AutoscalingConfig

Phase = Literal["waiting", "starting", "up", "failed", "draining"]
"""Where an actor is in its life.

`waiting` has no room in the cluster yet; `starting` loads its model; `up` serves; `failed` did not start for several
times in a row, and has been ended; `draining` gets no new work, and ends when what it has is done.
"""

_KEEP_FIRST: dict[Phase, int] = {"up": 0, "starting": 1, "waiting": 2, "failed": 3}


@dataclass(frozen=True)
class Member:
    """An actor as `steps` sees it.

    Attributes:
        slot: Its slot.
        engine: Settings of its engine, as JSON.
        phase: Where it is in its life.
        load: Outstanding tokens.
        may_fit: While it waits: it would have room if others made some.
        room_made: While it waits: another has made room for it. If somebody else has taken that, it waits.
    """

    slot: int
    engine: str
    phase: Phase
    load: int = 0
    may_fit: bool = False
    room_made: bool = False


@dataclass(frozen=True)
class Steps:
    """What is to be done now.

    Attributes:
        create: Engine settings of the actors to create.
        drain: Slots to drain.
        room_for: The slot for which one of them makes room.
    """

    create: tuple[str, ...] = ()
    drain: tuple[int, ...] = ()
    room_for: int | None = None


def match(wanted: Sequence[str], members: Iterable[Member]) -> tuple[list[Member], list[Member]]:
    """Return the actors that stay and those that are to go.

    Args:
        wanted: Engine settings of each actor that there should be.
        members: The actors that there are, without those that drain.
    """
    missing = Counter(wanted)
    kept: list[Member] = []
    others: list[Member] = []
    for member in sorted(members, key=lambda member: (_KEEP_FIRST[member.phase], -member.load, member.slot)):
        if missing[member.engine]:
            missing[member.engine] -= 1
            kept.append(member)
        else:
            others.append(member)
    return kept, others


def steps(wanted: Sequence[str], members: Iterable[Member]) -> Steps:
    """Return what brings the actors closer to those that are wanted.

    Args:
        wanted: Engine settings of each actor that there should be.
        members: The actors that there are.
    """
    members = list(members)
    present = [member for member in members if member.phase != "draining"]
    kept, others = match(wanted, present)
    drain = [member.slot for member in others if member.phase != "up"]  # they do no work
    old = [member for member in others if member.phase == "up"]
    old.sort(key=lambda member: (member.load, -member.slot))
    num_up = len(old) + sum(member.phase == "up" for member in kept)
    num_spare = max(0, num_up - len(wanted))
    room_for = None
    is_quiet = not drain and len(present) == len(members)  # nobody is about to give room back
    if old and not num_spare and is_quiet and all(member.phase in ("up", "waiting") for member in kept):
        waiting = [member for member in kept if member.phase == "waiting"]
        needy = [member.slot for member in waiting if member.may_fit]
        if needy and not any(member.room_made for member in waiting):
            num_spare, room_for = 1, needy[0]
    drain += [member.slot for member in old[:num_spare]]
    create = list((Counter(wanted) - Counter(member.engine for member in kept)).elements())
    if old:
        create = create[: max(0, len(wanted) + 1 - len(kept) - len(old))]
    return Steps(tuple(create), tuple(drain), room_for)


class Autoscaler:
    """How many actors a group should have.

    Args:
        config: Its bounds and delays.
    """

    def __init__(self, config: AutoscalingConfig) -> None:
        self._config = config
        self._above_since: float | None = None
        self._below_since: float | None = None
        self._peak = 0  # the most that were needed since there are too many

    def decide(self, now: float, outstanding_tokens: int, replicas: int) -> int:
        """Return how many replicas there should be.

        Args:
            now: A clock, in seconds, that never goes back.
            outstanding_tokens: Work that waits or runs.
            replicas: How many are wanted at present.
        """
        config = self._config
        needed = math.ceil(outstanding_tokens / config.target_outstanding_tokens)
        needed = min(max(needed, config.min_replicas), config.max_replicas)
        if needed >= replicas:
            self._below_since = None
        if needed <= replicas:
            self._above_since = None
        if needed > replicas:
            if self._above_since is None:
                self._above_since = now
            # With none there nobody works: whatever waits is reason enough.
            if not replicas or now - self._above_since >= config.upscale_delay_s:
                self._above_since = None
                return needed
        elif needed < replicas:
            if self._below_since is None:
                self._below_since, self._peak = now, needed
            self._peak = max(self._peak, needed)
            if now - self._below_since >= config.downscale_delay_s:
                self._below_since = None
                return self._peak
        return replicas
