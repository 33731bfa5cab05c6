"""Which slot takes a request. Pure and synchronous: no Ray, no await, no clock.

Choosing and reserving are one step, so two requests can never be promised the same room; releasing happens once. The
rules, in order:

1.  A pinned session goes to its slot, and waits for it while the slot is up but full.
2.  Everything else, and a session whose slot is down or gone, goes to the least loaded slot that is up and has room.
    Load is the number of outstanding tokens; among equals, the slot with the fewest pinned sessions.
3.  A session that had to leave its slot is pinned to the new one. No other session moves.
4.  A slot takes no more than a given number of requests under suspicion (`trial`) at a time.
5.  Requests that are in no hurry (`spare`) leave a share of each slot's room to those that are.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Set
from heapq import heapify, heappop, heappush
from typing import Final

LEAST_LOADED: Final = "least-loaded"
PINNED: Final = "pinned"
MOVED_DIED: Final = "moved:died"
MOVED_DRAINED: Final = "moved:drained"

NO_SLOT: Final = -1
"""Where a session is pinned while there is no slot at all."""


class Reservation:
    """Room for one request in one slot. Give it back with `Router.release`.

    Attributes:
        slot: The slot's number.
        tokens: Outstanding tokens that it stands for.
        why: `least-loaded`, `pinned`, or for a session that had to leave its slot `moved:died` or `moved:drained`.
        trial: Whether the request is under suspicion.
    """

    __slots__ = ("incarnation", "released", "slot", "tokens", "trial", "why")

    def __init__(self, slot: int, incarnation: int, tokens: int, why: str, *, trial: bool) -> None:
        self.slot = slot
        self.incarnation = incarnation
        self.tokens = tokens
        self.why = why
        self.trial = trial
        self.released = False


class _Slot:
    __slots__ = (
        "capacity",
        "draining",
        "incarnation",
        "limit",
        "load",
        "num_pins",
        "num_trials",
        "running",
        "spacious",
        "stamp",
        "up",
    )

    def __init__(self) -> None:
        self.up = False
        self.draining = False
        self.capacity = 0
        self.limit = 0  # of the capacity, for requests in no hurry
        self.spacious = False  # up, and below that limit
        self.running = 0
        self.load = 0
        self.num_pins = 0
        self.num_trials = 0
        # Reservations of an earlier incarnation died with it; releasing one changes nothing.
        self.incarnation = 0
        # Counts changes, so that heap entries written before the last one are known to be stale.
        self.stamp = 0


class Router:
    """The slots of one pool, their load, and the sessions pinned to them.

    Invariants: 0 <= running <= capacity and load >= 0 for every slot; both are 0 once every reservation is released.

    Args:
        max_pins: Sessions remembered; the least recently used pin is forgotten.
        reserve: Share of each slot's capacity that requests in no hurry leave free, 0 to 1. Where it is above 0, one of
            two or more is free at least.
    """

    def __init__(self, max_pins: int = 1_000_000, reserve: float = 0.0) -> None:
        self._slots: dict[int, _Slot] = {}
        self._max_pins = max_pins
        self._reserved = reserve
        self._incarnations = itertools.count(1)
        self._num_spacious = 0  # slots with room for requests in no hurry
        # In order of use, the least recent first. A plain dict would take ever longer to find its first key.
        self._pins: OrderedDict[str, int] = OrderedDict()
        # How many are pinned to each number that is no slot: sessions outlive slots, and may be known before them.
        self._stray_pins: Counter[int] = Counter()
        # (load, pins, slot, stamp). A slot that is up and has room has exactly one entry with its current stamp.
        self._heap: list[tuple[int, int, int, int]] = []

    def up(self, number: int, capacity: int) -> None:
        """Open a slot, known or not, with no load and room for `capacity` requests."""
        slot = self._known(number)
        slot.up, slot.capacity = not slot.draining, capacity
        kept = max(1, int(capacity * self._reserved)) if self._reserved and capacity > 1 else 0
        slot.limit = capacity - kept
        slot.running = slot.load = slot.num_trials = 0
        slot.incarnation = next(self._incarnations)
        self._changed(number, slot)

    def down(self, number: int) -> None:
        """Close a slot. Its reservations are void; sessions pinned to it move when they next ask."""
        slot = self._slots[number]
        slot.up = False
        slot.running = slot.load = slot.num_trials = 0
        slot.incarnation = next(self._incarnations)
        self._changed(number, slot)

    def suspend(self, number: int, *, suspended: bool) -> None:
        """Take no more (or again take) new requests, while what runs there runs on."""
        slot = self._slots[number]
        slot.up = not suspended and not slot.draining
        self._changed(number, slot)

    def drain(self, number: int) -> None:
        """Take no more new requests, for good; sessions pinned to the slot move when they next ask."""
        slot = self._known(number)
        slot.draining, slot.up = True, False
        self._changed(number, slot)

    def remove(self, number: int) -> None:
        """Forget a slot. Its reservations are void; sessions pinned to it move when they next ask."""
        slot = self._slots.pop(number, None)
        if slot is not None:
            self._num_spacious -= slot.spacious
            if slot.num_pins:
                self._stray_pins[number] = slot.num_pins
        self._heap = [entry for entry in self._heap if entry[2] != number]
        heapify(self._heap)

    def has_room(self, session_id: str | None = None, *, spare: bool = False) -> bool:
        """True when some slot can take a request, or with `spare` one that is in no hurry.

        For one of a session, that is the slot which the session waits for.
        """
        if session_id is not None and (number := self.pinned(session_id)) is not None:
            slot = self._slots[number]
            return slot.running < (slot.limit if spare else slot.capacity)
        return self._num_spacious > 0 if spare else self._least_loaded(frozenset(), None) is not None

    def pin(self, session_id: str, number: int) -> None:
        """Pin a session to a slot."""
        before = self._pins.get(session_id)
        self._pins[session_id] = number
        self._pins.move_to_end(session_id)
        if before == number:
            return
        self._count_pin(before, -1)
        self._count_pin(number, 1)
        if len(self._pins) > self._max_pins:
            self.unpin(next(iter(self._pins)))

    def unpin(self, session_id: str) -> None:
        """Forget a session's pin, if it has one."""
        self._count_pin(self._pins.pop(session_id, None), -1)

    def pinned(self, session_id: str) -> int | None:
        """Return the slot that a session waits for: the one it is pinned to, if that is up."""
        number = self._pins.get(session_id)
        slot = None if number is None else self._slots.get(number)
        return number if slot is not None and slot.up else None

    def candidate(self) -> int:
        """Return the slot that a new session should be pinned to: the least loaded that is up, full or not.

        When every slot is down it is the first one, or `NO_SLOT`: the pin moves as soon as the session asks for room.
        """
        found = self._least_loaded(frozenset(), None)
        if found is None:
            up = (number for number, slot in self._slots.items() if slot.up)
            found = min(up, key=self.load, default=min(self._slots, default=NO_SLOT))
        return found

    def load(self, number: int) -> int:
        """Return the outstanding tokens of a slot."""
        return self._slots[number].load

    def running(self, number: int) -> int:
        """Return the number of requests that hold room in a slot."""
        return self._slots[number].running

    def choose(
        self,
        tokens: int,
        session_id: str | None = None,
        avoid: Set[int] = frozenset(),
        *,
        trial: int | None = None,
        spare: bool = False,
    ) -> Reservation | None:
        """Choose a slot and reserve room in it.

        Args:
            tokens: Outstanding tokens that the request stands for, >= 0.
            session_id: Goes to the slot it is pinned to, and is pinned to the chosen one.
            avoid: Slots where the request has already failed; used only when every other slot is down.
            trial: The request is under suspicion, and may join fewer than this many others on trial in a slot, >= 1.
            spare: The request is in no hurry, and leaves the reserve of a slot alone.

        Returns:
            The reservation, or None when the request has to wait.
        """
        why = LEAST_LOADED
        if session_id is not None and (number := self._pins.get(session_id)) is not None and number not in avoid:
            slot = self._slots.get(number)
            if slot is not None and slot.up:
                full = slot.running >= (slot.limit if spare else slot.capacity)
                if full or (trial is not None and slot.num_trials >= trial):
                    return None
                self.pin(session_id, number)
                return self._reserve(number, slot, tokens, PINNED, trial=trial is not None)
            if slot is None or slot.draining:
                why = LEAST_LOADED if number == NO_SLOT else MOVED_DRAINED
            else:
                why = MOVED_DIED
        if spare and not self._num_spacious:
            return None
        found = self._least_loaded(avoid, trial, spare=spare)
        if found is None:
            return None
        if session_id is not None:
            self.pin(session_id, found)
        return self._reserve(found, self._slots[found], tokens, why, trial=trial is not None)

    def release(self, reservation: Reservation) -> None:
        """Give room back. A second call, or one after the slot went down or was removed, changes nothing."""
        if reservation.released:
            return
        reservation.released = True
        slot = self._slots.get(reservation.slot)
        if slot is None or slot.incarnation != reservation.incarnation:
            return
        slot.running -= 1
        slot.load -= reservation.tokens
        if reservation.trial:
            slot.num_trials -= 1
        self._changed(reservation.slot, slot)

    def acquit(self, reservation: Reservation) -> None:
        """End a request's trial: it keeps its room and another one under suspicion may come."""
        if reservation.trial and not reservation.released:
            reservation.trial = False
            slot = self._slots.get(reservation.slot)
            if slot is not None and slot.incarnation == reservation.incarnation:
                slot.num_trials -= 1

    def _reserve(self, number: int, slot: _Slot, tokens: int, why: str, *, trial: bool) -> Reservation:
        slot.running += 1
        slot.load += tokens
        if trial:
            slot.num_trials += 1
        self._changed(number, slot)
        return Reservation(number, slot.incarnation, tokens, why, trial=trial)

    def _known(self, number: int) -> _Slot:
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = _Slot()
            slot.num_pins = self._stray_pins.pop(number, 0)
        return slot

    def _count_pin(self, number: int | None, change: int) -> None:
        if number is None:
            return
        if (slot := self._slots.get(number)) is not None:
            slot.num_pins += change
            self._changed(number, slot)
        else:
            self._stray_pins[number] += change
            if not self._stray_pins[number]:
                del self._stray_pins[number]

    def _least_loaded(self, avoid: Set[int], trial: int | None, *, spare: bool = False) -> int | None:
        if avoid and not any(slot.up and number not in avoid for number, slot in self._slots.items()):
            avoid = frozenset()
        heap, skipped, found = self._heap, [], None
        while heap:
            _, _, number, stamp = heap[0]
            slot = self._slots[number]
            if slot.stamp != stamp:
                heappop(heap)
            elif (
                number in avoid
                or (trial is not None and slot.num_trials >= trial)
                or (spare and slot.running >= slot.limit)
            ):
                skipped.append(heappop(heap))
            else:
                found = number
                break
        for entry in skipped:
            heappush(heap, entry)
        return found

    def _changed(self, number: int, slot: _Slot) -> None:
        slot.stamp += 1
        spacious = slot.up and slot.running < slot.limit
        if spacious != slot.spacious:
            slot.spacious = spacious
            self._num_spacious += 1 if spacious else -1
        if slot.up and slot.running < slot.capacity:
            heappush(self._heap, (slot.load, slot.num_pins, number, slot.stamp))
        if len(self._heap) > 4 * len(self._slots) + 64:
            self._heap = [entry for entry in self._heap if self._slots[entry[2]].stamp == entry[3]]
            heapify(self._heap)
