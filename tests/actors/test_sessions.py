"""The session store: one suite for all of them, and the limits of the one in memory."""

import asyncio
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest
import ray
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from raylm.actors.sessions import (
    MemorySessionStore,
    SessionRecord,
    SessionState,
    SessionStore,
    connect_store,
    start_store,
)
from raylm.chatbot import AsyncChatbot
from raylm.config import ServeConfig, SessionConfig, SimulatedConfig
from raylm.errors import InvalidRequestError, SessionBusyError, SessionError, SessionNotFoundError
from raylm.messages import Message, Status
from tests.actors.redis_server import RedisServer
from tests.actors.session_stores import (
    ActorSessions,
    Clock,
    ClockedSessionActor,
    PlainSessions,
    PlainSessionStore,
    RedisSessions,
    Sessions,
)

HI = (Message("user", "hi"),)

MakeSessions = Callable[..., Awaitable[tuple[SessionStore, Sessions]]]


@pytest.fixture(scope="module")
def clocked_actor(cluster: str) -> Iterator[Any]:
    """The actor of all tests of this file."""
    actor = ray.remote(ClockedSessionActor).options(num_cpus=0).remote(SessionConfig())
    yield actor
    ray.kill(actor)


@pytest.fixture(params=["memory", "actor", "redis"])
async def make_sessions(request: pytest.FixtureRequest) -> AsyncIterator[MakeSessions]:
    """Makes an empty store of each kind."""
    async with AsyncExitStack() as stack:

        async def make(config: SessionConfig | None = None) -> tuple[SessionStore, Sessions]:
            config = config or SessionConfig(turn_timeout_s=3600)
            sessions: Sessions
            if request.param == "memory":
                sessions = PlainSessions(config)
            elif request.param == "actor":
                sessions = ActorSessions(config, request.getfixturevalue("clocked_actor"))
            else:
                sessions = RedisSessions(config, request.getfixturevalue("redis_server").url)
                await sessions.clear()
            connect = sessions.connect

            def connect_and_close() -> SessionStore:
                store = connect()
                stack.push_async_callback(store.aclose)
                return store

            sessions.connect = connect_and_close  # type: ignore[method-assign]
            return sessions.connect(), sessions

        yield make


async def talk(store: SessionStore, session_id: str, text: str, *, start: bool = False) -> list[str]:
    """Run one turn and return the texts that it found."""
    state = await store.claim(session_id, 0, text, start=start)
    await store.append(session_id, text, [Message("user", text)], state.slot)
    return [message.content for message in state.messages]


async def test_a_turn_finds_all_earlier_turns(make_sessions: MakeSessions) -> None:
    """Each claim returns the messages of every turn before it, in their order."""
    store, _ = await make_sessions()
    texts = [f"turn {number}" for number in range(12)]
    for number, text in enumerate(texts):
        assert await talk(store, "s", text, start=number == 0) == texts[:number]


async def test_messages_come_back_as_they_were(make_sessions: MakeSessions) -> None:
    """Roles, names and any Unicode text survive the store, several messages a turn."""
    store, _ = await make_sessions()
    messages = (Message("user", "n\0ul, ü and 🎈", name="Rex"), Message("assistant", ""))
    await store.claim("s", 7, "a", start=True)
    await store.append("s", "a", messages, 7)
    assert await store.load("s") == SessionState(7, messages)


async def test_the_first_claim_decides_the_slot(make_sessions: MakeSessions) -> None:
    """A session stays pinned to the slot of its first claim, whatever later claims propose."""
    store, _ = await make_sessions()
    assert (await store.claim("s", 3, "a", start=True)).slot == 3
    await store.append("s", "a", HI, 3)
    assert (await store.claim("s", 5, "b", start=False)).slot == 3


async def test_the_slot_that_answered_is_kept(make_sessions: MakeSessions) -> None:
    """A session is pinned to the slot that its last turn ended in."""
    store, _ = await make_sessions()
    await store.claim("s", 3, "a", start=True)
    await store.append("s", "a", HI, 5)
    assert await store.load("s") == SessionState(5, HI)


async def test_one_turn_at_a_time(make_sessions: MakeSessions) -> None:
    """A claim while another turn holds the session raises SessionBusyError, also one that would begin it anew."""
    store, _ = await make_sessions()
    await store.claim("s", 0, "a", start=True)
    for start in (False, True):
        with pytest.raises(SessionBusyError):
            await store.claim("s", 0, "b", start=start)


async def test_one_of_many_claims_wins(make_sessions: MakeSessions) -> None:
    """Of many claims at the same time, from several clients, exactly one holds the session; so in each round."""
    first, sessions = await make_sessions()
    stores = [first, *(sessions.connect() for _ in range(7))]
    await talk(first, "s", "begin", start=True)
    for turn in range(5):
        turns = [f"{turn}-{number}" for number in range(80)]
        results = await asyncio.gather(
            *(stores[number % len(stores)].claim("s", 0, turn_id, start=False) for number, turn_id in enumerate(turns)),
            return_exceptions=True,
        )
        winners = [turn_id for turn_id, result in zip(turns, results, strict=True) if isinstance(result, SessionState)]
        assert len(winners) == 1
        assert sum(isinstance(result, SessionBusyError) for result in results) == len(turns) - 1
        await stores[turn].append("s", winners[0], HI, 0)
    assert len((await first.load("s")).messages) == 6


async def test_a_claim_may_be_repeated(make_sessions: MakeSessions) -> None:
    """The same turn claims once more, as when the first reply was lost, and gets the same."""
    store, _ = await make_sessions()
    await talk(store, "s", "one", start=True)
    first = await store.claim("s", 0, "a", start=False)
    assert await store.claim("s", 4, "a", start=False) == first
    new = await store.claim("t", 1, "b", start=True)
    assert await store.claim("t", 4, "b", start=True) == new == SessionState(1, ())


async def test_an_append_may_be_repeated(make_sessions: MakeSessions) -> None:
    """The same turn ends once more, as when the first reply was lost, and is in the transcript once."""
    store, _ = await make_sessions()
    await store.claim("s", 0, "a", start=True)
    for _ in range(2):
        await store.append("s", "a", HI, 0)
    await store.claim("s", 0, "b", start=False)
    await store.append("s", "a", HI, 0)  # while the next turn is running
    await store.append("s", "b", HI, 0)
    await store.append("s", "a", HI, 0)  # when the next turn has ended
    assert (await store.load("s")).messages == HI + HI


async def test_an_append_needs_the_session(make_sessions: MakeSessions) -> None:
    """A turn that does not hold the session cannot end in it."""
    store, _ = await make_sessions()
    await talk(store, "s", "one", start=True)
    for session_id in ("s", "never"):
        with pytest.raises(SessionNotFoundError):
            await store.append(session_id, "other", HI, 0)


async def test_a_failed_first_turn_leaves_no_session(make_sessions: MakeSessions) -> None:
    """A session whose first turn is released was never there."""
    store, _ = await make_sessions()
    await store.claim("s", 0, "a", start=True)
    await store.release("s", "a")
    with pytest.raises(SessionNotFoundError):
        await store.load("s")
    assert await store.num_sessions() == 0


async def test_a_failed_later_turn_leaves_the_transcript(make_sessions: MakeSessions) -> None:
    """A released turn changes nothing in the transcript, and the session is free."""
    store, _ = await make_sessions()
    await talk(store, "s", "one", start=True)
    await store.claim("s", 0, "b", start=False)
    await store.release("s", "b")
    assert (await store.load("s")).messages == (Message("user", "one"),)
    assert await talk(store, "s", "two") == ["one"]


async def test_the_last_turn_ends_its_session_and_no_other(make_sessions: MakeSessions) -> None:
    """A turn that is released for good takes the session with it, once, and none that was begun since."""
    store, _ = await make_sessions()
    await talk(store, "s", "one", start=True)
    await store.claim("s", 0, "b", start=False)
    await store.release("s", "b", end=True)
    with pytest.raises(SessionNotFoundError):
        await store.load("s")
    await store.claim("s", 0, "c", start=True)
    await store.release("s", "b", end=True)
    await store.append("s", "c", HI, 0)
    assert (await store.load("s")).messages == tuple(HI)


async def test_another_turn_is_not_released(make_sessions: MakeSessions) -> None:
    """A turn releases only what it holds itself, be the session there or not."""
    store, _ = await make_sessions()
    await store.release("s", "a")
    await store.claim("s", 0, "a", start=True)
    await store.release("s", "b")
    with pytest.raises(SessionBusyError):
        await store.claim("s", 0, "b", start=False)


async def test_start_begins_anew(make_sessions: MakeSessions) -> None:
    """`start` replaces a session of the same id."""
    store, _ = await make_sessions()
    await talk(store, "s", "old", start=True)
    assert await talk(store, "s", "new", start=True) == []
    assert (await store.load("s")).messages == (Message("user", "new"),)
    assert await store.num_sessions() == 1


async def test_idle_sessions_expire(make_sessions: MakeSessions) -> None:
    """A session that was idle for `ttl_s` is gone, one that was used since is not."""
    store, sessions = await make_sessions(SessionConfig(ttl_s=1000, turn_timeout_s=1000))
    await talk(store, "old", "x", start=True)
    await sessions.wait(600)
    await talk(store, "new", "x", start=True)
    await sessions.wait(500)
    assert await store.num_sessions() == 1
    with pytest.raises(SessionNotFoundError):
        await store.claim("old", 0, "turn", start=False)
    await store.claim("new", 0, "turn", start=False)


async def test_a_session_in_a_turn_does_not_expire(make_sessions: MakeSessions) -> None:
    """A turn may take longer than `ttl_s`."""
    store, sessions = await make_sessions(SessionConfig(ttl_s=1000, turn_timeout_s=5000))
    await store.claim("s", 0, "a", start=True)
    await sessions.wait(4000)
    await store.append("s", "a", HI, 0)
    assert (await store.load("s")).messages == HI
    await sessions.wait(1500)
    assert await store.num_sessions() == 0


async def test_a_turn_of_a_lost_client_times_out(make_sessions: MakeSessions) -> None:
    """A turn that neither appends nor releases holds its session no longer than `turn_timeout_s`."""
    store, sessions = await make_sessions(SessionConfig(turn_timeout_s=1000))
    await talk(store, "s", "one", start=True)
    await store.claim("s", 0, "lost", start=False)
    await sessions.wait(1000)
    assert (await store.claim("s", 0, "next", start=False)).messages == (Message("user", "one"),)
    with pytest.raises(SessionNotFoundError):
        await store.append("s", "lost", [Message("user", "late")], 0)


async def test_a_turn_that_is_renewed_goes_on(make_sessions: MakeSessions) -> None:
    """`renew` has a turn hold its session, and the session live, for as long as a claim does."""
    store, sessions = await make_sessions(SessionConfig(ttl_s=1000, turn_timeout_s=1000))
    await store.claim("s", 0, "long", start=True)
    await store.claim("other", 0, "lost", start=True)
    for _ in range(3):
        await sessions.wait(900)
        await store.renew({"long": "s", "another": "other", "ended": "unknown"})
    with pytest.raises(SessionBusyError):
        await store.claim("s", 0, "next", start=False)
    with pytest.raises(SessionNotFoundError):
        await store.load("other")
    await store.append("s", "long", HI, 0)
    assert (await store.load("s")).messages == HI


async def test_an_ended_session_is_gone(make_sessions: MakeSessions) -> None:
    """`end` forgets a session, also in the middle of a turn, which then has nowhere to go."""
    store, _ = await make_sessions()
    await talk(store, "s", "one", start=True)
    await store.claim("s", 0, "a", start=False)
    await store.end("s")
    for call in (store.load("s"), store.append("s", "a", HI, 0), store.end("s")):
        with pytest.raises(SessionNotFoundError):
            await call
    assert await store.num_sessions() == 0


async def test_an_unknown_session_raises(make_sessions: MakeSessions) -> None:
    """Whatever needs a session raises SessionNotFoundError when it is not there."""
    store, _ = await make_sessions()
    for call in (
        store.end("never"),
        store.load("never"),
        store.fork("never", "new"),
        store.claim("never", 0, "a", start=False),
    ):
        with pytest.raises(SessionNotFoundError):
            await call


async def test_a_fork_goes_its_own_way(make_sessions: MakeSessions) -> None:
    """A fork begins with the slot and the transcript of its origin; afterwards neither sees the other's turns."""
    store, _ = await make_sessions()
    await store.claim("s", 3, "a", start=True)
    await store.append("s", "a", HI, 3)
    await store.fork("s", "t")
    assert await store.load("t") == SessionState(3, HI)
    assert await talk(store, "s", "left") == ["hi"]
    assert await talk(store, "t", "right") == ["hi"]
    assert [message.content for message in (await store.load("s")).messages] == ["hi", "left"]
    assert [message.content for message in (await store.load("t")).messages] == ["hi", "right"]
    assert await store.num_sessions() == 2


async def test_a_fork_replaces(make_sessions: MakeSessions) -> None:
    """A fork takes the place of a session of its id."""
    store, _ = await make_sessions()
    await talk(store, "s", "one", start=True)
    for text in ("a", "b"):
        await talk(store, "t", text, start=text == "a")
    await store.fork("s", "t")
    assert await store.load("t") == await store.load("s")


async def test_a_fork_waits_for_no_turn(make_sessions: MakeSessions) -> None:
    """While either session is in the middle of a turn, `fork` raises SessionBusyError."""
    store, _ = await make_sessions()
    for session_id in ("s", "t"):
        await talk(store, session_id, "one", start=True)
    await store.claim("s", 0, "a", start=False)
    for origin, new in (("s", "t"), ("t", "s"), ("s", "new")):
        with pytest.raises(SessionBusyError):
            await store.fork(origin, new)
    await store.release("s", "a")
    await store.fork("s", "t")


async def test_a_name_is_pinned_where_it_was_first(make_sessions: MakeSessions) -> None:
    """A session that is a name alone stays in its first slot, until it has to leave that one."""
    store, sessions = await make_sessions(SessionConfig(ttl_s=1000))
    other = sessions.connect()
    assert await store.pin("s", 3) == 3
    assert await other.pin("s", 5) == 3
    assert await store.pin("s", 4, moved_from=3) == 4
    assert await other.pin("s", 5, moved_from=3) == 4  # which was moved meanwhile
    assert await store.num_sessions() == 1
    await sessions.wait(1000)
    assert await store.num_sessions() == 0
    assert await store.pin("s", 6) == 6


async def test_a_name_is_no_transcript(make_sessions: MakeSessions) -> None:
    """A session with a transcript and one that is a name alone do not meet, though they are called the same."""
    store, _ = await make_sessions()
    await talk(store, "s", "one", start=True)
    assert await store.pin("s", 3) == 3
    assert await store.num_sessions() == 2
    await store.end("s")
    assert await store.pin("s", 5) == 3
    assert await store.num_sessions() == 1


async def test_the_settings_choose_the_store(cluster: str, redis_server: RedisServer) -> None:
    """`connect_store` connects to the actor that `start_store` started, or to the database of the url."""
    for config in (SessionConfig(), SessionConfig(url=redis_server.url)):
        actor = start_store(config)
        assert (actor is None) == (config.url is not None)
        store = connect_store(config, actor, "raylm:settings:")
        await talk(store, "s", "one", start=True)
        assert await talk(store, "s", "two") == ["one"]
        await store.aclose()
        if actor is not None:
            ray.kill(actor)


async def test_programs_share_sessions_in_redis(cluster: str, redis_server: RedisServer) -> None:
    """Two programs whose settings name one database go on with each other's conversations."""
    settings = {"session_config": SessionConfig(url=redis_server.url), "max_new_tokens": 5, "temperature": 0}
    engine = SimulatedConfig(tokens_per_s=500)
    async with AsyncChatbot([engine, engine], **settings) as first, AsyncChatbot([engine], **settings) as second:
        async for status, text, _ in first.stream_chat("one", "s", sequence_end=False):
            answers = [text] if status == Status.END else []
        async for status, text, _ in second.stream_chat("two", "s", sequence_start=False, sequence_end=False):
            answers += [text] if status == Status.END else []
        history = await first.history("s")
        assert [message["content"] for message in history] == ["one", answers[0], "two", answers[1]]
        await second.end_session("s")
        with pytest.raises(SessionNotFoundError):
            await first.history("s")


async def test_prefixes_keep_apart(redis_server: RedisServer) -> None:
    """Sessions of one name under two prefixes of one database are two sessions."""
    stores = [connect_store(SessionConfig(url=redis_server.url), None, prefix) for prefix in ("raylm:a:", "raylm:b:")]
    for store in stores:
        await talk(store, "s", "one", start=True)
    await stores[0].end("s")
    assert [await store.num_sessions() for store in stores] == [0, 1]
    assert len((await stores[1].load("s")).messages) == 1
    for store in stores:
        await store.aclose()


def test_missing_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the client library, a url raises an error that says what to install."""
    monkeypatch.delitem(sys.modules, "raylm.actors.redis_sessions", raising=False)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(SessionError, match=r"pip install 'raylm\[redis\]'"):
        connect_store(SessionConfig(url="redis://127.0.0.1"), None, "raylm:test:")


def test_the_password_is_not_shown() -> None:
    """A url's password is not in the settings' text."""
    assert "secret" not in repr(SessionConfig(url="redis://:secret@host"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"password_env": "NAME"}, "give its url"),
        ({"url": "redis://:secret@host", "password_env": "NAME"}, "take one of them out"),
    ],
)
def test_a_password_is_in_one_place(settings: dict[str, Any], reason: str) -> None:
    """A variable for it needs a database, whose url has no other one; a wrong setting does not show it."""
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        ServeConfig.parse({"models": [{"name": "m", "engines": [{"kind": "simulated"}], "sessions": settings}]})
    assert "secret" not in str(raised.value)


def test_a_url_alone() -> None:
    """A database may be said by its url alone; a wrong one is an error that does not show it."""

    def parse(sessions: str) -> SessionConfig:
        model = {"name": "m", "engines": [{"kind": "simulated"}], "sessions": sessions}
        return ServeConfig.parse({"models": [model]}).models[0].sessions

    assert parse("redis://10.0.0.7:6379/0") == SessionConfig(url="redis://10.0.0.7:6379/0")
    with pytest.raises(InvalidRequestError, match=r"sessions\.url") as raised:
        parse("http://:secret@10.0.0.7")
    assert "secret" not in str(raised.value)


SESSIONS = st.sampled_from("abcd")
TURNS = st.sampled_from("xyz")
TEXTS = st.text(max_size=5)
WAITS = st.sampled_from([1000, 3000, 7000])
SLOTS = st.integers(0, 3)
CONFIG = SessionConfig(ttl_s=20_000, turn_timeout_s=10_000)

Operation = Callable[[SessionStore], Awaitable[Any]]


async def outcome(store: SessionStore, operation: Operation) -> Any:
    """Return what an operation returned, or the kind of error that it raised."""
    try:
        return await operation(store)
    except SessionError as error:
        return type(error)


class Operations(RuleBasedStateMachine):
    """Any sequence of operations on two stores, which both do the same."""

    def run(self, operation: Operation) -> None:
        raise NotImplementedError

    @rule(session=SESSIONS, slot=SLOTS, turn=TURNS, start=st.booleans())
    def claim(self, session: str, slot: int, turn: str, start: bool) -> None:
        self.run(lambda store: store.claim(session, slot, turn, start=start))

    @rule(session=SESSIONS, slot=SLOTS, turn=TURNS, text=TEXTS)
    def append(self, session: str, slot: int, turn: str, text: str) -> None:
        self.run(lambda store: store.append(session, turn, [Message("user", text)], slot))

    @rule(session=SESSIONS, slot=SLOTS, turn=TURNS, start=st.booleans(), text=TEXTS)
    def turn(self, session: str, slot: int, turn: str, start: bool, text: str) -> None:
        self.claim(session, slot, turn, start)
        self.append(session, slot, turn, text)

    @rule(turns=st.dictionaries(TURNS, SESSIONS))
    def renew(self, turns: dict[str, str]) -> None:
        self.run(lambda store: store.renew(turns))

    @rule(session=SESSIONS, turn=TURNS, end=st.booleans())
    def release(self, session: str, turn: str, end: bool) -> None:
        self.run(lambda store: store.release(session, turn, end=end))

    @rule(session=SESSIONS)
    def load(self, session: str) -> None:
        self.run(lambda store: store.load(session))

    @rule(session=SESSIONS)
    def end(self, session: str) -> None:
        self.run(lambda store: store.end(session))

    @rule(session=SESSIONS, new_session=SESSIONS)
    def fork(self, session: str, new_session: str) -> None:
        self.run(lambda store: store.fork(session, new_session))

    @rule()
    def num_sessions(self) -> None:
        self.run(lambda store: store.num_sessions())


def test_redis_does_what_memory_does(redis_server: RedisServer) -> None:
    """Every sequence of operations has the same outcomes in memory and in Redis."""

    class Machine(Operations):
        def __init__(self) -> None:
            super().__init__()
            self.loop = asyncio.new_event_loop()  # a Runner would drop the present one unclosed
            self.sides: list[Sessions] = [PlainSessions(CONFIG), found := RedisSessions(CONFIG, redis_server.url)]
            self.loop.run_until_complete(found.clear())
            self.stores = [side.connect() for side in self.sides]

        def run(self, operation: Operation) -> None:
            memory, redis = [self.loop.run_until_complete(outcome(store, operation)) for store in self.stores]
            assert memory == redis

        @rule(session=SESSIONS, slot=SLOTS, moved_from=st.none() | SLOTS)
        def pin(self, session: str, slot: int, moved_from: int | None) -> None:
            self.run(lambda store: store.pin(session, slot, moved_from=moved_from))

        @rule(seconds=WAITS)
        def wait(self, seconds: float) -> None:
            for side in self.sides:
                self.loop.run_until_complete(side.wait(seconds))

        def teardown(self) -> None:
            for session in "abcd":
                self.load(session)
            for store in self.stores:
                self.loop.run_until_complete(store.aclose())
            self.loop.close()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


class HeldByPools(PlainSessionStore):
    """A store in memory, and pools that each keep what they have touched."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(MemorySessionStore(CONFIG, clock))
        self.clock = clock
        self.pools = [MemorySessionStore(CONFIG, clock) for _ in range(3)]
        self.asking = self.pools[0]

    def die(self, order: random.Random) -> None:
        """Lose everything but what the pools hold, which comes back in any order."""
        self._store = MemorySessionStore(CONFIG, self.clock)
        held = [record for pool in self.pools for record in pool.records()]
        order.shuffle(held)
        for record in held:
            self._store.restore([record])

    async def claim(self, session_id: str, slot: int, turn_id: str, *, start: bool) -> SessionState:
        return self.hold(self._store.claim(session_id, slot, turn_id, start=start)).state

    async def append(self, session_id: str, turn_id: str, messages: Any, slot: int) -> None:
        self.hold(self._store.append(session_id, turn_id, messages, slot))

    async def renew(self, turns: Mapping[str, str]) -> None:
        self._store.renew(turns)
        for pool in self.pools:  # each turn's own one among them
            pool.renew(turns)

    async def release(self, session_id: str, turn_id: str, *, end: bool = False) -> None:
        if (record := self._store.release(session_id, turn_id, end=end)) is not None:
            self.hold(record)

    async def end(self, session_id: str) -> None:
        self.hold(self._store.end(session_id))

    async def fork(self, session_id: str, new_session_id: str) -> None:
        self.hold(self._store.fork(session_id, new_session_id))

    def hold(self, record: SessionRecord) -> SessionRecord:
        self.asking.restore([record])
        return record


class DyingStore(Operations):
    """A store that dies now and then, and is told what its pools hold, does what one does that never dies."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()  # a Runner would drop the present one unclosed
        self.immortal = PlainSessions(CONFIG)
        self.clock = Clock()
        self.mortal = HeldByPools(self.clock)

    def run(self, operation: Operation) -> None:
        expected = self.loop.run_until_complete(outcome(self.immortal.connect(), operation))
        assert self.loop.run_until_complete(outcome(self.mortal, operation)) == expected

    @rule(pool=st.integers(0, 2))
    def another_pool_asks(self, pool: int) -> None:
        self.mortal.asking = self.mortal.pools[pool]

    @rule(order=st.randoms(use_true_random=False))
    def die(self, order: random.Random) -> None:
        self.mortal.die(order)

    @rule(seconds=WAITS)
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.loop.run_until_complete(self.immortal.wait(seconds))

    def teardown(self) -> None:
        for session in "abcd":
            self.load(session)
        self.loop.close()


DyingStore.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestDyingStore = DyingStore.TestCase


class LimitsMachine(RuleBasedStateMachine):
    """Limits hold whatever is done to the store."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.config = SessionConfig(ttl_s=20, turn_timeout_s=10, max_sessions=3, max_bytes=40)
        self.store = MemorySessionStore(self.config, self.clock)
        self.other = MemorySessionStore(SessionConfig(), self.clock)
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

    @rule(session=sessions, turn=turns, end=st.booleans())
    def release(self, session: str, turn: str, end: bool) -> None:
        self.store.release(session, turn, end=end)

    @rule(session=sessions)
    def end(self, session: str) -> None:
        try:
            self.store.end(session)
        except SessionNotFoundError:
            return

    @rule(session=sessions, new_session=sessions)
    def fork(self, session: str, new_session: str) -> None:
        try:
            self.store.fork(session, new_session)
        except (SessionBusyError, SessionNotFoundError):
            return
        self.check_limits()

    @rule(session=sessions, text=st.text("x", max_size=30))
    def restore(self, session: str, text: str) -> None:
        self.other.claim(session, 0, "z", start=True)
        self.store.restore([self.other.append(session, "z", [Message("user", text)], 0)])
        self.check_limits()

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def bytes_are_counted(self) -> None:
        sizes = [session.num_bytes for session in self.store._sessions.values()]
        assert self.store._num_bytes == sum(sizes)

    @invariant()
    def ends_are_bounded(self) -> None:
        assert len(self.store._ended) <= self.config.max_sessions
        assert not self.store._ended.keys() & self.store._sessions.keys()

    @invariant()
    def the_least_recent_is_first(self) -> None:
        used_at = [session.used_at for session in self.store._sessions.values()]
        assert used_at == sorted(used_at)

    def check_limits(self) -> None:
        """What exceeds the limits is in the middle of a turn."""
        within = (
            len(self.store._sessions) <= self.config.max_sessions and self.store._num_bytes <= self.config.max_bytes
        )
        assert within or all(self.store._busy(session) for session in self.store._sessions.values())


LimitsMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLimits = LimitsMachine.TestCase
