"""What becomes of the actors of a served model, decided without any."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from raylm.actors.lifecycle import Autoscaler, Member, Phase, Steps, steps
from raylm.config import AutoscalingConfig

PHASES: list[Phase] = ["waiting", "starting", "up", "failed", "draining"]
ENGINES = ["old", "new"]

members = st.lists(
    st.builds(
        Member, slot=st.integers(0, 99), engine=st.sampled_from(ENGINES), phase=st.sampled_from(PHASES),
        load=st.integers(0, 3), may_fit=st.booleans(), room_made=st.booleans(),
    ),
    unique_by=lambda member: member.slot,
    max_size=8,
)  # fmt: skip
wanted_engines = st.lists(st.sampled_from(ENGINES), max_size=5)


def up(slot: int, engine: str = "old", load: int = 0) -> Member:
    """Return an actor that serves."""
    return Member(slot, engine, "up", load)


@given(wanted_engines, members)
def test_never_more_than_one_over_what_is_wanted_while_old_ones_serve(wanted: list[str], members: list[Member]) -> None:
    """What is created beside the old ones is one at most."""
    todo = steps(wanted, members)
    staying = [member for member in members if member.phase != "draining" and member.slot not in todo.drain]
    if todo.create:
        old = Counter(member.engine for member in staying) - Counter(wanted)
        assert len(staying) + len(todo.create) <= len(wanted) + (1 if old.total() else 0) + len(todo.drain)


@given(wanted_engines, members)
def test_no_fewer_serve_than_are_wanted(wanted: list[str], members: list[Member]) -> None:
    """Draining leaves as many up as are wanted, or takes one alone, and only to make room."""
    todo = steps(wanted, members)
    serving = [member for member in members if member.phase == "up"]
    left = [member for member in serving if member.slot not in todo.drain]
    if len(left) < min(len(wanted), len(serving)):
        assert len(left) == min(len(wanted), len(serving)) - 1
        assert any(member.phase == "waiting" for member in members)
        assert not any(member.phase == "draining" for member in members)


@given(wanted_engines, members)
def test_what_is_there_and_wanted_stays(wanted: list[str], members: list[Member]) -> None:
    """Nothing is created while one like it is there to be kept, and none that is wanted is drained."""
    todo = steps(wanted, members)
    there = Counter(member.engine for member in members if member.phase != "draining")
    assert Counter(todo.create) <= Counter(wanted) - there
    drained = Counter(member.engine for member in members if member.slot in todo.drain)
    assert drained <= there - Counter(wanted)


@given(wanted_engines, members, st.data())
def test_it_comes_to_rest_at_what_is_wanted(wanted: list[str], members: list[Member], data: st.DataObject) -> None:
    """When what starts comes up and what drains ends, there are those that are wanted and no others."""
    members = [member for member in members if member.phase != "failed"]
    next_slot = 100
    for _ in range(200):
        todo = steps(wanted, members)
        if todo == Steps() and all(member.phase == "up" for member in members):
            break
        members = [replace(each, phase="draining") if each.slot in todo.drain else each for each in members]
        members = [replace(each, room_made=each.room_made or each.slot == todo.room_for) for each in members]
        for engine in todo.create:
            phase: Phase = data.draw(st.sampled_from(["starting", "waiting"]))
            members.append(Member(next_slot, engine, phase, may_fit=data.draw(st.booleans())))
            next_slot += 1
        changing = [member for member in members if member.phase != "up"]
        if changing:
            chosen = data.draw(st.sampled_from(changing))
            members.remove(chosen)
            if chosen.phase != "draining":
                members.append(replace(chosen, phase="up"))
    assert Counter(member.engine for member in members) == Counter(wanted)


def test_an_update_goes_one_by_one() -> None:
    """A new one is created, and when it is up an old one goes."""
    assert steps(["new", "new"], [up(0), up(1)]) == Steps(create=("new",))
    assert steps(["new", "new"], [up(0), up(1), Member(2, "new", "starting")]) == Steps()
    assert steps(["new", "new"], [up(0, load=5), up(1), up(2, "new")]) == Steps(drain=(1,), create=())


def test_an_update_without_room_makes_some() -> None:
    """The old one ends first where both do not fit."""
    waiting = Member(1, "new", "waiting", may_fit=True)
    assert steps(["new"], [up(0), waiting]) == Steps(drain=(0,), room_for=1)
    assert steps(["new"], [Member(0, "old", "draining"), waiting]) == Steps()


def test_an_update_where_fewer_serve_than_are_wanted() -> None:
    """Room is made all the same, for one after the other."""
    waiting = [Member(slot, "new", "waiting", may_fit=True) for slot in (2, 3)]
    assert steps(["new"] * 3, [up(0), up(1), *waiting]) == Steps(drain=(1,), room_for=2)
    starting = [Member(2, "new", "starting"), waiting[1]]
    assert steps(["new"] * 3, [up(0), *starting]) == Steps(create=("new",))
    assert steps(["new"] * 3, [up(0), up(2, "new"), waiting[1]]).room_for == 3


def test_room_that_somebody_else_has_taken() -> None:
    """An actor for which room was made, and which still waits, gets no more."""
    waiting = Member(2, "new", "waiting", may_fit=True, room_made=True)
    assert steps(["new"] * 2, [up(0), waiting]) == Steps(create=("new",))
    assert steps(["new"] * 2, [up(0), waiting, replace(waiting, slot=3, room_made=False)]) == Steps()


@given(st.integers(1, 4), st.integers(0, 3), st.data())
def test_an_update_of_a_full_cluster(num_places: int, num_more: int, data: st.DataObject) -> None:
    """It comes to its end also where there is room for fewer than are wanted, and takes one from service at most."""
    wanted = ["new"] * (num_places + num_more)
    members = [up(slot) for slot in range(num_places)]
    slots = itertools.count(num_places)
    for _ in range(100):
        todo = steps(wanted, members)
        members = [replace(each, phase="draining") if each.slot in todo.drain else each for each in members]
        members = [replace(each, room_made=each.room_made or each.slot == todo.room_for) for each in members]
        members += [Member(next(slots), engine, "waiting", may_fit=True) for engine in todo.create]
        assert sum(member.phase == "up" for member in members) >= num_places - 1
        moving = [member for member in members if member.phase in ("draining", "starting")]
        waiting = [member for member in members if member.phase == "waiting"]
        if sum(member.phase != "waiting" for member in members) < num_places and waiting:
            moving += waiting
        if not moving:
            if todo == Steps():
                break
            continue
        chosen = data.draw(st.sampled_from(moving))
        members.remove(chosen)
        if chosen.phase != "draining":
            if chosen.phase == "waiting" and not chosen.room_made:  # it has taken the room that another was to have
                members = [replace(each, room_made=False) for each in members]
            phase: Phase = "starting" if chosen.phase == "waiting" else "up"
            members.append(replace(chosen, phase=phase, room_made=chosen.room_made and phase != "up"))
    assert Counter(member.engine for member in members if member.phase == "up") == {"new": num_places}


def test_what_can_never_fit_takes_nobody_s_room() -> None:
    """An actor that no node is large enough for waits, and the old ones go on."""
    assert steps(["new"], [up(0), Member(1, "new", "waiting")]) == Steps()


@given(st.integers(1, 5), st.integers(0, 5))
def test_an_update_that_never_gets_room(num_wanted: int, num_more: int) -> None:
    """One old actor makes room; when that is not enough, the others go on."""
    members = [up(slot) for slot in range(num_wanted + num_more)]
    for _ in range(20):
        todo = steps(["new"] * num_wanted, members)
        members = [member for member in members if member.slot not in todo.drain]
        members = [replace(each, room_made=each.room_made or each.slot == todo.room_for) for each in members]
        members += [Member(100 + len(members), engine, "waiting", may_fit=True) for engine in todo.create]
    assert sum(member.phase == "up" for member in members) == num_wanted - 1


def test_an_update_that_fails_stops() -> None:
    """The old ones go on when the first new one does not start; those of the settings before bring it to an end."""
    now = [up(0), up(1), Member(2, "new", "failed")]
    assert steps(["new", "new"], now) == Steps()
    assert steps(["old", "old"], now) == Steps(drain=(2,))


def test_fewer_of_the_same() -> None:
    """The least loaded go, all at once."""
    assert steps(["old"], [up(0, load=3), up(1, load=1), up(2, load=2)]) == Steps(drain=(1, 2))


def test_none() -> None:
    """All go when none is wanted."""
    assert set(steps([], [up(0), Member(1, "old", "starting")]).drain) == {0, 1}


class TestAutoscaler:
    """How many, by the work."""

    CONFIG = AutoscalingConfig(
        min_replicas=0, max_replicas=4, target_outstanding_tokens=100, upscale_delay_s=5, downscale_delay_s=60
    )

    def test_more_work_for_long(self) -> None:
        """Actors are added when there has been work for more of them for the delay."""
        scaler = Autoscaler(self.CONFIG)
        assert scaler.decide(0, 250, 1) == 1
        assert scaler.decide(4.9, 250, 1) == 1
        assert scaler.decide(5, 250, 1) == 3

    def test_a_moment_of_work(self) -> None:
        """A burst that is over within the delay adds none."""
        scaler = Autoscaler(self.CONFIG)
        scaler.decide(0, 250, 1)
        scaler.decide(4, 50, 1)
        assert scaler.decide(8, 250, 1) == 1

    def test_the_first_at_once(self) -> None:
        """With none there, whatever waits brings one at once."""
        assert Autoscaler(self.CONFIG).decide(0, 1, 0) == 1

    def test_less_work_for_long(self) -> None:
        """When there has been little for the delay, as many stay as were needed at most meanwhile."""
        scaler = Autoscaler(self.CONFIG)
        assert scaler.decide(0, 0, 4) == 4
        assert scaler.decide(30, 150, 4) == 4
        assert scaler.decide(60, 0, 4) == 2

    def test_the_last_one(self) -> None:
        """The last one ends when there has been nothing for the delay, and not while it has work."""
        scaler = Autoscaler(self.CONFIG)
        assert scaler.decide(0, 1, 1) == 1
        assert scaler.decide(100, 0, 1) == 1
        assert scaler.decide(160, 0, 1) == 0

    @given(
        st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10_000)), max_size=30),
        st.integers(0, 4),
    )
    def test_bounds(self, history: list[tuple[float, int]], replicas: int) -> None:
        """Whatever the work, there are never fewer or more than the bounds say."""
        scaler, now = Autoscaler(self.CONFIG), 0.0
        for elapsed, tokens in history:
            now += elapsed
            replicas = scaler.decide(now, tokens, replicas)
            assert 0 <= replicas <= 4
            if tokens:
                assert replicas != 0
