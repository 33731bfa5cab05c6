"""How the child process of the lmdeploy engine behaves when lmdeploy does not. An object stands in for it."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from raylm.engines.child import HEADER, Add, Cancel, Output, Ready, Report, Step, pack
from raylm.engines.lmdeploy_worker import Worker
from tests.engines.conftest import make_request

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

PROMPT_IDS = (504, 2644, 2643)


class StandIn:
    """What a worker uses of lmdeploy's `AsyncEngine`. It generates two tokens, and scores prompts.

    Attributes:
        reason: Why it ends what it generates.
        raises: What a method of that name raises, `generate` after the first token.
    """

    def __init__(self, folder: str) -> None:
        from lmdeploy.tokenizer import Tokenizer

        self.tokenizer = Tokenizer(folder)
        self.backend = "pytorch"
        self.backend_config = SimpleNamespace(max_batch_size=4)
        self.session_len = 64
        self.hf_cfg = SimpleNamespace(bos_token_id=1)
        self.hf_gen_cfg: dict[str, object] = {}
        self.stop_words = None
        self.engine = SimpleNamespace(max_session_len=64, get_schedule_metrics=self.measure)
        self.session_mgr = SimpleNamespace(get=lambda: SimpleNamespace(async_abort=self.abort))
        self.reason: str | None = "length"
        self.raises: dict[str, Exception] = {}
        self.calls: list[str] = []
        self.scoring, self.may_end = asyncio.Event(), asyncio.Event()

    def start_loop(self, *_: object, **__: object) -> None:
        """Do nothing."""

    def measure(self) -> Any:
        """Return the load."""
        return SimpleNamespace(cache_usage=0.5)

    async def abort(self) -> None:
        """Be too late: all has been generated."""
        self.calls.append("abort")
        self.may_end.set()

    async def health_probe(self, _: float) -> dict[str, str]:
        """Say that all is well."""
        return {"status": "healthy"}

    async def preprocess(self, *_: object, gen_config: Any, **__: object) -> Any:
        """Hand on what is to be generated."""
        if error := self.raises.get("preprocess"):
            raise error
        return gen_config

    async def generate(self, config: Any) -> AsyncIterator[Any]:
        """Score, or generate."""
        nothing = {"token_ids": (), "cached_tokens": 0, "finish_reason": None, "logprobs": None}
        if config.logprob_start_len == 0:
            self.calls.append("score")
            self.scoring.set()
            await self.may_end.wait()
            rows = [{token_id: -1.0} for token_id in PROMPT_IDS[1:]]
            yield SimpleNamespace(**nothing | {"logprobs": rows, "finish_reason": "length"})
        else:
            self.calls.append("generate")
            yield SimpleNamespace(**nothing | {"token_ids": (19,), "logprobs": [{19: -1.0}]})
            await asyncio.sleep(0)  # in which the worker reports the first token
            if error := self.raises.get("generate"):
                raise error
            last = {"token_ids": (19,), "logprobs": [{19: -1.0}], "finish_reason": self.reason}
            yield SimpleNamespace(**nothing | last)


class Conversation:
    """A worker at work on a stand-in, and the parent's ends of its pipes."""

    def __init__(self, engine: StandIn) -> None:
        commands, self._to_worker = os.pipe()
        from_worker, reports = os.pipe()
        self._reports, self._to_parent = os.fdopen(from_worker, "rb"), os.fdopen(reports, "wb")
        self._serving = asyncio.create_task(Worker(engine, self._to_parent).serve(commands))

    async def end(self) -> None:
        """Cancel the worker. The pipe of its commands stays open: when that ends, a worker ends its process."""
        self._serving.cancel()
        await asyncio.wait([self._serving])
        self._to_parent.close()
        self._reports.close()

    def send(self, *commands: msgspec.Struct) -> None:
        """Send commands, all in one piece."""
        os.write(self._to_worker, b"".join(map(pack, commands)))

    async def receive(self) -> Report:
        """Return the next report."""

        def read() -> Report:
            (length,) = HEADER.unpack(self._reports.read(HEADER.size))
            report: Report = msgspec.msgpack.decode(self._reports.read(length), type=Report)
            return report

        return await asyncio.to_thread(read)

    async def last(self, key: int) -> Output:
        """Return the last output of a request."""
        while True:
            report = await self.receive()
            for output in report.outputs if isinstance(report, Step) else ():
                if output.key == key and (output.finish_reason or output.error):
                    return output

    async def ends(self, key: int) -> str | None:
        """Return the finish reason of a request."""
        return (await self.last(key)).finish_reason

    async def fails(self, key: int) -> tuple[str, str]:
        """Return the error that a request ends with, its class and its text."""
        last = await self.last(key)
        assert last.finish_reason is None
        assert last.error is not None
        return last.error.type, last.error.message


@pytest.fixture
async def engine(model_folder: str) -> StandIn:
    """The stand-in."""
    return StandIn(model_folder)


async def start(engine: StandIn) -> Conversation:
    """Return a worker that has started. Its thread reads on until the tests are over."""
    conversation = Conversation(engine)
    assert isinstance(await conversation.receive(), Ready)
    return conversation


async def test_cancel_while_the_prompt_is_scored(engine: StandIn) -> None:
    """A request that is cancelled while its prompt is scored is not generated, though the score was about to come."""
    conversation = await start(engine)
    conversation.send(Add(1, make_request(PROMPT_IDS, max_new_tokens=2, logprobs=True, echo=True)))
    await engine.scoring.wait()
    conversation.send(Cancel(1))
    assert await conversation.ends(1) == "cancelled"
    assert engine.calls == ["score", "abort"]
    await conversation.end()


async def test_cancel_beside_the_request(engine: StandIn) -> None:
    """A request that is cancelled before anything was done about it is answered all the same."""
    conversation = await start(engine)
    conversation.send(Add(1, make_request(PROMPT_IDS, max_new_tokens=2)), Cancel(1))
    assert await conversation.ends(1) == "cancelled"
    await conversation.end()


@pytest.mark.parametrize(
    ("reason", "limit", "says"),
    [
        ("error", 2, "with error"),
        ("abort", 2, "with abort"),
        (None, 2, "no reason"),
        ("length", 3, "after 2 tokens where 3 were asked for"),
    ],
)
async def test_bad_end(engine: StandIn, reason: str | None, limit: int, says: str) -> None:
    """An answer that lmdeploy ends for no good reason, or too early, is an error of its request."""
    engine.reason = reason
    conversation = await start(engine)
    conversation.send(Add(1, make_request(PROMPT_IDS, max_new_tokens=limit)))
    kind, message = await conversation.fails(1)
    assert kind == "EngineError"
    assert says in message
    await conversation.end()


@pytest.mark.parametrize("method", ["preprocess", "generate"])
@pytest.mark.parametrize(
    ("code", "kind"), [("CONTEXT_LENGTH_EXCEEDED", "ContextLengthError"), ("INTERNAL_ERROR", "EngineError")]
)
async def test_error_of_lmdeploys(engine: StandIn, method: str, code: str, kind: str) -> None:
    """An error that lmdeploy raises is that of its code, with lmdeploy's words, wherever it raises it."""
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    engine.raises[method] = RequestError(ErrorCode[code], "this is why")
    conversation = await start(engine)
    conversation.send(Add(1, make_request(PROMPT_IDS, max_new_tokens=2)))
    assert await conversation.fails(1) == (kind, "lmdeploy: this is why")
    await conversation.end()


async def test_load_that_cannot_be_told(engine: StandIn) -> None:
    """What was generated is reported though the engine fails to tell its load."""

    def fail() -> Any:
        raise ConnectionError("no answer")

    engine.engine.get_schedule_metrics = fail
    conversation = await start(engine)
    for key in (1, 2):
        conversation.send(Add(key, make_request(PROMPT_IDS, max_new_tokens=2)))
        assert await conversation.ends(key) == "length"
    await conversation.end()


def die(folder: str) -> None:
    """Be a worker whose engine's health cannot be found out, with a thread that does not end."""
    from raylm.engines import lmdeploy_worker

    threading.Thread(target=threading.Event().wait).start()

    def build(_: object) -> StandIn:
        engine = StandIn(folder)

        async def fail(_: float) -> dict[str, str]:
            raise ConnectionError("no answer")

        engine.health_probe = fail  # type: ignore[method-assign]
        return engine

    lmdeploy_worker.build_engine = build
    lmdeploy_worker.main()


async def test_unforeseen_error(model_folder: str) -> None:
    """An error that nobody handles ends the process, whatever threads there are, and is its last word."""
    from raylm.engines.lmdeploy_worker import Load

    command = [
        sys.executable,
        "-c",
        f"from tests.lmdeploy.test_worker import die; die({model_folder!r})",
        str(os.getpid()),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(pack(Load("", "pytorch", "cpu", {}, {})))
    try:
        async with asyncio.timeout(240):
            said = await process.stderr.read()
    finally:
        if process.returncode is None:
            process.kill()
    assert b"ConnectionError: no answer" in said
    # 255 says that somebody else in this process, such as Ray, has waited for it before.
    assert await process.wait() in (1, 255)
