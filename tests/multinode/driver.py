"""A program on the head of a rig, which does what it is told over stdin.

    async with Driver.on(rig) as driver:
        await driver.ask("serve", engines=[...])
        await driver.ask("crowd", size=64, num_tokens=350)

An order is a line of JSON with the name of a method of `_Program`, and so is its answer. Several may be on their way.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray
import ray.exceptions
from pydantic import TypeAdapter
from ray._private import state

from raylm.actors.cluster import actor_record, connect, nodes
from raylm.actors.manager import NAMESPACE, PoolManager
from raylm.actors.manager_actor import end, find, serve
from raylm.config import EngineConfig, ModelConfig, PoolConfig, SessionConfig
from raylm.engines.simulated import greedy_text, prompt_text
from raylm.errors import RaylmError, SessionBusyError
from raylm.link import Link, PollReply
from raylm.messages import GenerationConfig, Message, Request
from raylm.operate import scale, states
from raylm.pool import Pool
from raylm.served import ServedPool
from raylm.stream import Stream
from tests.multinode.rig import Rig

MODEL = "sim"

_END_TIMEOUT_S = 180.0
_SETTLED_TIMEOUT_S = 200.0
_LINE_BYTES = 1 << 24


class OrderError(Exception):
    """An order failed in the program.

    Attributes:
        kind: Name of the error's class there.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Driver:
    """The program, from outside."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._orders = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    @asynccontextmanager
    async def on(cls, rig: Rig) -> AsyncIterator[Driver]:
        """Start it on the head, connected to the cluster; it ends with the block."""
        process = await asyncio.create_subprocess_exec(
            *rig.on_head([sys.executable, "-m", "tests.multinode.driver"]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**rig.environment, "RAY_ADDRESS": rig.address},
            limit=_LINE_BYTES,
        )
        driver = cls(process)
        try:
            await driver.ask("hello")
            yield driver
        finally:
            await driver._close()

    async def ask(self, order: str, **arguments: Any) -> Any:
        """Have the program do something; return what it answers.

        Raises:
            OrderError: it failed there, or the program has ended.
        """
        return await self.begin(order, **arguments)

    def begin(self, order: str, **arguments: Any) -> asyncio.Future[Any]:
        """Have it do something meanwhile."""
        number = next(self._orders)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        if self._reading.done():
            answer.set_exception(OrderError("Ended", "the program has ended"))
        else:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([number, order, arguments]).encode() + b"\n")
        return answer

    async def ended(self) -> int:
        """Wait for the program's end; return its exit code."""
        return await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if not line.startswith(b"["):
                continue
            number, answer, error = json.loads(line)
            waiting = self._waiting.pop(number)
            if waiting.done():
                continue
            if error is None:
                waiting.set_result(answer)
            else:
                waiting.set_exception(OrderError(*error))
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(OrderError("Ended", "the program has ended"))

    async def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading
        for waiting in self._waiting.values():
            if waiting.done():
                waiting.exception()  # nobody asks for it any more


class _Session:
    """A session, beside what its transcript should be."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.transcript: list[Message] = []


class _Answer:
    """One answer that is on its way, and what it should be."""

    def __init__(self, expected: str, stream: Stream | None = None) -> None:
        self.expected = expected
        self.stream = stream
        self.text = ""
        self.live = asyncio.Event()
        self.error = ""
        self.why = ""
        self.slot = -1
        self.silence_s = 0.0

    async def read(self, stream: Stream) -> None:
        heard_at = time.monotonic()
        async for delta in stream:
            now = time.monotonic()
            if delta.text:
                if self.live.is_set():
                    self.silence_s = max(self.silence_s, now - heard_at)
                heard_at = now
                self.text += delta.text
                self.live.set()
        assert stream.receipt is not None
        self.why, self.slot = stream.receipt.why, stream.receipt.slot

    async def run(self, work: Callable[[_Answer], Awaitable[None]]) -> None:
        """Do the work of it, and take down how that ends."""
        try:
            await work(self)
        except RaylmError as error:
            self.error = f"{type(error).__name__}: {error}"
        else:
            if self.text != self.expected:
                self.error = f"not the right text: {self.text!r} instead of {self.expected!r}"
        finally:
            self.live.set()


class _Program:
    """What the program can do."""

    def __init__(self) -> None:
        self._served: ServedPool | None = None
        self._managers: list[PoolManager] = []
        self._pools: list[Pool] = []
        self._sessions: list[_Session] = []
        self._answers: list[_Answer] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stale: Counter[int] = Counter()

    async def hello(self) -> None:
        """Do nothing."""

    async def serve(self, engines: list[dict[str, Any]], **settings: Any) -> None:
        """Serve a model, and join its pools."""
        await serve(_model(engines, settings))
        self._served = await ServedPool.open(MODEL)
        await self._served.ready()

    async def update(self, engines: list[dict[str, Any]], **settings: Any) -> None:
        """Have the model's actors replaced by others."""
        await serve(_model(engines, settings), time.time_ns())

    async def scale(self, replicas: int) -> None:
        """Have the model consist of so many actors."""
        await scale(MODEL, replicas)

    async def settled(self, replicas: int, model_name: str = "simulated") -> int:
        """Wait until the model has so many actors, all up and of that name, here and at its manager.

        Return how few were up here meanwhile.
        """
        deadline, fewest = time.monotonic() + _SETTLED_TIMEOUT_S, replicas
        while True:
            (found,) = await states()
            slots = [(slot.slot, slot.state, slot.model) for slot in found.slots]
            fewest = min(fewest, self._pool.num_up)
            if slots == [(number, "up", model_name) for number in self._pool.slots] and len(slots) == replicas:
                return fewest
            if time.monotonic() > deadline:
                here = self._pool.statistics().slots
                raise AssertionError(f"not settled on {len(await self.alive())} nodes: here {here}, there {found}")
            await asyncio.sleep(0.2)

    async def own(self, engines: list[dict[str, Any]], placement_timeout_s: float | None = None) -> int:
        """Start actors of this program's own, and a pool on them; return its number."""
        configs = TypeAdapter(list[EngineConfig]).validate_python(engines)
        manager = await PoolManager.start(configs, SessionConfig(), placement_timeout_s=placement_timeout_s)
        self._managers.append(manager)
        pool = Pool(PoolConfig(), replace=manager.replace)
        self._pools.append(pool)
        await asyncio.gather(*(pool.attach(slot, actor) for slot, actor in manager.actors.items()))
        return len(self._pools) - 1

    async def answer(self, size: int, num_tokens: int = 20, pool: int | None = None) -> None:
        """Run requests to their end; fail where one is not answered as it should be."""
        where = self._pool if pool is None else self._pools[pool]
        results = await where.generate_many([_ask(f"answer {number}", num_tokens) for number in range(size)])
        for number, result in enumerate(results):
            if isinstance(result, RaylmError):
                raise result
            assert result.text == greedy_text(f"answer {number}", num_tokens)

    async def crowd(self, size: int, num_tokens: int) -> None:
        """Start streams, a third of them turns of sessions; return when all are live."""
        self._sessions = [_Session(f"session {number}") for number in range(size // 3 if self._served else 0)]
        await asyncio.gather(*(self._say(session, "hello", 5) for session in self._sessions))
        self._answers = []
        for session in self._sessions:
            self._begin(self._turn(session, "tell me more", num_tokens))
        for number in range(size - len(self._sessions)):
            self._begin(self._single(f"single {number}", num_tokens))
        await asyncio.gather(*(answer.live.wait() for answer in self._answers))
        early = [answer.error for answer in self._answers if answer.error or answer.text == answer.expected]
        assert not early, f"over before all others were live: {early}"

    async def finish(self) -> dict[str, Any]:
        """Wait for all streams, run one more turn of each session, and return what has come of them all."""
        outcome = await self.finish_streams()
        if not outcome["failed"]:
            await asyncio.gather(*(self._say(session, "and then?", 5) for session in self._sessions))
            for session in self._sessions:
                await self._check_owner(session)
                await self._model.conversations.end(session.name)
        return outcome

    async def finish_streams(self) -> dict[str, Any]:
        """Wait for all streams, and return what has come of them."""
        await asyncio.gather(*self._tasks)
        failed = [answer.error for answer in self._answers if answer.error]
        moves = Counter(answer.why for answer in self._answers if answer.why.startswith("moved"))
        return {
            "right": len(self._answers) - len(failed),
            "failed": failed,
            "moves": dict(moves),
            "stale_deltas": self._stale.total(),
            "longest_silence_s": round(max(answer.silence_s for answer in self._answers), 2),
        }

    async def slots(self) -> list[dict[str, Any]]:
        """Return state, process and node of each slot's actor, and how many requests it has."""
        found = []
        for slot in self._pool.statistics().slots:
            about = await asyncio.to_thread(state.actors, slot.actor) if slot.actor else {}
            node = about.get("Address", {}).get("NodeID", "")
            found.append({"state": slot.state, "pid": slot.pid, "node": node, "num_running": slot.num_running})
        return found

    async def up(self, gone: Sequence[int] = ()) -> list[dict[str, Any]]:
        """Wait until every slot is up, with other processes than those that are gone; return what `slots` does."""
        while True:
            found = await self.slots()
            if all(slot["state"] == "up" and slot["pid"] not in gone for slot in found):
                return found
            await asyncio.sleep(0.1)

    async def lost(self, pids: Sequence[int]) -> int:
        """Wait until one of these processes is in no slot any more; return it."""
        while True:
            living = {slot.pid for slot in self._pool.statistics().slots if slot.state != "down"}
            for pid in pids:
                if pid not in living:
                    return pid
            await asyncio.sleep(0.01)

    async def running(self, at_least: int) -> None:
        """Wait until so many requests are in the engines and have got tokens."""
        while True:
            live = [
                stream for link in self._pool._links.values() for stream in link.streams.values() if stream.num_tokens
            ]
            if len(live) >= at_least:
                return
            await asyncio.sleep(0.02)

    async def close_pool(self, number: int) -> None:
        """End a pool of this program's own, and its actors."""
        await self._pools[number].aclose()
        await self._managers[number].aclose()

    async def move_manager(self, node: str) -> None:
        """Have Ray start the manager's process again until it is on a node."""
        while True:
            manager = await asyncio.to_thread(find, MODEL)
            await manager.__ray_ready__.remote()
            if (await self.where())["manager"] == node:
                await manager.config.remote()
                return
            ray.kill(manager, no_restart=False)
            with suppress(ray.exceptions.RayActorError):
                while True:  # until it is dead
                    await manager.__ray_ready__.remote()
                    await asyncio.sleep(0.05)
            await self._until_answers(manager)

    async def _until_answers(self, actor: Any) -> None:
        while True:
            try:
                await actor.__ray_ready__.remote()
            except ray.exceptions.RayActorError:
                await asyncio.sleep(0.1)
            else:
                return

    async def where(self) -> dict[str, str]:
        """Return the nodes of the manager and of the session store."""
        return await asyncio.to_thread(_where)

    async def alive(self) -> list[str]:
        """Return the ids of the nodes that Ray takes for alive."""
        return [node.id for node in await asyncio.to_thread(nodes)]

    async def until_dead(self, node: str) -> None:
        """Wait until Ray takes a node for dead."""
        while node in await self.alive():
            await asyncio.sleep(0.1)

    async def accounts(self, num_gpus: int) -> None:
        """Wait until so many GPUs are taken, and the others are free."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        while True:
            found = await asyncio.to_thread(nodes)
            total = sum(node.num_gpus for node in found)
            held = sum(node.held.get("GPU", 0) for node in found)
            free = (await asyncio.to_thread(ray.available_resources)).get("GPU", 0)
            if held == num_gpus and free == total - num_gpus:
                return
            assert time.monotonic() < deadline, f"{held} of {total} GPUs are taken, {free} are free, not {num_gpus}"
            await asyncio.sleep(0.2)

    async def end(self) -> None:
        """End everything that was started here, and see that it has given back what it had."""
        if self._served is not None:
            await self._served.aclose()
            await end(MODEL)
            self._served = None
        for pool in self._pools:
            await pool.aclose()
        for manager in self._managers:
            await manager.aclose()
        self._pools, self._managers = [], []
        await self.accounts(0)

    def observe(self) -> None:
        """Count the deltas that belong to attempts which were given up."""
        original, stale = Link.on_reply, self._stale

        def on_reply(link: Link, reply: PollReply) -> None:
            stale[link.number] += sum(key not in link.streams for key in reply.keys)
            original(link, reply)

        Link.on_reply = on_reply  # type: ignore[method-assign]

    @property
    def _model(self) -> ServedPool:
        assert self._served is not None
        return self._served

    @property
    def _pool(self) -> Pool:
        return self._model.pool if self._served is not None else self._pools[-1]

    def _begin(self, what: tuple[_Answer, Callable[[_Answer], Awaitable[None]]]) -> None:
        answer, work = what
        self._answers.append(answer)
        self._tasks.append(asyncio.create_task(answer.run(work)))

    def _single(self, prompt: str, num_tokens: int) -> tuple[_Answer, Callable[[_Answer], Awaitable[None]]]:
        async def work(answer: _Answer) -> None:
            async with self._pool.stream(_ask(prompt, num_tokens)) as stream:
                await answer.read(stream)

        return _Answer(greedy_text(prompt, num_tokens)), work

    def _turn(
        self, session: _Session, text: str, num_tokens: int
    ) -> tuple[_Answer, Callable[[_Answer], Awaitable[None]]]:
        question = Message("user", text)
        asked = (*session.transcript, question)
        start = not session.transcript

        def make(transcript: tuple[Message, ...]) -> Request:
            name = f"{session.name} {len(transcript)}"
            return Request(request_id=name, messages=transcript, config=_config(num_tokens))

        async def work(answer: _Answer) -> None:
            async with self._model.conversations.turn(
                session.name, (question,), make, start=start, end=False
            ) as stream:
                transcript = stream.request.messages
                assert transcript == asked, f"{session.name}: {transcript} is not {asked}"
                await answer.read(stream)
            session.transcript += [question, Message("assistant", answer.text)]

        return _Answer(greedy_text(prompt_text(Request(request_id="", messages=asked)), num_tokens)), work

    async def _say(self, session: _Session, text: str, num_tokens: int) -> _Answer:
        """Run a turn, which has to go right."""
        while True:
            answer, work = self._turn(session, text, num_tokens)
            try:
                await work(answer)
            except SessionBusyError:
                await asyncio.sleep(0.1)
                continue
            assert answer.text == answer.expected, f"{session.name}: {answer.text!r}, not {answer.expected!r}"
            return answer

    async def _check_owner(self, session: _Session) -> None:
        """See that the store has every word of a session, and the slot that answered last as its only owner."""
        answer = await self._say(session, "who are you?", 3)
        stored = await self._model.conversations.load(session.name)
        assert list(stored.messages) == session.transcript, session.name
        assert stored.slot == answer.slot == self._pool.router.pinned(session.name), session.name


def _model(engines: list[dict[str, Any]], settings: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate({"name": MODEL, "engines": engines, **settings})


def _ask(prompt: str, num_tokens: int) -> Request:
    return Request(request_id=prompt, prompt=prompt, config=_config(num_tokens))


def _config(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=num_tokens, temperature=0)


def _where() -> dict[str, str]:
    found = {}
    for part in ("manager", "sessions"):
        actor = ray.get_actor(f"{MODEL}:{part}", namespace=NAMESPACE)
        found[part] = actor_record(actor)["Address"]["NodeID"]
    return found


async def _main() -> None:
    await asyncio.to_thread(connect, os.environ["RAY_ADDRESS"])
    program = _Program()
    program.observe()
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=_LINE_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    tasks: set[asyncio.Task[None]] = set()

    async def do(number: int, order: str, arguments: dict[str, Any]) -> None:
        answer, error = None, None
        try:
            answer = await getattr(program, order)(**arguments)
        except Exception as raised:  # noqa: BLE001  (the test is told of it)
            error = [type(raised).__name__, str(raised)]
        print(json.dumps([number, answer, error]), flush=True)

    async for line in orders:
        task = asyncio.create_task(do(*json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(_main())
