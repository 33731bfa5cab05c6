"""The session store: claims, transcripts and limits."""

import pytest
import ray
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from raylm.actors.sessions import MemorySessionStore, SessionState
from raylm.config import SessionConfig
from raylm.errors import SessionBusyError, SessionNotFoundError
from raylm.messages import Message


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def talk(store: MemorySessionStore, session_id: str, text: str, *, start: bool = False) -> tuple[Message, ...]:
    """Run one turn and return the transcript that it found."""
    claim = store.claim(session_id, 0, "turn", start=start)
    store.append(session_id, "turn", [Message("user", text)], claim.slot)
    return claim.messages


def test_a_turn_finds_all_earlier_turns() -> None:
    """Each claim returns the messages of every turn before it."""
    store = MemorySessionStore(SessionConfig())
    talk(store, "s", "one", start=True)
    talk(store, "s", "two")
    assert [message.content for message in talk(store, "s", "three")] == ["one", "two"]


def test_the_first_claim_decides_the_slot() -> None:
    """A session stays pinned to the slot of its first claim, whatever later claims propose."""
    store = MemorySessionStore(SessionConfig())
    assert store.claim("s", 3, "a", start=True).slot == 3
    store.append("s", "a", [Message("user", "hi")], 3)
    assert store.claim("s", 5, "b", start=False).slot == 3


def test_one_turn_at_a_time() -> None:
    """A claim while another turn holds the session raises SessionBusyError, also one that would begin it anew."""
    store = MemorySessionStore(SessionConfig())
    store.claim("s", 0, "a", start=True)
    for start in (False, True):
        with pytest.raises(SessionBusyError):
            store.claim("s", 0, "b", start=start)
    store.release("s", "a")


def test_a_failed_first_turn_leaves_no_session() -> None:
    """A session whose first turn is released was never there."""
    store = MemorySessionStore(SessionConfig())
    store.claim("s", 0, "a", start=True)
    store.release("s", "a")
    with pytest.raises(SessionNotFoundError):
        store.load("s")


def test_a_failed_later_turn_leaves_the_transcript() -> None:
    """A released turn changes nothing in the transcript."""
    store = MemorySessionStore(SessionConfig())
    talk(store, "s", "one", start=True)
    store.claim("s", 0, "b", start=False)
    store.release("s", "b")
    assert store.load("s").messages == (Message("user", "one"),)


def test_start_begins_anew() -> None:
    """`start` replaces a session of the same id."""
    store = MemorySessionStore(SessionConfig())
    talk(store, "s", "old", start=True)
    assert talk(store, "s", "new", start=True) == ()
    assert store.load("s").messages == (Message("user", "new"),)


def test_idle_sessions_expire() -> None:
    """A session that was idle for `ttl_s` is gone, one that was used since is not."""
    clock = Clock()
    store = MemorySessionStore(SessionConfig(ttl_s=10), clock)
    talk(store, "old", "x", start=True)
    clock.now = 6
    talk(store, "new", "x", start=True)
    clock.now = 11
    assert store.num_sessions() == 1
    with pytest.raises(SessionNotFoundError):
        store.claim("old", 0, "turn", start=False)


def test_a_turn_of_a_lost_client_times_out() -> None:
    """A turn that neither appends nor releases holds its session no longer than `turn_timeout_s`."""
    clock = Clock()
    store = MemorySessionStore(SessionConfig(turn_timeout_s=5), clock)
    talk(store, "s", "one", start=True)
    store.claim("s", 0, "lost", start=False)
    clock.now = 5
    assert store.claim("s", 0, "next", start=False).messages == (Message("user", "one"),)
    with pytest.raises(SessionNotFoundError):
        store.append("s", "lost", [Message("user", "late")], 0)


def test_ending_an_unknown_session_raises() -> None:
    """`end` of a session that is not there raises SessionNotFoundError."""
    with pytest.raises(SessionNotFoundError):
        MemorySessionStore(SessionConfig()).end("never")


def test_works_as_a_ray_actor(cluster: str) -> None:
    """As a Ray actor the store raises its own errors as the cause."""
    store = ray.remote(MemorySessionStore).options(num_cpus=0).remote(SessionConfig())
    ray.get(store.claim.remote("s", 2, "a", start=True))
    ray.get(store.append.remote("s", "a", [Message("user", "hi")], 2))
    assert ray.get(store.load.remote("s")) == SessionState(2, (Message("user", "hi"),))
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(store.load.remote("t"))
    assert isinstance(raised.value.cause, SessionNotFoundError)
    ray.kill(store)


class StoreMachine(RuleBasedStateMachine):
    """Limits hold whatever is done to the store."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.config = SessionConfig(ttl_s=20, turn_timeout_s=10, max_sessions=3, max_bytes=40)
        self.store = MemorySessionStore(self.config, self.clock)
        self.held: set[tuple[str, str]] = set()

    sessions = st.sampled_from("abcdef")
    turns = st.sampled_from("xy")

    @rule(session=sessions, turn=turns, start=st.booleans())
    def claim(self, session: str, turn: str, start: bool) -> None:
        try:
            self.store.claim(session, 0, turn, start=start)
        except (SessionBusyError, SessionNotFoundError):
            return
        self.held.add((session, turn))
        self.check_limits()

    @rule(session=sessions, turn=turns, text=st.text("x", max_size=30))
    def append(self, session: str, turn: str, text: str) -> None:
        try:
            self.store.append(session, turn, [Message("user", text)], 0)
        except SessionNotFoundError:
            return
        assert (session, turn) in self.held
        self.check_limits()

    @rule(session=sessions, turn=turns)
    def release(self, session: str, turn: str) -> None:
        self.store.release(session, turn)

    @rule(session=sessions)
    def end(self, session: str) -> None:
        try:
            self.store.end(session)
        except SessionNotFoundError:
            return

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def bytes_are_counted(self) -> None:
        sizes = [session.num_bytes for session in self.store._sessions.values()]
        assert self.store._num_bytes == sum(sizes)

    def check_limits(self) -> None:
        """What exceeds the limits is in the middle of a turn."""
        within = (
            len(self.store._sessions) <= self.config.max_sessions and self.store._num_bytes <= self.config.max_bytes
        )
        assert within or all(self.store._busy(session) for session in self.store._sessions.values())


StoreMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase
