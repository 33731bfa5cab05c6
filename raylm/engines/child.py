"""An engine whose model runs in a child process: the parent's half, and what the two halves say to each other.

A library that generates holds the GIL, takes the event loop for itself, or crashes. In a child of its own it does that
to nobody else: the parent answers at once, a crash is an error with the child's last words, a start that hangs is
killed and tried again in a fresh process, and closing leaves nothing behind. Token ids become text on the parent's
side, so they cost the decode loop nothing.

Frames are a length (4 bytes, big-endian) and that many bytes of msgpack: commands on the child's stdin, reports on what
was its stdout when it started. The first command tells the child what to load and is its own kind of struct. The parent
ends the child by killing it, and the parent's own death does too (`start_child`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import struct
import sys
from collections import deque
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import psutil

from raylm.engines.base import Emit
from raylm.engines.text import Detokenizer, StopWords, Vocabulary
from raylm.errors import (
    ActorLostError,
    EngineError,
    EngineStartError,
    ErrorMessage,
    InvalidRequestError,
    from_message,
)
from raylm.messages import Candidates, Delta, Details, EngineStatistics, FinishReason, Request, Usage
from raylm.parent import end_with_parent

HEADER = struct.Struct(">I")

_ROLES = ("system", "user", "assistant", "tool")
_STDERR_BYTES = 4096  # of the child's last words, kept for error messages

_DYING_S = 1.0

_THREADS = "OMP_NUM_THREADS"

_log = logging.getLogger(__name__)


class Add(msgspec.Struct, tag=True):
    """Work on a request. Its last `Output`, and no other, has a finish reason or an error."""

    key: int
    request: Request


class Cancel(msgspec.Struct, tag=True):
    """Abort a request. Its last `Output` says that it is gone; one that has finished is passed over."""

    key: int


class Ping(msgspec.Struct, tag=True):
    """Answer with a `Pong` when the engine can work."""

    key: int


class Tokenize(msgspec.Struct, tag=True):
    """Answer with `Tokens`: those of a request's prompt."""

    key: int
    request: Request


class Ready(msgspec.Struct, tag=True):
    """The model is loaded.

    Attributes:
        engine_version: Version of the library.
        tokens: Token by id, as `Vocabulary` takes it: without special tokens.
        max_context: Prompt and generated tokens together, at most.
        capacity: How many requests it works on at a time.
    """

    engine_version: str
    tokens: dict[int, bytes]
    max_context: int
    capacity: int


class Failure(msgspec.Struct, tag=True):
    """The model cannot be loaded, and another attempt would fail as well; the process ends."""

    error: ErrorMessage


Ranked = tuple[tuple[int, float], ...]
"""The likeliest tokens at one place, the likeliest first: id and log-probability of each."""


class Extra(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What `messages.Details` tells, with ids for texts.

    Attributes:
        top_logprobs: For each of the output's `token_ids`.
        prompt_token_ids: The prompt's; in the first output of a request with `echo` that continues nothing.
        prompt_logprobs: Of each of them, if asked for; that of the first is 0.0.
        prompt_top_logprobs: For each of them, if asked for; none for the first.
    """

    top_logprobs: tuple[Ranked, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[Ranked, ...] = ()


class Output(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one request produced.

    Attributes:
        key: The request's.
        prompt_tokens: Tokens of the prompt, without those of continued attempts.
        token_ids: New tokens, the one that ended the sequence included.
        logprobs: Log-probability of each of `token_ids`, if asked for.
        finish_reason: Set when the request is no longer in the engine.
        error: Set instead of `finish_reason` when it failed.
        num_silent: How many tokens at the end of `token_ids` have no text: the one that ended the sequence may be an
            ordinary token.
        cached_tokens: Prompt tokens that the prefix cache held; None where the engine does not tell.
        extra: What else there is to tell of tokens, if asked for.
    """

    key: int
    prompt_tokens: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    error: ErrorMessage | None = None
    num_silent: int = 0
    cached_tokens: int | None = None
    extra: Extra | None = None


class Step(msgspec.Struct, tag=True):
    """What requests produced since the last one.

    Attributes:
        outputs: One a request that has something to say.
        cache_usage: Share of the KV cache in use, 0 to 1.
    """

    outputs: list[Output]
    cache_usage: float


class Pong(msgspec.Struct, tag=True):
    """The answer to the `Ping` of that key."""

    key: int


class Tokens(msgspec.Struct, tag=True):
    """The answer to the `Tokenize` of that key. The error is set instead of the tokens when there are none."""

    key: int
    token_ids: tuple[int, ...] = ()
    error: ErrorMessage | None = None


Command = Add | Cancel | Ping | Tokenize
Report = Ready | Failure | Step | Pong | Tokens

_encode = msgspec.msgpack.Encoder().encode
_decode_report: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def pack(message: msgspec.Struct) -> bytes:
    """Return the frame of a command or report.

    Raises:
        UnicodeEncodeError: a text in it is no valid Unicode.
    """
    body = _encode(message)
    return HEADER.pack(len(body)) + body


class Frames:
    """Cuts what comes in, in whatever pieces, into the bodies of frames."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, chunk: bytes) -> list[bytearray]:
        """Take a piece, and return the bodies that are whole with it."""
        received = self._received
        received += chunk
        bodies, start = [], 0
        while (body := start + HEADER.size) <= len(received):
            end = body + HEADER.unpack_from(received, start)[0]
            if end > len(received):
                break
            bodies.append(received[body:end])
            start = end
        del received[:start]
        return bodies


def first_body(descriptor: int) -> bytearray:
    """Wait for the first command on a file descriptor, behind which the parent sends nothing until it is answered.

    Raises:
        EOFError: the parent is gone.
    """
    frames = Frames()
    while chunk := os.read(descriptor, 1 << 20):
        if bodies := frames.feed(chunk):
            (body,) = bodies
            return body
    raise EOFError


def start_child() -> BinaryIO:
    """Make this process a child as `ChildProcess` expects one, and return the file for its reports.

    Its first argument is the parent's process id.
    """
    # Ctrl-C reaches the whole terminal; whether it ends this process is the parent's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(int(sys.argv[1]))
    # What a library prints on stdout goes to stderr, for it would break the frames.
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return reports


class _Generation:
    """Turns the outputs of one request into deltas.

    A delta ends where the text of an output ends, and has no tokens whose text is held back: half a character, the
    beginning of a stop word. So an engine that is told the text alone goes on at the right token.
    """

    __slots__ = (
        "_detokenizer", "_emit", "_kept", "_num_emitted", "_num_fed", "_num_tokens", "_speller", "_stop_words", "_text",
        "done",
    )  # fmt: skip

    def __init__(self, request: Request, emit: Emit, vocabulary: Vocabulary, done: asyncio.Future[None]) -> None:
        generated = request.generated
        self.done = done
        self._emit = emit
        self._num_tokens = generated.num_tokens if generated else 0
        self._detokenizer = Detokenizer(vocabulary, text_start=not generated or bool(generated.token_ids))
        self._stop_words = StopWords(request.config.stop_words)
        self._speller = vocabulary if request.config.logprobs or request.config.echo else None  # of `Delta.details`
        self._kept: deque[tuple[float, Delta]] = deque()  # not emitted: where the text of each ends, and its tokens
        self._num_fed = 0  # characters
        self._text = ""  # of them, what the stop words have let go of, and is not emitted
        self._num_emitted = 0
        if generated and generated.token_ids:
            text = self._detokenizer.feed(generated.token_ids)
            rest = text[len(generated.text) :]  # where the ids are those of more than was shown
            self._num_fed = len(rest)
            self._text, _ = self._stop_words.feed(rest)

    def advance(self, output: Output) -> None:
        """Emit what the request produced in one step. The last delta ends `done`; nothing follows it."""
        if self.done.done():
            return
        if output.error is not None:
            self.done.set_exception(from_message(output.error))
            return
        self._num_tokens += len(output.token_ids)
        shown = output.token_ids[: -output.num_silent] if output.num_silent else output.token_ids
        fed = self._detokenizer.feed(shown)
        text, hit = self._stop_words.feed(fed)
        self._num_fed += len(fed)
        self._text += text
        came = Delta("", self._num_tokens, output.token_ids, output.logprobs)
        if self._speller is not None:
            came.details = _details(self._speller, output)
        # Tokens that end within a character have no text of their own without those that complete it.
        end = math.inf if self._detokenizer.holds else self._num_fed
        if self._kept and self._kept[-1][0] == math.inf:
            _, earlier = self._kept.pop()
            earlier.extend(came)
            came = earlier
        self._kept.append((end, came))
        finish_reason: FinishReason | None = "stop" if hit else output.finish_reason
        delta = self._shown(last=finish_reason is not None)
        if delta is None:
            return
        if finish_reason is not None:
            delta.finish_reason = finish_reason
            delta.text += self._stop_words.flush()
            delta.usage = Usage(output.prompt_tokens, self._num_tokens, output.cached_tokens)
        try:
            self._emit(delta)
        except Exception as error:  # noqa: BLE001 - it belongs to the caller of this request, not to all of them
            self.done.set_exception(error)
            return
        if delta.finish_reason is not None:
            self.done.set_result(None)

    def _shown(self, *, last: bool) -> Delta | None:
        """Return what may be shown: up to the end of an output, or all of it if it is the last. None: nothing."""
        kept, until = self._kept, self._num_emitted + len(self._text)
        if not last and kept[0][0] > until:
            return None
        end, delta = kept.popleft()
        while kept and (last or kept[0][0] <= until):
            end, later = kept.popleft()
            delta.extend(later)
        length = len(self._text) if last else int(end) - self._num_emitted
        delta.text, self._text = self._text[:length], self._text[length:]
        self._num_emitted += length
        return delta


def _details(vocabulary: Vocabulary, output: Output) -> Details:
    """Return what an output tells beyond its text."""
    spell = vocabulary.spell
    extra = output.extra or Extra()

    def spelled(places: tuple[Ranked, ...]) -> tuple[Candidates, ...]:
        return tuple(tuple((spell(token_id), logprob) for token_id, logprob in ranked) for ranked in places)

    return Details(
        tuple(map(spell, output.token_ids)),
        spelled(extra.top_logprobs),
        extra.prompt_token_ids,
        tuple(map(spell, extra.prompt_token_ids)),
        extra.prompt_logprobs,
        spelled(extra.prompt_top_logprobs),
    )


class ChildProcess:
    """Starts the child, hands it requests, and turns its reports into deltas. The rules are those of `Engine`.

    Args:
        module: What the child runs, as `python -m module`.
        library: The library in it, for people.
        advice: What its user may do when the child dies, for people: "give it more memory".
    """

    def __init__(self, module: str, library: str, advice: str) -> None:
        self._module = module
        self._library = library
        self._advice = advice
        self._keys = count()
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        # The report on loading, or what became of the child instead.
        self._ready: asyncio.Future[Ready | str] | None = None
        self._vocabulary = Vocabulary({})
        # Why nothing can be asked of the engine now; None when it works. Raised as a copy.
        self._down: EngineError | None = EngineError("the engine has not started; call start first")
        # What the child works on. A request stays until the child has said that it is gone, even if its client left.
        self._generations: dict[int, _Generation] = {}
        self._questions: dict[int, asyncio.Future[tuple[int, ...]]] = {}  # pings are answered with nothing
        self._num_tokens = 0
        self._cache_usage = 0.0

    async def start(self, load: msgspec.Struct, *, timeout_s: float, attempts: int = 1) -> Ready:
        """Start a child and let it load. After a failure this may be called again.

        Args:
            load: The first command.
            timeout_s: Limit on one attempt; the child is then killed.
            attempts: Children that may die or hang before the start has failed.

        Raises:
            EngineStartError: the child said why it cannot load, or all attempts are used up.
        """
        for attempt in range(1, attempts + 1):
            try:
                outcome = await self._attempt(load, timeout_s)
            except BaseException:
                await self._stop()
                raise
            if isinstance(outcome, Ready):
                self._vocabulary = Vocabulary(outcome.tokens)
                self._down = None
                return outcome
            await self._stop()
            _log.warning("attempt %d of %d to start %s failed: %s", attempt, attempts, self._library, outcome)
        tries = f" in {attempts} attempts" if attempts > 1 else ""
        raise EngineStartError(f"{self._library} did not start{tries}: {outcome}")

    async def _attempt(self, load: msgspec.Struct, timeout_s: float) -> Ready | str:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._launch(load)
        except TimeoutError:
            return f"it did not load the model in {timeout_s:g} s; raise start_timeout_s, or take a smaller model"

    async def _launch(self, load: msgspec.Struct) -> Ready | str:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the parent's sys.path, below, is all there is to it
            "-m",
            self._module,
            str(os.getpid()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(),
            start_new_session=True,  # a group of its own, to be killed with whatever the library starts
        )
        self._ready = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(process))
        self._send(load)
        return await self._ready

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate one request. See `engines.base.Engine.generate`."""
        self._check_up()
        _check(request)
        request = _in_own_tokens(request, self._vocabulary)
        key = next(self._keys)
        generation = _Generation(request, emit, self._vocabulary, asyncio.get_running_loop().create_future())
        self._send(Add(key, request))
        self._generations[key] = generation
        try:
            await generation.done
        finally:
            if key in self._generations:
                self._send(Cancel(key))

    async def check_health(self) -> None:
        """Return when the child has answered a ping.

        Raises:
            ActorLostError: the child is dead.
            EngineError: the engine has not started, or was closed.
        """
        self._check_up()
        await self._ask(Ping(next(self._keys)))

    async def tokenize(self, request: Request) -> tuple[int, ...]:
        """Return the prompt's tokens. See `engines.base.Engine.tokenize`."""
        self._check_up()
        _check(request)
        return await self._ask(Tokenize(next(self._keys), request))

    async def _ask(self, command: Ping | Tokenize) -> tuple[int, ...]:
        self._questions[command.key] = asyncio.get_running_loop().create_future()
        try:
            self._send(command)
            return await self._questions[command.key]
        finally:
            del self._questions[command.key]

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

    def _send(self, command: msgspec.Struct) -> None:
        try:
            frame = pack(command)
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"a text of the request is no valid Unicode: {error}; repair it") from None
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
            # Its stdout is closed, so the child is dead or dying. How it ends by itself is worth a moment.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DYING_S):
                    await process.wait()
        finally:
            _kill(process)
            process.stdin.close()
            said = await last_words
            status = await process.wait()
            self._lose(_describe(status), f". Its last words:\n{said}" if said else "")

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
                if (question := self._questions.get(key)) is not None and not question.done():
                    question.set_result(())
            case Tokens(key, token_ids, error):
                if (question := self._questions.get(key)) is None or question.done():
                    return
                if error is None:
                    question.set_result(token_ids)
                else:
                    question.set_exception(from_message(error))
            case Ready():
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(report)
            case Failure(error):
                if self._ready is not None and not self._ready.done():
                    self._ready.set_exception(from_message(error))

    def _lose(self, ended: str, last_words: str) -> None:
        """Tell everybody who waits that the child is dead."""
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(
                f"its process ended with {ended} while it loaded the model; check that the model is complete, and "
                f"{self._advice}{last_words}"
            )
        if self._down is None:
            self._fail(
                ActorLostError(
                    f"the {self._library} process ended with {ended}; its actor is replaced. If this goes on, "
                    f"{self._advice}{last_words}"
                )
            )

    def _fail(self, error: EngineError) -> None:
        """Refuse all work from now on, and end what runs."""
        self._down = error
        waiters: list[asyncio.Future[Any]] = [generation.done for generation in self._generations.values()]
        for waiter in [*waiters, *self._questions.values()]:
            if not waiter.done():
                waiter.set_exception(_copy(error))
        self._generations.clear()

    async def _stop(self) -> None:
        """Kill the child and wait until nothing of it is left."""
        if self._process is not None:
            _kill(self._process)
        if self._reading is not None:
            await asyncio.wait([self._reading])


def child_environment() -> dict[str, str]:
    """Return the environment of a child that shall find the modules that this process finds, and as many cores.

    In its workers Ray sets OMP_NUM_THREADS to their number of CPUs, one for most actors, where nobody else has set it.
    An engine's libraries would compute with one thread (`ray._private.utils.set_omp_num_threads_if_unset`).
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)}
    if _THREADS not in psutil.Process().environ():  # with which this process was started
        environment.pop(_THREADS, None)
    return environment


def _check(request: Request) -> None:
    """Raise InvalidRequestError for what the chat templates of the libraries would pass over in silence."""
    if request.messages is None:
        if not (request.prompt or request.prompt_token_ids):
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
        if message.name is not None:
            raise InvalidRequestError(
                f"messages: the model's own chat template takes no name, and one has {message.name!r}; leave it out, "
                "or write it into the content"
            )


def _in_own_tokens(request: Request, vocabulary: Vocabulary) -> Request:
    """Return a request that has token ids of earlier attempts only where they spell the text of those.

    Otherwise another model of the pool has generated them, and the text alone is continued.
    """
    generated = request.generated
    if not generated or Detokenizer(vocabulary).feed(generated.token_ids).startswith(generated.text):
        return request
    return msgspec.structs.replace(request, generated=msgspec.structs.replace(generated, token_ids=[]))


def _copy(error: EngineError) -> EngineError:
    # An exception that several tasks raise would collect the tracebacks of all of them.
    return type(error)(error.message)


def _kill(process: asyncio.subprocess.Process) -> None:
    # It holds nothing worth an orderly end. Not `process.kill`: that polls the child, and if it has just died takes the
    # exit status away from the event loop, which then reports a made-up one (CPython 3.11 to 3.14).
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _describe(status: int) -> str:
    return f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


async def _read_tail(stream: asyncio.StreamReader) -> str:
    """Return the last lines of `stream` when it has ended."""
    tail = b""
    while chunk := await stream.read(1 << 16):
        tail = (tail + chunk)[-_STDERR_BYTES:]
    return tail.decode(errors="replace").strip()
