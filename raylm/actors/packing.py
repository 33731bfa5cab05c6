"""Packing: which replica goes to which node, as few accelerators stay idle as can be. Pure: no Ray, no clock.

Accelerators are packed tightly: the largest shapes first, each to the node where it leaves least. Where that does not
place everything, a search of bounded length looks for a better packing; it knows when there is none. Amounts are whole
numbers of 1/10,000, as in Ray, so that ten tenths are one.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from raylm.actors.placement import Node, Shape

ONE = 10_000
"""Units of one CPU, GPU or other resource. Source: ray 2.60, `kResourceUnitScaling`."""

_MAX_SEARCH_STEPS = 10_000
"""Fillings of one node that the search for a better packing tries: some tenths of a second at most."""


def units(amount: float) -> int:
    """Return an amount of a resource in units."""
    return round(amount * ONE)


class Room:
    """What is free of a node, in units. GPUs that are shared are counted one by one: a share lies within one GPU."""

    __slots__ = ("free", "node", "parts", "whole")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.free = {"CPU": units(node.free("CPU")), **{name: units(node.free(name)) for name in node.resources}}
        self.whole, part = divmod(units(node.free("GPU")), ONE)
        self.parts = [part] if part else []  # what is left of shared GPUs

    def copy(self) -> Room:
        """Return another room with the same in it."""
        other = object.__new__(Room)
        other.node, other.free, other.whole, other.parts = self.node, self.free.copy(), self.whole, self.parts.copy()
        return other

    def accelerators(self, name: str) -> int:
        """Return what is free of an accelerator."""
        return self.whole * ONE + sum(self.parts) if name == "GPU" else self.free.get(name, 0)

    def num_whole(self, name: str) -> int:
        """Return how many accelerators are free as a whole."""
        return self.whole if name == "GPU" else self.free.get(name, 0) // ONE

    def take_whole(self, name: str, count: int) -> None:
        """Take accelerators that are free as a whole."""
        if name == "GPU":
            self.whole -= count
        elif count:
            self.free[name] -= count * ONE

    def count(self, wanted: Shape, limit: int) -> int:
        """Return how many replicas have room, `limit` at most. The node is of the right kind."""
        for name, need in wanted.needs.items():
            if name != "GPU":
                limit = min(limit, self.free.get(name, 0) // need)
            elif need >= ONE:
                limit = min(limit, self.whole * ONE // need)
            else:
                limit = min(limit, self.whole * (ONE // need) + sum(part // need for part in self.parts))
        return limit

    def take(self, wanted: Shape, count: int = 1) -> None:
        """Take the room of some replicas, which is there."""
        for name, need in wanted.needs.items():
            if name != "GPU":
                self.free[name] -= need * count
            elif need >= ONE:
                self.whole -= need * count // ONE
            else:
                for _ in range(count):
                    self._share(need)

    def _share(self, need: int) -> None:
        """Take a share of the fullest GPU that has it, as Ray does, so that no whole one is cut in vain."""
        fitting = [part for part in self.parts if part >= need]
        if fitting:
            self.parts.remove(min(fitting))
            left = min(fitting) - need
        else:
            self.whole -= 1
            left = ONE - need
        if left:
            self.parts.append(left)


Packing: TypeAlias = "dict[tuple[Shape, int], int]"
"""By shape and index of a node, how many replicas go there."""


def span(rooms: Sequence[Room], wanted: Shape) -> tuple[int, ...]:
    """Place one replica over several nodes, those with most free accelerators first, as Ray packs a placement group."""
    size = int(wanted.num_gpus)
    order = sorted(
        (index for index, room in enumerate(rooms) if room.node.has_kind(wanted)),
        key=lambda index: -rooms[index].accelerators(wanted.accelerator),
    )
    free = {index: rooms[index].num_whole(wanted.accelerator) for index in order}
    if sum(free.values()) < size:
        return ()
    own = replace(wanted, num_gpus=0)
    if not rooms[order[0]].count(own, 1):  # the actor belongs beside rank 0
        return ()
    rooms[order[0]].take(own)
    places: list[int] = []
    for index in order:
        count = min(size - len(places), free[index])
        rooms[index].take_whole(wanted.accelerator, count)
        places += [index] * count
    return tuple(places)


def pack(rooms: Sequence[Room], wanted: Mapping[Shape, int], *, search: bool) -> Packing:
    """Return where to put replicas that take accelerators of one node each, so that few accelerators stay idle.

    Args:
        rooms: What is free of each node.
        wanted: How many replicas there are of each shape.
        search: Look for a better packing where the first ones do not place everything.
    """
    suiting = {one: [index for index, room in enumerate(rooms) if room.node.has_kind(one)] for one in wanted}
    by_size = sorted(wanted, key=lambda one: (-one.num_gpus, len(suiting[one])))
    by_choice = sorted(wanted, key=lambda one: (len(suiting[one]), -one.num_gpus))
    packings = [_fit_best(rooms, wanted, suiting, by_size)]
    if _used(packings[0]) < sum(one.needs[one.accelerator] * count for one, count in wanted.items()):
        packings.append(_fit_best(rooms, wanted, suiting, by_choice))
        if search:
            packings.append(_search(rooms, wanted, suiting, by_size, max(map(_used, packings))))
    return max(packings, key=_used)


def _fit_best(
    rooms: Sequence[Room], wanted: Mapping[Shape, int], suiting: Mapping[Shape, Sequence[int]], order: Sequence[Shape]
) -> Packing:
    """Put each replica where it leaves least: the tightest node, and of those the one that fewest others can use."""
    rooms = [room.copy() for room in rooms]
    rivals = Counter(index for indexes in suiting.values() for index in indexes)
    packing: Packing = {}
    for one in order:
        left = wanted[one]

        def tightness(index: int, one: Shape = one) -> tuple[bool, int, int, int]:
            room = rooms[index]
            opens = one.num_gpus < 1 and all(part < one.needs[one.accelerator] for part in room.parts)
            return opens, room.accelerators(one.accelerator), rivals[index], index

        for index in sorted(suiting[one], key=tightness):
            count = rooms[index].count(one, left)
            if count:
                rooms[index].take(one, count)
                packing[one, index] = count
                left -= count
                if not left:
                    break
    return packing


def _search(
    rooms: Sequence[Room],
    wanted: Mapping[Shape, int],
    suiting: Mapping[Shape, Sequence[int]],
    order: Sequence[Shape],
    best: int,
) -> Packing:
    """Return a packing that uses more than `best` units of accelerators, the most there is; empty when none is found.

    It goes node by node and tries each way to fill one to which nothing could be added, depth first. What remains to be
    placed says how much has been placed, so no remainder is looked at twice at the same node.
    """
    sizes = [one.needs[one.accelerator] for one in order]
    indexes = sorted({index for found in suiting.values() for index in found}, key=lambda i: (_alike(rooms[i]), i))
    kinds: dict[int, set[int]] = {index: set() for index in indexes}
    for n, one in enumerate(order):
        for index in suiting[one]:
            kinds[index].add(n)
    reach = [_reach(rooms[index], [order[n] for n in kinds[index]]) for index in indexes]
    beyond = [sum(reach[position:]) for position in range(len(reach) + 1)]
    start = tuple(wanted[one] for one in order)
    whole = sum(size * count for size, count in zip(sizes, start, strict=True))
    cache: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}

    def fillings(position: int, left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Return the fillings of a node, the fullest first."""
        index = indexes[position]
        room = rooms[index]
        limits = tuple(
            room.count(one, count) if count and n in kinds[index] else 0
            for n, (one, count) in enumerate(zip(order, left, strict=True))
        )
        key = (_alike(room), limits)
        if key not in cache:
            found = list(_fillings(room, order, limits))
            found.sort(key=lambda counts: -sum(size * count for size, count in zip(sizes, counts, strict=True)))
            cache[key] = found
        return iter(cache[key])

    result: Packing = {}
    seen = {(0, start)}
    path: list[tuple[int, ...]] = []  # how each node before the present one is filled
    lefts = [start]
    stack = [fillings(0, start)] if indexes else []
    for _ in range(_MAX_SEARCH_STEPS):
        if not stack or best >= min(whole, beyond[0]):
            break
        counts = next(stack[-1], None)
        if counts is None:
            stack.pop()
            lefts.pop()
            if path:
                path.pop()
            continue
        left = tuple(have - count for have, count in zip(lefts[-1], counts, strict=True))
        position = len(stack)
        remaining = sum(size * count for size, count in zip(sizes, left, strict=True))
        if whole - remaining > best:
            best = whole - remaining
            filled = [*path, counts]
            result = {
                (order[n], indexes[at]): count for at, row in enumerate(filled) for n, count in enumerate(row) if count
            }
        hopeless = whole - remaining + min(remaining, beyond[position]) <= best
        if position == len(indexes) or hopeless or (position, left) in seen:
            continue
        seen.add((position, left))
        path.append(counts)
        lefts.append(left)
        stack.append(fillings(position, left))
    return result


def _fillings(room: Room, order: Sequence[Shape], limits: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Return every way to fill a room within limits to which nothing could be added, the largest shapes first."""

    def extend(room: Room, n: int, counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if n == len(order):
            if not any(
                limit > have and room.count(one, 1) for one, limit, have in zip(order, limits, counts, strict=True)
            ):
                yield counts
            return
        for count in range(room.count(order[n], limits[n]), -1, -1):
            taken = room
            if count:
                taken = room.copy()
                taken.take(order[n], count)
            yield from extend(taken, n + 1, (*counts, count))

    return extend(room, 0, ())


def _reach(room: Room, shapes: Sequence[Shape]) -> int:
    """Return how many units of accelerators the shapes could use of a room if there were any number of each."""
    total = 0
    for name in {one.accelerator for one in shapes}:
        free = room.accelerators(name)
        sums = {0}
        for need in {one.needs[name] for one in shapes if one.accelerator == name}:
            grown = sums
            while grown:
                grown = {have + need for have in grown if have + need <= free} - sums
                sums |= grown
        total += max(sums)
    return total


def _alike(room: Room) -> tuple[Any, ...]:
    """Return what two rooms have in common that take the same."""
    return room.whole, tuple(sorted(room.parts)), tuple(sorted(room.free.items()))


def _used(packing: Packing) -> int:
    return sum(one.needs[one.accelerator] * count for (one, _), count in packing.items())


def spread(rooms: Sequence[Room], light: Sequence[tuple[Shape, int]]) -> Iterator[tuple[int, int]]:
    """Place replicas without accelerators: whole CPUs on the emptiest node, slivers evenly over all of them.

    Yields:
        Number of the replica, index of its node.
    """
    num_slivers: Counter[int] = Counter()
    heaps: dict[Shape, list[tuple[int, int, int]]] = {}

    def entry(wanted: Shape, index: int) -> tuple[int, int, int]:
        return num_slivers[index] if wanted.num_cpus < 1 else 0, -rooms[index].free["CPU"], index

    for wanted, number in light:
        if wanted not in heaps:
            heaps[wanted] = [entry(wanted, index) for index, room in enumerate(rooms) if room.node.has_kind(wanted)]
            heapq.heapify(heaps[wanted])
        heap = heaps[wanted]
        while heap:
            index = heap[0][2]
            if not rooms[index].count(wanted, 1):
                heapq.heappop(heap)
            elif heap[0] != (now := entry(wanted, index)):
                heapq.heapreplace(heap, now)  # others have gone there since
            else:
                rooms[index].take(wanted)
                num_slivers[index] += wanted.num_cpus < 1
                heapq.heapreplace(heap, entry(wanted, index))
                yield number, index
                break
