"""OpenVINOEngine: language models on CPU, the embedded default.

The model runs in a child process, `openvino_worker`, because its decode step would hold the GIL. A crash of the
library, or a broken model file on which it segfaults, is therefore an error here and not the end of this process. Token
ids become text on this side: the library's own detokenizer would cost the decode loop hundreds of microseconds a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import msgspec

from raylm.config import OpenVINOConfig
from raylm.engines.base import Emit
from raylm.engines.openvino_worker import (
    HEADER,
    Add,
    Cancel,
    Command,
    Failure,
    Load,
    Output,
    Ping,
    Pong,
    Ready,
    Report,
    Step,
    pack,
)
from raylm.engines.text import Detokenizer, StopWords, Vocabulary
from raylm.errors import ActorLostError, EngineError, EngineStartError, InvalidRequestError, from_message
from raylm.messages import Delta, EngineInfo, EngineStatistics, Request, Usage
from raylm.models import max_context, model_name, resolve

_ROLES = ("system", "user", "assistant", "tool")
_STDERR_BYTES = 4096  # of the child's last words, kept for error messages

_decode_report: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


class _Generation:
    """Turns the outputs of one request into deltas."""

    __slots__ = ("_detokenizer", "_emit", "_num_tokens", "_stop_words", "_unsent", "done")

    def __init__(self, request: Request, emit: Emit, vocabulary: Vocabulary, done: asyncio.Future[None]) -> None:
        generated = request.generated
        self.done = done
        self._emit = emit
        self._num_tokens = generated.num_tokens if generated else 0
        self._detokenizer = Detokenizer(vocabulary, text_start=not generated or bool(generated.token_ids))
        self._stop_words = StopWords(request.config.stop_words)
        self._unsent = ""
        if generated and generated.token_ids:
            # Brings back what the earlier attempts held: half a character, the beginning of a stop word.
            text, _ = self._stop_words.feed(self._detokenizer.feed(generated.token_ids))
            if not text.startswith(generated.text):
                raise InvalidRequestError(
                    "the token ids of `generated` do not spell its text; continue it with the model that began it, or "
                    "without token ids"
                )
            self._unsent = text[len(generated.text) :]

    def advance(self, output: Output) -> None:
        """Emit what the request produced in one step. The last delta ends `done`; nothing follows it."""
        if self.done.done():
            return
        if output.error is not None:
            self.done.set_exception(from_message(output.error))
            return
        self._num_tokens += len(output.token_ids)
        text, hit = self._stop_words.feed(self._detokenizer.feed(output.token_ids))
        delta = Delta(text, self._num_tokens, output.token_ids, output.logprobs)
        if self._unsent:
            delta.text = self._unsent + text
            self._unsent = ""
        if hit:
            delta.finish_reason = "stop"
        elif output.finish_reason is not None:
            delta.finish_reason = output.finish_reason
            delta.text += self._stop_words.flush()
        if delta.finish_reason is not None:
            delta.usage = Usage(output.prompt_tokens, self._num_tokens)
        try:
            self._emit(delta)
        except Exception as error:  # noqa: BLE001 - it belongs to the caller of this request, not to all of them
            self.done.set_exception(error)
            return
        if delta.finish_reason is not None:
            self.done.set_result(None)


class OpenVINOEngine:
    """Generates with OpenVINO GenAI and its continuous batching.

    `num_tokens`, `token_ids` and usage count every token that the model generated: the one that ended the sequence and
    those of a stop word are among them, though they have no text.

    A continued request arrives at the greedy text of an undisturbed one if the engine is `deterministic`. A sampled one
    goes on with other random numbers than it would have had.

    Args:
        config: Model and resources.

    Source: openvino-genai 2026.4, `ContinuousBatchingPipeline`.
    """

    def __init__(self, config: OpenVINOConfig) -> None:
        self._config = config
        self._keys = count()
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._vocabulary = Vocabulary({})
        # Why nothing can be asked of the engine now; None when it works. Raised as a copy.
        self._down: EngineError | None = EngineError("the engine has not started; call start first")
        # What the child works on. A request stays until the child has said that it is gone, even if its client left.
        self._generations: dict[int, _Generation] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._num_tokens = 0
        self._cache_usage = 0.0

    async def start(self) -> EngineInfo:
        """Load the model in a child process. See `engines.base.Engine.start`. After a failure it may be called again.

        Raises:
            EngineStartError: no such model, no openvino-genai, or OpenVINO cannot load the model in `start_timeout_s`.
        """
        config = self._config
        path = await asyncio.to_thread(resolve, config.path)
        context = await asyncio.to_thread(_context, path, config.max_context)
        load = Load(
            path=str(path),
            capacity=config.capacity,
            max_context=context,
            cache_size_gb=config.cache_size_gb,
            num_threads=config.num_threads,
            deterministic=config.deterministic,
            prefix_caching=config.prefix_caching,
        )
        try:
            async with asyncio.timeout(config.start_timeout_s):
                ready = await self._launch(load)
        except TimeoutError:
            await self._stop()
            raise EngineStartError(
                f"OpenVINO did not load {path} in {config.start_timeout_s:g} s; raise start_timeout_s, or take a "
                "smaller model"
            ) from None
        except BaseException:
            await self._stop()
            raise
        self._vocabulary = Vocabulary(ready.tokens)
        self._down = None
        return EngineInfo(
            engine="openvino",
            engine_version=ready.engine_version,
            model=config.model_name or model_name(config.path),
            max_context=context,
            capacity=config.capacity,
            device="CPU" if config.num_threads is None else f"CPU ({config.num_threads} threads)",
        )

    async def _launch(self, load: Load) -> Ready:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the parent's sys.path, below, is all there is to it
            "-m",
            "raylm.engines.openvino_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(os.environ),
        )
        self._ready = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(process))
        self._send(load)
        return await self._ready

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate one request. See `engines.base.Engine.generate`."""
        self._check_up()
        _check(request)
        key = next(self._keys)
        generation = _Generation(request, emit, self._vocabulary, asyncio.get_running_loop().create_future())
        try:
            self._send(Add(key, request))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"a text of the request is no valid Unicode: {error}; repair it") from None
        self._generations[key] = generation
        try:
            await generation.done
        finally:
            if key in self._generations:
                self._send(Cancel(key))

    async def check_health(self) -> None:
        """Return when the child has answered a ping, which it does between two decode steps.

        Raises:
            ActorLostError: the child is dead.
            EngineError: the engine has not started, or was closed.
        """
        self._check_up()
        key = next(self._keys)
        self._pings[key] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ping(key))
            await self._pings[key]
        finally:
            self._pings.pop(key, None)

    def statistics(self) -> EngineStatistics:
        """Return the load. An aborted request is running until the child has let go of it."""
        return EngineStatistics(
            num_running=len(self._generations), num_tokens=self._num_tokens, cache_usage=self._cache_usage
        )

    async def close(self) -> None:
        """End the child. Requests that are still running fail with EngineError."""
        self._fail(EngineError("the engine was closed; start another one"))
        await self._stop()

    def _check_up(self) -> None:
        if self._down is not None:
            raise _copy(self._down)

    def _send(self, command: Command) -> None:
        frame = pack(command)
        # Towards a child that is dead nothing needs sending: `_read` is about to fail whoever waits for an answer.
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(frame)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Handle what the child says, until it is dead."""
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise AssertionError("unreachable: all three are pipes")
        last_words = asyncio.create_task(_read_tail(process.stderr))
        try:
            while True:
                (length,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
                self._receive(_decode_report.decode(await process.stdout.readexactly(length)))
        except asyncio.IncompleteReadError:
            pass  # stdout is closed: the child is dead or dying
        finally:
            _kill(process)
            process.stdin.close()
            said = await last_words
            status = await process.wait()
            self._lose(f"the OpenVINO process ended with {_describe(status)}", said)

    def _receive(self, report: Report) -> None:
        match report:
            case Step(outputs, cache_usage):
                self._cache_usage = cache_usage
                for output in outputs:
                    self._num_tokens += len(output.token_ids)
                    if (generation := self._generations.get(output.key)) is None:
                        continue  # the engine is being closed
                    if output.finish_reason is not None or output.error is not None:
                        del self._generations[output.key]
                    generation.advance(output)
            case Pong(key):
                if (ping := self._pings.get(key)) is not None and not ping.done():
                    ping.set_result(None)
            case Ready():
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(report)
            case Failure(error):
                if self._ready is not None and not self._ready.done():
                    self._ready.set_exception(from_message(error))

    def _lose(self, what: str, said: str) -> None:
        """Tell everybody who waits that the child is dead."""
        last_words = f". Its last words:\n{said}" if said else ""
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                EngineStartError(
                    f"{what} while it loaded the model; check that the file is complete, and that there is memory for "
                    f"it and for cache_size_gb{last_words}"
                )
            )
        if self._down is None:
            self._fail(
                ActorLostError(
                    f"{what}; its actor is replaced. If this goes on, give it more memory, or lower cache_size_gb and "
                    f"capacity{last_words}"
                )
            )

    def _fail(self, error: EngineError) -> None:
        """Refuse all work from now on, and end what runs."""
        self._down = error
        for waiter in [*(generation.done for generation in self._generations.values()), *self._pings.values()]:
            if not waiter.done():
                waiter.set_exception(_copy(error))
        self._generations.clear()

    async def _stop(self) -> None:
        """Kill the child and wait until nothing of it is left."""
        if self._process is not None:
            _kill(self._process)
        if self._reading is not None:
            await asyncio.wait([self._reading])


def _context(path: Path, limit: int | None) -> int:
    """Return the smaller of the model's own context and `limit`."""
    try:
        own = max_context(path)
    except EngineStartError:
        if limit is None:
            raise
        return limit
    return own if limit is None else min(own, limit)


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` for a child that shall find the modules that this process finds."""
    return {**environment, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}


def _check(request: Request) -> None:
    """Raise InvalidRequestError for what the chat templates of the library would pass over in silence."""
    if request.messages is None:
        if not request.prompt:
            raise InvalidRequestError("the prompt is empty; send some text")
        return
    if not request.messages:
        raise InvalidRequestError("messages is empty; send at least one")
    for message in request.messages:
        if message.role not in _ROLES:
            raise InvalidRequestError(
                f"unknown role {message.role!r}; the model's own chat template knows {', '.join(_ROLES)}, and a "
                "meta_template can define others"
            )


def _copy(error: EngineError) -> EngineError:
    # An exception that several tasks raise would collect the tracebacks of all of them.
    return type(error)(error.message)


def _kill(process: asyncio.subprocess.Process) -> None:
    # It holds nothing worth an orderly end. Not `process.kill`: that polls the child, and if it has just died takes the
    # exit status away from the event loop, which then reports a made-up one (CPython 3.11 to 3.14).
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _describe(status: int) -> str:
    return f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


async def _read_tail(stream: asyncio.StreamReader) -> str:
    """Return the last lines of `stream` when it has ended."""
    tail = b""
    while chunk := await stream.read(1 << 16):
        tail = (tail + chunk)[-_STDERR_BYTES:]
    return tail.decode(errors="replace").strip()
