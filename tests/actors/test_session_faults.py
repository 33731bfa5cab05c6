"""Session stores that die."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import ray

from raylm.actors import redis_sessions, sessions
from raylm.actors.redis_sessions import RedisSessionStore
from raylm.actors.sessions import ActorSessionStore, SessionState, SessionStore, connect_store, start_store
from raylm.config import SessionConfig, SimulatedConfig
from raylm.conversation import Conversations
from raylm.engines.simulated import greedy_text
from raylm.errors import SessionBusyError, SessionError, SessionNotFoundError, SessionStoreError
from raylm.messages import GenerationConfig, Message, Request
from tests.actors.redis_server import RedisServer
from tests.actors.session_stores import ActorSessions, ClockedSessionActor, PatientSessionActor
from tests.conftest import StartPool

CONFIG = SessionConfig(turn_timeout_s=3600)


async def pid_of(actor: Any) -> int:
    """Return the process of an actor."""
    pid: int = await actor.__ray_call__.remote(lambda _: os.getpid())
    return pid


async def kill(actor: Any) -> None:
    """End the process of an actor, which Ray then starts again."""
    os.kill(await pid_of(actor), signal.SIGKILL)


async def until_restarted(pool: SessionStore) -> None:
    """Return when a pool has registered with the next life of a store that was killed."""
    assert isinstance(pool, ActorSessionStore)
    before = pool._life
    while pool._life == before:
        await asyncio.sleep(0.02)


async def registered(actor: Any, *pools: SessionStore) -> None:
    """Return when pools have registered with the next life of a store that was killed, which then answers."""
    await asyncio.gather(*map(until_restarted, pools))
    assert isinstance(pools[0], ActorSessionStore)
    await actor.open.remote(pools[0]._life)


Connect = Callable[[], SessionStore]


@pytest.fixture
def actor(cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An actor that keeps sessions. On a busy machine neither pools nor Ray are as fast as it is made for."""
    monkeypatch.setattr(sessions, "SessionActor", PatientSessionActor)
    monkeypatch.setattr(sessions, "_LOST_AFTER_S", 240)
    actor = start_store(CONFIG)
    yield actor
    ray.kill(actor)


@pytest.fixture
async def connect(actor: Any) -> AsyncIterator[Connect]:
    """Returns one more pool's connection to the actor."""
    async with AsyncExitStack() as stack:

        def connect() -> SessionStore:
            store = ActorSessionStore(actor, CONFIG)
            stack.push_async_callback(store.aclose)
            return store

        yield connect


async def turn(store: SessionStore, session_id: str, text: str, *, start: bool = False) -> list[str]:
    """Run one turn, which waits for another to end, and return the texts that it found."""
    while True:
        try:
            state = await store.claim(session_id, 0, text, start=start)
            break
        except SessionBusyError:
            await asyncio.sleep(0.01)
    await store.append(session_id, text, [Message("user", text)], state.slot)
    return texts(state)


def texts(state: SessionState) -> list[str]:
    """Return the texts of a session."""
    return [message.content for message in state.messages]


async def test_sessions_survive_between_turns(actor: Any, connect: Connect) -> None:
    """Sessions that several pools took turns in are whole after a death, whichever pool asks first."""
    pools = [connect() for _ in range(3)]
    for number in range(6):
        for session in range(5):
            await turn(pools[(number + session) % 3], f"s{session}", f"{number}", start=number == 0)
    await kill(actor)
    await registered(actor, *pools)
    states = await asyncio.gather(*(pools[session % 3].load(f"s{session}") for session in range(5)))
    assert [texts(state) for state in states] == [[f"{number}" for number in range(6)]] * 5
    assert await pools[0].num_sessions() == 5


async def test_a_pool_that_asks_nothing_registers(actor: Any, connect: Connect) -> None:
    """A claim right after a death sees the turn of another pool, which has asked for nothing since."""
    idle, asking = connect(), connect()
    await turn(asking, "s", "first", start=True)
    await turn(idle, "s", "second")
    await kill(actor)
    third = asyncio.create_task(turn(asking, "s", "third"))
    await registered(actor, idle, asking)
    assert await third == ["first", "second"]


async def test_no_claim_is_served_from_half_of_it(actor: Any, connect: Connect) -> None:
    """After a death a claim waits for pools that have not registered yet, and sees what they hold."""
    late, asking = connect(), connect()
    await turn(asking, "s", "first", start=True)
    await turn(late, "s", "second")
    assert isinstance(late, ActorSessionStore)
    async with late._registering:  # a pool whose loop is busy
        await kill(actor)
        claim = asyncio.create_task(turn(asking, "s", "third"))
        await until_restarted(asking)
        await asyncio.wait([claim], timeout=0.5)
        assert not claim.done()
    await registered(actor, late)
    assert await claim == ["first", "second"]


async def test_a_turn_survives(actor: Any, connect: Connect) -> None:
    """A turn that was running when the store died still holds its session, and its end is accepted."""
    mine, other = connect(), connect()
    await turn(other, "s", "first", start=True)
    await mine.claim("s", 0, "second", start=False)
    await kill(actor)
    await registered(actor, mine, other)
    with pytest.raises(SessionBusyError):
        await other.claim("s", 0, "third", start=False)
    await mine.append("s", "second", [Message("user", "second")], 0)
    assert await turn(other, "s", "third") == ["first", "second"]


async def test_an_ended_session_stays_ended(actor: Any, connect: Connect) -> None:
    """A session that one pool ended does not come back from another one's memory."""
    first, second = connect(), connect()
    for session in ("ended", "failed"):
        await turn(first, session, "one", start=True)
    await second.end("ended")
    await second.claim("failed", 0, "two", start=True)
    await second.release("failed", "two")
    await kill(actor)
    await registered(actor, first, second)
    for session in ("ended", "failed"):
        with pytest.raises(SessionNotFoundError):
            await first.claim(session, 0, "three", start=False)


async def test_a_second_death_is_survived(actor: Any, connect: Connect) -> None:
    """A store that dies again while pools register with it is whole again all the same."""
    pools = [connect() for _ in range(2)]
    for pool in pools:
        await turn(pool, "s", f"{pools.index(pool)}", start=pool is pools[0])
    await kill(actor)
    asking = asyncio.create_task(pools[0].load("s"))
    await until_restarted(pools[0])
    await kill(actor)
    await registered(actor, *pools)
    assert texts(await asking) == ["0", "1"]


async def test_no_turn_is_lost_or_doubled(actor: Any, connect: Connect) -> None:
    """Pools that take turns in the same sessions without a pause, through two deaths, leave each turn there once."""
    pools = [connect() for _ in range(3)]
    for session in range(8):
        await turn(pools[0], f"s{session}", "begin", start=True)
    ended = 0
    deaths = [60, 150]
    ready = [asyncio.Event() for _ in deaths]

    async def talk(pool: int, session: int) -> None:
        nonlocal ended
        for number in range(12):
            await turn(pools[pool], f"s{session}", f"{pool}-{number}")
            ended += 1
            for death, event in zip(deaths, ready, strict=True):
                if ended >= death:
                    event.set()

    async with asyncio.TaskGroup() as group:
        for pool in range(3):
            for session in range(8):
                group.create_task(talk(pool, session))
        for event in ready:
            await event.wait()
            await kill(actor)
            await registered(actor, *pools)
    for session in range(8):
        found = texts(await pools[session % 3].load(f"s{session}"))
        assert found[0] == "begin"
        for pool in range(3):
            mine = [text for text in found if text.startswith(f"{pool}-")]
            assert mine == [f"{pool}-{number}" for number in range(12)]
        assert len(found) == 37


async def test_a_large_memory_comes_back(actor: Any, connect: Connect) -> None:
    """A pool that holds more than fits into one call registers all of it before anybody is served."""
    mine, other = connect(), connect()
    text = "x" * 2**20
    for session in range(20):
        await turn(mine, f"s{session}", f"{session}{text}", start=True)
    await other.num_sessions()
    await kill(actor)
    await registered(actor, mine, other)
    assert await other.num_sessions() == 20
    assert texts(await other.load("s19")) == [f"19{text}"]


async def test_a_store_that_is_gone_for_good(actor: Any, connect: Connect) -> None:
    """An actor that Ray does not start again raises SessionStoreError, which may be tried again."""
    store = connect()
    await turn(store, "s", "one", start=True)
    ray.kill(actor)
    with pytest.raises(ray.exceptions.RayActorError):
        await actor.watch.remote(await actor.life.remote())  # until the kill is through
    with pytest.raises(SessionStoreError, match="gone") as raised:
        await store.load("s")
    assert (raised.value.status_code, raised.value.retryable) == (503, True)


async def test_answers_survive_the_store(start_pool: StartPool) -> None:
    """Streams that run when the store dies end with their whole answer, and the next turn knows it."""
    running = await start_pool(SimulatedConfig(tokens_per_s=200), SimulatedConfig(tokens_per_s=200))
    begun = asyncio.Barrier(7)

    def request(messages: tuple[Message, ...]) -> Request:
        config = GenerationConfig(max_new_tokens=150, temperature=0)
        return Request(request_id="turn", prompt=messages[-1].content, config=config)

    async def talk(session: str) -> None:
        for number in range(2):
            question = f"question {number} of {session}"
            async with running.conversations.turn(
                session, (Message("user", question),), request, start=number == 0, end=False
            ) as stream:
                await anext(stream)
                if number == 0:
                    await begun.wait()
                assert (await stream.completion()).text == greedy_text(question, 150)

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(talk(f"s{number}"))
        await begun.wait()
        await kill(running.manager.sessions)
    for number in range(6):
        messages = (await running.conversations.load(f"s{number}")).messages
        questions = [f"question {turn} of s{number}" for turn in range(2)]
        assert [message.content for message in messages] == [
            text for question in questions for text in (question, greedy_text(question, 150))
        ]


async def test_a_cancelled_claim_holds_nothing(actor: Any, connect: Connect, start_pool: StartPool) -> None:
    """A client that goes away while the store is being started again leaves no turn behind."""
    running = await start_pool(SimulatedConfig())
    store = connect()
    await turn(store, "s", "one", start=True)
    conversations = Conversations(running.pool, store, CONFIG.turn_timeout_s)
    await kill(actor)

    async def take_turn() -> None:
        async with conversations.turn(
            "s", (Message("user", "two"),), lambda _: Request(request_id="two"), start=False, end=False
        ):
            raise AssertionError

    task = asyncio.create_task(take_turn())
    await asyncio.sleep(0)  # to its claim
    await asyncio.sleep(0)
    task.cancel()
    await registered(actor, store)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert texts(await store.claim("s", 0, "three", start=False)) == ["one"]


async def test_long_turns_hold_their_sessions(start_pool: StartPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn holds its session for longer than `turn_timeout_s`, and a turn of a process that is gone does not."""
    running = await start_pool(SimulatedConfig())
    config = SessionConfig(turn_timeout_s=1000)  # of the store's own time, of which the test passes as much as it likes
    actor = ray.remote(ClockedSessionActor).options(num_cpus=0).remote(config)
    stored = ActorSessions(config, actor)
    mine, other = stored.connect(), stored.connect()
    await other.claim("gone", 0, "lost", start=True)
    conversations = Conversations(running.pool, mine, turn_timeout_s=1)
    renew, renewals = mine.renew, asyncio.Semaphore(0)

    async def counted(turns: Mapping[str, str]) -> None:
        await renew(turns)
        renewals.release()

    monkeypatch.setattr(mine, "renew", counted)

    def request(messages: tuple[Message, ...]) -> Request:
        return Request(request_id="turn", messages=messages, config=GenerationConfig(max_new_tokens=150))

    async with conversations.turn("s", (Message("user", "hi"),), request, start=True, end=False) as stream:
        for _ in range(3):
            await stored.wait(900)
            while not renewals.locked():
                await renewals.acquire()
            for _ in range(2):  # the first one may have been on its way
                await renewals.acquire()
            with pytest.raises(SessionBusyError):
                await other.claim("s", 0, "another", start=True)
        await stream.completion()
    assert len((await other.load("s")).messages) == 2
    await other.claim("gone", 0, "next", start=True)
    for store in (mine, other):
        await store.aclose()
    ray.kill(actor)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[RedisServer]:
    """A database of this test alone."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def stores(database: RedisServer) -> AsyncIterator[list[RedisSessionStore]]:
    """Three pools' connections to it."""
    stores = [RedisSessionStore(database.url, CONFIG, "raylm:test:") for _ in range(3)]
    yield stores
    for store in stores:
        await store.aclose()


async def test_redis_that_is_down_raises(
    database: RedisServer, stores: list[RedisSessionStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is down raises SessionStoreError, which may be tried again; sessions go on once it is back."""
    await turn(stores[0], "s", "one", start=True)
    await stores[0].claim("s", 0, "two", start=False)
    database.kill()
    with monkeypatch.context() as soon:
        soon.setattr(redis_sessions, "_GIVE_UP_S", 1)
        for operation in (stores[0].load("s"), stores[1].num_sessions(), stores[0].append("s", "two", [], 0)):
            with pytest.raises(SessionStoreError, match=f"127.0.0.1:{database.port}") as raised:
                await operation
            assert (raised.value.status_code, raised.value.retryable) == (503, True)
    database.start()
    await stores[0].append("s", "two", [Message("user", "two")], 0)
    assert await turn(stores[1], "s", "three") == ["one", "two"]


async def test_redis_that_hangs_raises(
    database: RedisServer, stores: list[RedisSessionStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that accepts connections and never answers raises SessionStoreError, too."""
    await turn(stores[0], "s", "one", start=True)
    database.signal(signal.SIGSTOP)
    try:
        with monkeypatch.context() as soon:
            soon.setattr(redis_sessions, "_GIVE_UP_S", 1)
            with pytest.raises(SessionStoreError):
                await stores[0].load("s")
    finally:
        database.signal(signal.SIGCONT)
    assert await turn(stores[0], "s", "two") == ["one"]


@pytest.mark.parametrize("user", ["", ":wrong@"])
async def test_a_wrong_password_raises(tmp_path: Path, user: str) -> None:
    """A database that asks for another password raises SessionStoreError that says so, without the password."""
    database = RedisServer(tmp_path, "--requirepass", "right")
    database.start()
    store = RedisSessionStore(database.url.replace("//", f"//{user}"), CONFIG, "raylm:test:")
    try:
        with pytest.raises(SessionStoreError, match="refuses") as raised:
            await store.num_sessions()
    finally:
        await store.aclose()
        database.kill()
    assert ":wrong@" not in str(raised.value)


@pytest.mark.parametrize("user", ["", "default@"])
async def test_the_password_may_be_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str
) -> None:
    """A process connects with the password of the variable, which no text shows, and says so where it has none."""
    database = RedisServer(tmp_path, "--requirepass", "p@ss:word/%20")
    database.start()
    variable = "RAYLM_TEST_PASSWORD"
    config = SessionConfig(url=database.url.replace("//", f"//{user}"), password_env=variable)
    try:
        with pytest.raises(SessionError, match=rf"{variable} .*which is not set in this process"):
            connect_store(config, None, "raylm:test:")
        monkeypatch.setenv(variable, "p@ss:word/%20")
        store = connect_store(config, None, "raylm:test:")
        assert await turn(store, "s", "one", start=True) == []
        assert await turn(store, "s", "two") == ["one"]
        assert "p@ss" not in repr(config) + config.model_dump_json() + repr(store)
        await store.aclose()
        monkeypatch.setenv(variable, "wrong-one")
        store = connect_store(config, None, "raylm:test:")
        with pytest.raises(SessionStoreError, match="refuses") as raised:
            await store.num_sessions()
        assert "wrong-one" not in str(raised.value)
        await store.aclose()
    finally:
        database.kill()


async def test_turns_wait_for_redis(database: RedisServer, stores: list[RedisSessionStore]) -> None:
    """Turns that run while the database is killed and started again end well, and each is there once."""
    ended = 0
    killed = asyncio.Event()

    async def talk(store: SessionStore, pool: int, session: int) -> None:
        nonlocal ended
        for number in range(10):
            await turn(store, f"s{session}", f"{pool}-{number}")
            ended += 1
            if ended == 50:
                killed.set()

    for session in range(4):
        await turn(stores[0], f"s{session}", "begin", start=True)
    async with asyncio.TaskGroup() as group:
        for pool, store in enumerate(stores):
            for session in range(4):
                group.create_task(talk(store, pool, session))
        await killed.wait()
        database.kill()
        await asyncio.to_thread(database.start)
    for session in range(4):
        found = texts(await stores[0].load(f"s{session}"))
        for pool in range(3):
            assert [text for text in found if text.startswith(f"{pool}-")] == [f"{pool}-{n}" for n in range(10)]
        assert len(found) == 31
