"""The router's invariants, over any sequence of what can happen to it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from raylm.routing import LEAST_LOADED, MOVED_DIED, MOVED_DRAINED, PINNED, Reservation, Router

SLOTS = st.integers(0, 4)
SESSIONS = st.sampled_from(["a", "b", "c"])


class RouterMachine(RuleBasedStateMachine):
    """Compares a router with a plain model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(max_pins=2)
        self.capacity: dict[int, int] = {}  # of slots that are up
        self.known: set[int] = set()
        self.draining: set[int] = set()
        self.held: list[Reservation] = []  # in slots that have been up ever since
        self.void: list[Reservation] = []

    @rule(slot=SLOTS, capacity=st.integers(1, 3))
    def up(self, slot: int, capacity: int) -> None:
        self.router.up(slot, capacity)
        self.known.add(slot)
        self.forget(slot)
        if slot not in self.draining:
            self.capacity[slot] = capacity

    @rule(slot=SLOTS)
    def down(self, slot: int) -> None:
        if slot in self.known:
            self.router.down(slot)
            self.forget(slot)
            self.capacity.pop(slot, None)

    @rule(slot=SLOTS)
    def drain(self, slot: int) -> None:
        self.router.drain(slot)
        self.known.add(slot)
        self.draining.add(slot)
        self.capacity.pop(slot, None)

    @rule(slot=SLOTS)
    def remove(self, slot: int) -> None:
        self.router.remove(slot)
        self.forget(slot)
        self.known.discard(slot)
        self.draining.discard(slot)
        self.capacity.pop(slot, None)

    @rule(
        tokens=st.integers(0, 100),
        session=st.none() | SESSIONS,
        avoid=st.frozensets(SLOTS, max_size=5),
        trial=st.none() | st.integers(1, 2),
    )
    def choose(self, tokens: int, session: str | None, avoid: frozenset[int], trial: int | None) -> None:
        pin = self.router.pinned(session) if session is not None else None
        loads = {slot: self.load(slot) for slot in self.capacity}
        free = {slot for slot in self.capacity if self.running(slot) < self.capacity[slot]}
        if trial is not None:
            on_trial = [reservation.slot for reservation in self.held if reservation.trial]
            free = {slot for slot in free if on_trial.count(slot) < trial}
        found = self.router.choose(tokens, session, avoid, trial=trial)
        if pin is not None and pin not in avoid:
            assert (found.slot if found else None) == (pin if pin in free else None)
            assert found is None or found.why == PINNED
        else:
            allowed = free - avoid if set(self.capacity) - avoid else free
            assert (found is None) == (not allowed)
            if found is not None:
                assert found.slot in allowed
                assert loads[found.slot] == min(loads[slot] for slot in allowed)
                assert found.why in {LEAST_LOADED, MOVED_DIED, MOVED_DRAINED}
        if found is not None:
            self.held.append(found)
            if session is not None:
                assert self.router.pinned(session) == found.slot

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            reservation = data.draw(st.sampled_from(self.held))
            self.router.release(reservation)
            self.router.release(reservation)
            self.held.remove(reservation)

    @rule(data=st.data())
    def release_late(self, data: st.DataObject) -> None:
        if self.void:
            self.router.release(data.draw(st.sampled_from(self.void)))

    @rule(data=st.data())
    def acquit(self, data: st.DataObject) -> None:
        if self.held:
            self.router.acquit(data.draw(st.sampled_from(self.held)))

    @invariant()
    def load_is_what_is_held(self) -> None:
        for slot in self.capacity:
            assert self.router.load(slot) == self.load(slot)
            assert self.router.running(slot) == self.running(slot) <= self.capacity[slot]

    @invariant()
    def room_is_known(self) -> None:
        room = any(self.running(slot) < capacity for slot, capacity in self.capacity.items())
        assert self.router.has_room() == room

    def load(self, slot: int) -> int:
        return sum(reservation.tokens for reservation in self.held if reservation.slot == slot)

    def running(self, slot: int) -> int:
        return sum(reservation.slot == slot for reservation in self.held)

    def forget(self, slot: int) -> None:
        self.void += [reservation for reservation in self.held if reservation.slot == slot]
        self.held = [reservation for reservation in self.held if reservation.slot != slot]


RouterMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestRouter = RouterMachine.TestCase


def test_only_the_sessions_of_a_lost_slot_move() -> None:
    """When a slot goes down and comes back, sessions pinned to other slots stay where they are."""
    router = Router()
    for slot in range(4):
        router.up(slot, 1000)
    home = {}
    for session in map(str, range(200)):
        reservation = router.choose(1, session)
        assert reservation is not None
        home[session] = reservation.slot
    router.down(2)
    for session, slot in home.items():
        reservation = router.choose(1, session)
        assert reservation is not None
        assert (reservation.slot == slot) == (slot != 2)
        assert reservation.why == (MOVED_DIED if slot == 2 else PINNED)


def test_new_sessions_spread_over_idle_slots() -> None:
    """Sessions that begin while every slot is idle are pinned to all slots alike."""
    router = Router()
    for slot in range(4):
        router.up(slot, 10)
    for session in map(str, range(40)):
        router.pin(session, router.candidate())
    assert [sum(router.pinned(str(session)) == slot for session in range(40)) for slot in range(4)] == [10] * 4


def test_sessions_count_before_and_after_their_slot() -> None:
    """Sessions pinned to a slot that is not there yet, or is gone for a while, count when it comes."""
    router = Router()
    for session in map(str, range(3)):
        router.pin(session, 0)
    router.unpin("0")
    for _ in range(2):
        router.up(0, 10)
        router.up(1, 10)
        assert router.candidate() == 1
        router.pin("other", 1)
        assert router.candidate() == 1
        router.remove(0)
        router.remove(1)


def test_pins_are_bounded() -> None:
    """Above `max_pins` the least recently used session loses its pin."""
    router = Router(max_pins=2)
    router.up(0, 10)
    router.pin("a", 0)
    router.pin("b", 0)
    router.choose(1, "a")
    router.pin("c", 0)
    assert [session for session in "abc" if router.pinned(session) is not None] == ["a", "c"]


def test_a_suspended_slot_takes_nothing_new() -> None:
    """A suspended slot gets no request until it is resumed, and keeps what it has."""
    router = Router()
    router.up(0, 10)
    assert router.choose(5) is not None
    router.suspend(0, suspended=True)
    assert router.choose(1) is None
    assert router.load(0) == 5
    router.suspend(0, suspended=False)
    assert router.choose(1) is not None


def test_sessions_of_a_drained_slot_move() -> None:
    """A session whose slot is drained goes elsewhere, also when the slot is gone, and is told why."""
    router = Router()
    for number in (0, 1, 2):
        router.up(number, 4)
    router.pin("a", 0)
    router.pin("b", 1)
    router.drain(0)
    router.remove(1)
    for session in ("a", "b"):
        found = router.choose(1, session)
        assert found is not None
        assert (found.slot, found.why) == (2, MOVED_DRAINED)


def test_a_drained_slot_keeps_what_it_has() -> None:
    """A reservation there is released as ever, and takes nothing from a later slot of that number."""
    router = Router()
    router.up(0, 1)
    found = router.choose(7)
    assert found is not None
    router.drain(0)
    assert router.load(0) == 7
    assert router.choose(1) is None
    router.remove(0)
    router.up(0, 1)
    router.release(found)
    assert router.running(0) == 0
    assert router.choose(1) is not None


def test_no_slot_at_all() -> None:
    """A session that begins while there is none is pinned to the first one that comes."""
    router = Router()
    router.pin("a", router.candidate())
    router.up(5, 1)
    found = router.choose(1, "a")
    assert found is not None
    assert (found.slot, found.why) == (5, LEAST_LOADED)
