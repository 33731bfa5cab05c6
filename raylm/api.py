"""The seed's classes: thin faces on a `Pool`.

`AsyncLMDeployPipeline` is the whole of it; `LMDeployPipeline` runs one on an event loop of its own and waits.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import socket
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import msgspec
import ray
import uvloop
from ray._private.services import canonicalize_bootstrap_address

from raylm.actors.manager import PoolManager, nodes
from raylm.config import Backend, EngineConfig, OpenVINOConfig, PoolConfig, SessionConfig
from raylm.conversation import Conversations
from raylm.errors import (
    ContextLengthError,
    EngineStartError,
    InvalidRequestError,
    NoActorError,
    PartialFailureError,
    PlacementError,
    RaylmError,
    SessionNotFoundError,
)
from raylm.messages import Completion, GenerationConfig, Message, Request, Status
from raylm.models import model_name as short_name
from raylm.pool import Pool, PoolStatistics
from raylm.stream import Stream
from raylm.template import MetaTemplate, parse_messages

Conversation = Sequence[Mapping[str, str] | Message]
T = TypeVar("T")

_OBJECT_STORE_BYTES = 128 * 1024**2  # of a local cluster; raylm keeps nothing in Ray's object store
_CONNECT_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)
_said: set[str] = set()


class AsyncLMDeployPipeline:
    """A model on the actors of a Ray cluster, for asyncio programs.

    Use as an async context manager, or call `start` and `aclose`. Attaches to the Ray cluster of `address`, of
    `RAY_ADDRESS`, or one that runs on this machine, and starts a local one where there is none.

    Args:
        path: Model: a built-in alias (`smollm2-135m-instruct`), a local file or folder, or a hub id.
        model_name: Name in receipts; None takes it from `path`.
        tp: GPUs of one replica. Must be 1 for an engine on CPU.
        replicas: Actors that serve the model.
        backend: `turbomind`, `pytorch`, `openvino`, or `auto`, which is openvino where the cluster has no GPU.
        meta_template: How messages become a prompt, in lagent's form (see `raylm.template`); None uses the model's own
            chat template.
        max_new_tokens: Limit on generated tokens, >= 1.
        top_p: In (0, 1]; nucleus of probability mass to sample from.
        top_k: >= 1; how many of the likeliest tokens to sample from. None: no limit.
        temperature: >= 0; 0 is greedy decoding.
        repetition_penalty: > 0; 1.0 is none.
        stop_words: Text or texts that end the generation and are not part of it.
        backend_config: Further settings of the engine; a sequence has one for each replica. Its `path` and `model_name`
            are replaced by the arguments. A `SimulatedConfig` needs no model.
        address: Address of the Ray cluster; `local` starts one for this pipeline whatever else runs.
        pool_config: Limits and bounds of the pool.
        session_config: Limits of the session store.

    Raises:
        InvalidRequestError: a parameter is out of range.
    """

    def __init__(
        self,
        path: str,
        model_name: str | None = None,
        tp: int = 1,
        replicas: int = 1,
        backend: Backend = "auto",
        meta_template: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 512,
        top_p: float = 0.8,
        top_k: int | None = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        stop_words: str | Sequence[str] | None = None,
        *,
        backend_config: EngineConfig | Sequence[EngineConfig] | None = None,
        address: str | None = None,
        pool_config: PoolConfig | None = None,
        session_config: SessionConfig | None = None,
    ) -> None:
        self.path = path
        self.model_name = model_name
        self.tp = tp
        self.replicas = replicas
        self.backend = backend
        self._config = GenerationConfig().updated(
            {
                "max_new_tokens": max_new_tokens,
                "top_p": top_p,
                "top_k": top_k,
                "temperature": temperature,
                "repetition_penalty": repetition_penalty,
                "stop_words": stop_words,
            }
        )
        if not isinstance(path, str) or not path:
            raise InvalidRequestError(f"path: expected the name or place of a model, got {path!r}")
        if replicas < 1 or tp < 1:
            raise InvalidRequestError(f"replicas and tp must be at least 1, got {replicas} and {tp}")
        self._template = None if meta_template is None else MetaTemplate.parse(meta_template)
        self._backend_config = backend_config
        self._address = address
        self._pool_config = pool_config
        self._session_config = session_config or SessionConfig()
        self._owns_ray = False
        self._manager: PoolManager | None = None
        self._pool: Pool | None = None
        self._conversations: Conversations | None = None

    async def start(self) -> Self:
        """Connect to Ray, create the actors and load the model in each.

        Raises:
            PlacementError: there is no cluster at the address, or it cannot hold the actors.
            EngineStartError: the engine did not start; the text says what to do.
        """
        if not ray.is_initialized():
            self._owns_ray = await asyncio.to_thread(_connect, self._address)
        try:
            self._manager = await PoolManager.start(self._engines(), self._session_config)
            self._pool = Pool(self._pool_config, replace=self._manager.replace)
            ready = [self._pool.attach(slot, actor) for slot, actor in enumerate(self._manager.actors)]
            await asyncio.gather(*ready)
        except BaseException:
            await self.aclose()
            raise
        self._conversations = Conversations(self._pool, self._manager.sessions)
        return self

    async def aclose(self) -> None:
        """End the actors and, where this pipeline started Ray, Ray. Requests still running fail."""
        if self._pool is not None:
            await self._pool.aclose()
        if self._manager is not None:
            await self._manager.aclose()
            self._manager = None
        if self._owns_ray:
            self._owns_ray = False
            await asyncio.to_thread(ray.shutdown)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def pool(self) -> Pool:
        """The pool behind this pipeline.

        Raises:
            NoActorError: it has not been started.
        """
        if self._pool is None:
            raise NoActorError("the pipeline has not been started; use it in `async with`, or await its start()")
        return self._pool

    @overload
    async def generate(self, inputs: str, *, return_dict: Literal[False] = False, **overrides: Any) -> str: ...
    @overload
    async def generate(
        self, inputs: Sequence[str], *, return_dict: Literal[False] = False, **overrides: Any
    ) -> list[str]: ...
    @overload
    async def generate(self, inputs: str, *, return_dict: Literal[True], **overrides: Any) -> dict[str, Any]: ...
    @overload
    async def generate(
        self, inputs: Sequence[str], *, return_dict: Literal[True], **overrides: Any
    ) -> list[dict[str, Any]]: ...
    async def generate(self, inputs: str | Sequence[str], *, return_dict: bool = False, **overrides: Any) -> Any:
        """Continue raw prompts; no template is applied.

        Args:
            inputs: A prompt, or a list of them.
            return_dict: Return dicts of `text`, `finish_reason`, `usage`, `receipt` and, where the engine tells them,
                `token_ids` and `logprobs`.
            overrides: Any generation parameter (`raylm.messages.GenerationConfig`) for this call alone.

        Returns:
            The text, or a list of texts in the order of the prompts.

        Raises:
            InvalidRequestError: an unknown or wrong parameter, or an empty prompt.
            PartialFailureError: some prompts of a list failed; its `results` holds every answer and every error.
            RaylmError: the one prompt failed.
        """
        config = self._config.updated(overrides)
        single = isinstance(inputs, str)
        prompts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(prompts, Sequence):
            raise InvalidRequestError(f"inputs: expected a string or a list of strings, got {type(inputs).__name__}")
        requests = [_raw_request(prompt, config, f"inputs[{index}]") for index, prompt in enumerate(prompts)]
        return await self._answer(requests, single=single, return_dict=return_dict)

    async def chat(
        self,
        inputs: Conversation | Sequence[Conversation],
        *,
        return_dict: bool = False,
        **overrides: Any,
    ) -> Any:
        """Answer conversations: apply the template, then generate.

        Args:
            inputs: A list of messages (dicts of `role` and `content`), or a list of such lists.
            return_dict: As in `generate`.
            overrides: As in `generate`.

        Returns:
            The answer, or a list of answers in the order of the conversations.

        Raises:
            InvalidRequestError: an unknown role, wrong types, or an unknown or wrong parameter.
            PartialFailureError: as in `generate`.
            RaylmError: the one conversation failed.
        """
        config = self._config.updated(overrides)
        many = isinstance(inputs, list | tuple) and bool(inputs) and isinstance(inputs[0], list | tuple)
        conversations = inputs if many else [inputs]
        requests = [self._chat_request(parse_messages(messages), config) for messages in conversations]
        return await self._answer(requests, single=not many, return_dict=return_dict)

    async def stream_chat(
        self,
        inputs: Conversation | Mapping[str, str] | str,
        *,
        session_id: int | str | None = None,
        request_id: str | None = None,
        sequence_start: bool = True,
        sequence_end: bool = True,
        timeout: float | None = None,
        **overrides: Any,
    ) -> AsyncGenerator[tuple[Status, str, int], None]:
        """Answer one turn of a conversation, token by token.

        Args:
            inputs: The messages of this turn: a list of dicts, one dict, or the user's words.
            session_id: The session. None is for a conversation of one turn: `sequence_start` and `sequence_end` True.
            request_id: Name of this turn in logs and receipts.
            sequence_start: Begin the session, in place of one of that id. Otherwise it goes on after its earlier turns.
            sequence_end: Forget the session when the turn is over.
            timeout: Limit on waiting and generation together, in seconds. None: no limit.
            overrides: As in `generate`.

        Yields:
            `(status, text, n_tokens)`: `Status.STREAM_ING` with all of the text so far and the number of tokens it
            took, and `Status.END` with the whole. `Status.SESSION_CLOSED` alone when there is no such session, and
            `Status.SESSION_OUT_OF_LIMIT` alone when the transcript has outgrown the model's context.

        Raises:
            InvalidRequestError: an unknown role, wrong types, or an unknown or wrong parameter.
            SessionBusyError: another turn of this session is running.
            RaylmError: the turn failed; the session is as it was before it.
        """
        config = self._config.updated(overrides)
        messages = parse_messages(_as_messages(inputs))
        self._check_roles(messages)
        try:
            async with self._turn(
                messages, config, session_id, request_id, start=sequence_start, end=sequence_end, timeout_s=timeout
            ) as stream:
                parts = ""
                async for delta in stream:
                    parts += delta.text
                    yield Status.STREAM_ING, parts, delta.num_tokens
            # After the block, which adds the turn to the session: a caller may leave at END.
            yield Status.END, parts, stream.num_tokens
        except SessionNotFoundError:
            yield Status.SESSION_CLOSED, "", 0
        except ContextLengthError:
            yield Status.SESSION_OUT_OF_LIMIT, "", 0

    async def end_session(self, session_id: int | str) -> None:
        """Forget a session.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        await self._sessions().end(str(session_id))

    async def history(self, session_id: int | str) -> list[dict[str, str]]:
        """Return a session's messages so far.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        return [
            {"role": message.role, "content": message.content}
            for message in await self._sessions().load(str(session_id))
        ]

    def request(self, *, prompt: object = None, messages: object = None, **overrides: Any) -> Request:
        """Return the request of one prompt or one conversation, to give to `pool`.

        Args:
            prompt: Raw text; no template is applied.
            messages: A conversation, in place of `prompt`. The template is applied.
            overrides: As in `generate`.

        Raises:
            InvalidRequestError: both or neither of `prompt` and `messages`, an unknown role, wrong types, or an unknown
                or wrong parameter.
        """
        if (prompt is None) == (messages is None):
            raise InvalidRequestError("give either prompt or messages")
        config = self._config.updated(overrides)
        if messages is None:
            return _raw_request(prompt, config, "prompt")
        return self._chat_request(parse_messages(messages), config)

    def statistics(self) -> PoolStatistics:
        """Return counts and loads at this moment."""
        return self.pool.statistics()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r} on {self._pool!r}>"

    def _engines(self) -> list[EngineConfig]:
        given = self._backend_config
        if given is None:
            given = self._pick()
        configs = list(given) if isinstance(given, Sequence) else [given] * self.replicas
        if len(configs) != self.replicas:
            raise InvalidRequestError(f"backend_config has {len(configs)} entries for {self.replicas} replicas")
        if self.tp != 1:
            raise InvalidRequestError(f"tp={self.tp} spreads a model over GPUs; an engine on CPU takes tp=1")
        cpus = min((node.num_cpus for node in nodes()), default=1)
        threads = max(1, int(cpus * len(nodes())) // self.replicas)
        return [
            config.model_copy(
                update={
                    "path": self.path,
                    "model_name": self.model_name or short_name(self.path),
                    "num_threads": config.num_threads or min(threads, int(cpus)),
                }
            )
            if isinstance(config, OpenVINOConfig)
            else config
            for config in configs
        ]

    def _pick(self) -> EngineConfig:
        backend = self.backend
        if backend == "auto":
            if any(node.num_gpus for node in nodes()):
                backend = "turbomind"
            else:
                backend = "openvino"
                _say_once("the cluster has no GPU: backend 'auto' is openvino, on CPU")
        if backend == "openvino":
            return OpenVINOConfig()
        if backend in ("turbomind", "pytorch"):
            raise EngineStartError(
                f"backend {backend!r} needs the lmdeploy extra, which this version cannot use yet: "
                "pip install 'raylm[lmdeploy]'. On CPU, use backend='openvino'"
            )
        raise InvalidRequestError(f"backend: expected auto, turbomind, pytorch or openvino, got {backend!r}")

    def _chat_request(
        self, messages: tuple[Message, ...], config: GenerationConfig, request_id: str | None = None
    ) -> Request:
        request_id = uuid.uuid4().hex if request_id is None else _checked(request_id, "request_id")
        if self._template is None:
            return Request(request_id=request_id, messages=messages, config=config)
        return Request(request_id=request_id, prompt=self._template.render(messages), config=config)

    def _check_roles(self, messages: tuple[Message, ...]) -> None:
        if self._template is not None:
            self._template.render(messages)

    def _sessions(self) -> Conversations:
        if self._conversations is None:
            raise NoActorError("the pipeline has not been started; use it in `async with`, or await its start()")
        return self._conversations

    @asynccontextmanager
    async def _turn(
        self,
        messages: tuple[Message, ...],
        config: GenerationConfig,
        session_id: int | str | None,
        request_id: str | None,
        *,
        start: bool,
        end: bool,
        timeout_s: float | None,
    ) -> AsyncIterator[Stream]:
        if session_id is None:
            if not (start and end):
                raise InvalidRequestError("session_id: a conversation of several turns needs one")
            request = self._chat_request(messages, config, request_id)
            async with self.pool.stream(request, timeout_s=timeout_s) as stream:
                yield stream
            return
        async with self._sessions().turn(
            str(session_id),
            messages,
            lambda transcript: self._chat_request(transcript, config, request_id),
            start=start,
            end=end,
            timeout_s=timeout_s,
        ) as stream:
            yield stream

    async def _answer(self, requests: list[Request], *, single: bool, return_dict: bool) -> Any:
        if single:
            return _shown(await self.pool.generate(requests[0]), return_dict=return_dict)
        results = await self.pool.generate_many(requests)
        completions = [result for result in results if isinstance(result, Completion)]
        if len(completions) < len(results):
            raise PartialFailureError(results)
        return [_shown(completion, return_dict=return_dict) for completion in completions]


class LMDeployPipeline:
    """A model on the actors of a Ray cluster.

    The same as `AsyncLMDeployPipeline`, arguments and errors included, for programs without an event loop. It is ready
    when the constructor returns. Use it in `with`, or call `close`.
    """

    def __init__(
        self,
        path: str,
        model_name: str | None = None,
        tp: int = 1,
        replicas: int = 1,
        backend: Backend = "auto",
        meta_template: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 512,
        top_p: float = 0.8,
        top_k: int | None = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        stop_words: str | Sequence[str] | None = None,
        *,
        backend_config: EngineConfig | Sequence[EngineConfig] | None = None,
        address: str | None = None,
        pool_config: PoolConfig | None = None,
        session_config: SessionConfig | None = None,
    ) -> None:
        self._pipeline = AsyncLMDeployPipeline(
            path,
            model_name,
            tp,
            replicas,
            backend,
            meta_template,
            max_new_tokens,
            top_p,
            top_k,
            temperature,
            repetition_penalty,
            stop_words,
            backend_config=backend_config,
            address=address,
            pool_config=pool_config,
            session_config=session_config,
        )
        # Here and not in the loop's thread: Ray sets its signal handlers only in the main one.
        self._pipeline._owns_ray = _connect(address)
        self._loop = _LoopThread()
        try:
            self._loop.run(self._pipeline.start())
        except BaseException:
            self._loop.close()
            raise
        atexit.register(self.close)

    @overload
    def generate(self, inputs: str, *, return_dict: Literal[False] = False, **overrides: Any) -> str: ...
    @overload
    def generate(
        self, inputs: Sequence[str], *, return_dict: Literal[False] = False, **overrides: Any
    ) -> list[str]: ...
    @overload
    def generate(self, inputs: str, *, return_dict: Literal[True], **overrides: Any) -> dict[str, Any]: ...
    @overload
    def generate(
        self, inputs: Sequence[str], *, return_dict: Literal[True], **overrides: Any
    ) -> list[dict[str, Any]]: ...
    def generate(self, inputs: str | Sequence[str], *, return_dict: bool = False, **overrides: Any) -> Any:
        """Continue raw prompts. See `AsyncLMDeployPipeline.generate`."""
        return self._run(self._pipeline.generate(inputs, return_dict=return_dict, **overrides))  # type: ignore[call-overload]

    def chat(
        self, inputs: Conversation | Sequence[Conversation], *, return_dict: bool = False, **overrides: Any
    ) -> Any:
        """Answer conversations. See `AsyncLMDeployPipeline.chat`."""
        return self._run(self._pipeline.chat(inputs, return_dict=return_dict, **overrides))

    def stream_chat(
        self,
        inputs: Conversation | Mapping[str, str] | str,
        *,
        session_id: int | str | None = None,
        request_id: str | None = None,
        sequence_start: bool = True,
        sequence_end: bool = True,
        timeout: float | None = None,
        **overrides: Any,
    ) -> Generator[tuple[Status, str, int], None, None]:
        """Answer one turn of a conversation, token by token. See `AsyncLMDeployPipeline.stream_chat`."""
        steps = self._pipeline.stream_chat(
            inputs,
            session_id=session_id,
            request_id=request_id,
            sequence_start=sequence_start,
            sequence_end=sequence_end,
            timeout=timeout,
            **overrides,
        )
        try:
            while True:
                try:
                    yield self._run(anext(steps))
                except StopAsyncIteration:
                    return
        finally:
            self._run(steps.aclose())

    def end_session(self, session_id: int | str) -> None:
        """Forget a session. See `AsyncLMDeployPipeline.end_session`."""
        self._run(self._pipeline.end_session(session_id))

    def history(self, session_id: int | str) -> list[dict[str, str]]:
        """Return a session's messages so far. See `AsyncLMDeployPipeline.history`."""
        return self._run(self._pipeline.history(session_id))

    def statistics(self) -> PoolStatistics:
        """Return counts and loads at this moment."""
        return self._pipeline.statistics()

    def close(self) -> None:
        """End the actors and, where this pipeline started Ray, Ray. May be called twice."""
        atexit.unregister(self.close)
        if self._loop.running:
            self._loop.run(self._pipeline.aclose())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._pipeline).replace("Async", "", 1)

    def _run(self, work: Awaitable[T]) -> T:
        if not self._loop.running:
            if isinstance(work, Coroutine):
                work.close()
            raise NoActorError("the pipeline was closed; make a new one")
        return self._loop.run(work)


class _LoopThread:
    """An event loop in a thread of its own. It is uvloop's, as in Ray's actors: a token costs a third less on it."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="raylm", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return not self._loop.is_closed()

    def run(self, work: Awaitable[T]) -> T:
        """Await something to its end. An interrupt of the waiting thread cancels it, and waits for its clean-up."""
        tasks: list[asyncio.Task[T]] = []
        ended = threading.Event()

        async def wait() -> T:
            return await work

        def start() -> None:
            tasks.append(self._loop.create_task(wait()))
            tasks[0].add_done_callback(lambda _: ended.set())

        self._loop.call_soon_threadsafe(start)
        try:
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            ended.wait()
            raise
        return tasks[0].result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


def _connect(address: str | None) -> bool:
    """Connect this process to Ray; return False where it was connected already.

    Without an address that is the cluster of `RAY_ADDRESS`, or the one that `ray start` started on this machine. It is
    not one that another program has started for itself, for that ends with its program.

    Raises:
        PlacementError: there is no cluster at the address that was asked for.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    asked_for = address or os.environ.get("RAY_ADDRESS")
    # Ray has no public word for "is there one?", and would try a silent address for many minutes.
    found = canonicalize_bootstrap_address(address)
    if found is not None and (asked_for or _answers(found)):
        if not _answers(found):
            raise PlacementError(f"no Ray cluster answers at {asked_for}; start one there, or leave the address out")
        try:
            ray.init(address=found, **quiet)
        except ConnectionError as error:
            raise PlacementError(
                f"cannot connect to the Ray cluster at {found}: {error}. If it checks tokens, set RAY_AUTH_MODE=token "
                "before this program starts"
            ) from error
    else:
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    return True


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)


def _raw_request(prompt: object, config: GenerationConfig, where: str) -> Request:
    if prompt == "":
        raise InvalidRequestError(f"{where}: the prompt is empty; send at least one character")
    return Request(request_id=uuid.uuid4().hex, prompt=_checked(prompt, where), config=config)


def _checked(text: object, where: str) -> str:
    """Return a string that can be sent."""
    if not isinstance(text, str):
        raise InvalidRequestError(f"{where}: expected a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{where}: not valid Unicode: {error}; clean the text first") from None
    return text


def _as_messages(inputs: object) -> object:
    if isinstance(inputs, str):
        return [{"role": "user", "content": inputs}]
    return [inputs] if isinstance(inputs, Mapping | Message) else inputs


def _shown(completion: Completion, *, return_dict: bool) -> Any:
    return as_dict(completion) if return_dict else completion.text


def as_dict(completion: Completion) -> dict[str, Any]:
    """Return a completion as plain dicts, without what the engine did not tell."""
    shown: dict[str, Any] = msgspec.to_builtins(completion)
    return shown


__all__ = ["AsyncLMDeployPipeline", "LMDeployPipeline", "RaylmError", "as_dict"]
