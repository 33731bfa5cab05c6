"""Chatbot: what the seed's four classes have in common, a face on a pool of any engines.

`AsyncChatbot` is the whole of it; `Chatbot` runs one on an event loop of its own and waits. `api.py` has the four.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Coroutine, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

import msgspec
import ray
import uvloop
from pydantic import TypeAdapter, ValidationError

from raylm.actors.cluster import connect
from raylm.actors.manager import PoolManager
from raylm.actors.sessions import SessionStore, connect_store
from raylm.config import EngineConfig, PoolConfig, SessionConfig, TritonConfig
from raylm.conversation import Conversations
from raylm.errors import (
    ContextLengthError,
    InvalidRequestError,
    NoActorError,
    PartialFailureError,
    SessionNotFoundError,
)
from raylm.messages import RAW_ROLE, Completion, GenerationConfig, Message, Request, Status
from raylm.pool import Pool
from raylm.served import ServedPool
from raylm.statistics import PoolStatistics
from raylm.stream import Stream
from raylm.template import MetaTemplate, parse_messages

Conversation = Sequence[Mapping[str, str] | Message]
T = TypeVar("T")

_engine_adapter: TypeAdapter[EngineConfig] = TypeAdapter(EngineConfig)


class AsyncChatbot:
    """One pool over engines of any kind, for asyncio programs.

    Use as an async context manager, or call `start` and `aclose`. Attaches to the Ray cluster of `address`, of
    `RAY_ADDRESS`, or one that runs on this machine, and starts a local one where there is none.

    Args:
        engines: Settings of the engines, one for each actor. They may be of different kinds.
        meta_template: How messages become a prompt, in lagent's form (see `raylm.template`); None uses the model's own
            chat template.
        max_new_tokens: Limit on generated tokens, >= 1.
        top_p: In (0, 1]; nucleus of probability mass to sample from.
        top_k: >= 1; how many of the likeliest tokens to sample from. None: no limit.
        temperature: >= 0; 0 is greedy decoding.
        repetition_penalty: > 0; 1.0 is none.
        stop_words: Text or texts that end the generation and are not part of it.
        address: Address of the Ray cluster; `local` starts one for this chatbot whatever else runs.
        pool_config: Limits and bounds of the pool.
        session_config: Where sessions are kept, and their limits.

    Attributes:
        defaults: What requests ask for where they do not say.

    Raises:
        InvalidRequestError: a parameter is out of range.
    """

    def __init__(
        self,
        engines: Sequence[EngineConfig],
        *,
        meta_template: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 512,
        top_p: float = 0.8,
        top_k: int | None = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        stop_words: str | Sequence[str] | None = None,
        address: str | None = None,
        pool_config: PoolConfig | None = None,
        session_config: SessionConfig | None = None,
    ) -> None:
        self._engines = tuple(engines)
        self.defaults = GenerationConfig().updated(
            {
                "max_new_tokens": max_new_tokens,
                "top_p": top_p,
                "top_k": top_k,
                "temperature": temperature,
                "repetition_penalty": repetition_penalty,
                "stop_words": stop_words,
            }
        )
        self._template = None if meta_template is None else MetaTemplate.parse(meta_template)
        self._meta_template = meta_template
        self._address = address
        self._pool_config = pool_config
        self._session_config = session_config or SessionConfig()
        self._owns_ray = False
        self._manager: PoolManager | None = None
        self._pool: Pool | None = None
        self._store: SessionStore | None = None
        self._conversations: Conversations | None = None

    def _place(self) -> Sequence[EngineConfig]:
        """Return the settings of each slot's engine, now that there is a cluster to look at."""
        if not self._engines:
            raise InvalidRequestError("engines: give the settings of one engine at least")
        return self._engines

    async def start(self) -> Self:
        """Connect to Ray, create the actors and start the engine in each.

        Raises:
            PlacementError: there is no cluster at the address, or it cannot hold the actors.
            EngineStartError: an engine did not start; the text says what to do.
        """
        if not ray.is_initialized():
            self._owns_ray = await asyncio.to_thread(connect, self._address) is not None
        try:
            self._engines = tuple(self._place())
            self._manager = await PoolManager.start(
                self._engines,
                self._session_config,
                placement_timeout_s=self._pool_config.placement_timeout_s if self._pool_config else None,
            )
            self._pool = Pool(self._pool_config, replace=self._manager.replace)
            ready = [self._pool.attach(slot, actor) for slot, actor in self._manager.actors.items()]
            await asyncio.gather(*ready)
            prefix = f"raylm:{self._pool.statistics().slots[0].model}:"
            self._store = connect_store(self._session_config, self._manager.sessions, prefix)
        except BaseException:
            await self.aclose()
            raise
        self._conversations = Conversations(self._pool, self._store, self._session_config.turn_timeout_s)
        return self

    async def aclose(self) -> None:
        """End the actors and, where this chatbot started Ray, Ray. Requests still running fail."""
        if self._pool is not None:
            await self._pool.aclose()
        if self._store is not None:
            await self._store.aclose()
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
        """The pool behind this chatbot.

        Raises:
            NoActorError: it has not been started.
        """
        if self._pool is None:
            raise NoActorError(f"the {type(self).__name__} has not been started; use it in `async with`, or `start` it")
        return self._pool

    @overload
    async def generate(self, inputs: str, *, return_dict: Literal[False] = False, **rest: Any) -> str: ...
    @overload
    async def generate(
        self, inputs: Sequence[str], *, return_dict: Literal[False] = False, **rest: Any
    ) -> list[str]: ...
    @overload
    async def generate(self, inputs: str, *, return_dict: Literal[True], **rest: Any) -> dict[str, Any]: ...
    @overload
    async def generate(
        self, inputs: Sequence[str], *, return_dict: Literal[True], **rest: Any
    ) -> list[dict[str, Any]]: ...
    async def generate(
        self,
        inputs: str | Sequence[str],
        session_id: int | str | None = None,
        request_id: str | None = None,
        sequence_start: bool = True,
        sequence_end: bool = True,
        ignore_eos: bool = False,
        timeout: float | None = 30,
        *,
        return_dict: bool = False,
        **overrides: Any,
    ) -> Any:
        """Continue raw prompts; no template is applied.

        Args:
            inputs: A prompt, or a list of them.
            session_id: The session. None is for a prompt on its own: `sequence_start` and `sequence_end` True. Each
                prompt of a list is on its own.
            request_id: Name of this request in logs; those of a list get their index added.
            sequence_start: Begin the session, in place of one of that id. Otherwise the prompt continues the text of
                its earlier turns.
            sequence_end: Forget the session when the turn is over.
            ignore_eos: Go on after the end of sequence, up to `max_new_tokens`.
            timeout: Limit in seconds on the time in which nothing happens: the prompt, or any prompt of a list, neither
                gets to an actor nor gets a token. None: no limit.
            return_dict: Return dicts of `text`, `finish_reason`, `usage`, `receipt` and, where the engine tells them,
                `token_ids` and `logprobs`.
            overrides: Any generation parameter (`raylm.messages.GenerationConfig`) for this call alone.

        Returns:
            The text, or a list of texts in the order of the prompts.

        Raises:
            InvalidRequestError: an unknown or wrong parameter, or an empty prompt.
            SessionNotFoundError: `sequence_start` is False and there is no such session.
            SessionBusyError: another turn of this session is running.
            PartialFailureError: some prompts of a list failed; its `results` holds every answer and every error.
            RaylmError: the one prompt failed.
        """
        config = self.defaults.updated({"ignore_eos": ignore_eos, **overrides})
        if not isinstance(inputs, str):
            if not isinstance(inputs, Sequence):
                raise InvalidRequestError(
                    f"inputs: expected a string or a list of strings, got {type(inputs).__name__}"
                )
            if not (sequence_start and sequence_end):
                raise InvalidRequestError("inputs: a session takes one prompt at a time, not a list")
            names = [None if request_id is None else f"{request_id}-{index}" for index in range(len(inputs))]
            requests = [
                _raw_request(prompt, config, names[index], f"inputs[{index}]") for index, prompt in enumerate(inputs)
            ]
            return await self._answer_all(requests, timeout, return_dict=return_dict)
        _raw_request(inputs, config, request_id, "inputs")  # checked before a session is touched

        def make_request(transcript: tuple[Message, ...]) -> Request:
            if any(message.role not in (RAW_ROLE, "assistant") for message in transcript):
                raise InvalidRequestError(f"session {session_id} is a conversation; go on with stream_chat")
            text = "".join(message.content for message in transcript)
            return _raw_request(text, config, request_id, "inputs", stream=False)

        async with self._turn(
            (Message(RAW_ROLE, inputs),),
            make_request,
            session_id,
            start=sequence_start,
            end=sequence_end,
            silence_s=timeout,
        ) as stream:
            completion = await stream.completion()
        return _shown(completion, return_dict=return_dict)

    async def chat(
        self,
        inputs: Conversation | Sequence[Conversation],
        *,
        timeout: float | None = None,
        return_dict: bool = False,
        **overrides: Any,
    ) -> Any:
        """Answer conversations: apply the template, then generate.

        Args:
            inputs: A list of messages (dicts of `role` and `content`), or a list of such lists.
            timeout: As in `generate`.
            return_dict: As in `generate`.
            overrides: As in `generate`.

        Returns:
            The answer, or a list of answers in the order of the conversations.

        Raises:
            InvalidRequestError: an unknown role, wrong types, or an unknown or wrong parameter.
            PartialFailureError: as in `generate`.
            RaylmError: the one conversation failed.
        """
        config = self.defaults.updated(overrides)
        if isinstance(inputs, list | tuple) and bool(inputs) and isinstance(inputs[0], list | tuple):
            requests = [self._chat_request(parse_messages(messages), config) for messages in inputs]
            return await self._answer_all(requests, timeout, return_dict=return_dict)
        request = self._chat_request(parse_messages(inputs), config)
        return _shown(await self.pool.generate(request, silence_s=timeout), return_dict=return_dict)

    async def stream_chat(
        self,
        inputs: Conversation | Mapping[str, str] | str,
        session_id: int | str | None = None,
        request_id: str | None = None,
        sequence_start: bool = True,
        sequence_end: bool = True,
        stream: bool = True,
        ignore_eos: bool = False,
        timeout: float | None = 30,
        **overrides: Any,
    ) -> AsyncGenerator[tuple[Status, str, int], None]:
        """Answer one turn of a conversation, token by token.

        Args:
            inputs: The messages of this turn: a list of dicts, one dict, or the user's words.
            session_id: The session. None is for a conversation of one turn: `sequence_start` and `sequence_end` True.
            request_id: Name of this turn in logs.
            sequence_start: Begin the session, in place of one of that id. Otherwise it goes on after its earlier turns.
            sequence_end: Forget the session when the turn is over.
            stream: False yields once, at the end.
            ignore_eos: Go on after the end of sequence, up to `max_new_tokens`.
            timeout: As in `generate`.
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
        config = self.defaults.updated({"ignore_eos": ignore_eos, **overrides})
        messages = parse_messages(_as_messages(inputs))
        self._chat_request(messages, config, request_id)  # checked before a session is touched

        def make_request(transcript: tuple[Message, ...]) -> Request:
            if any(message.role == RAW_ROLE for message in transcript):
                raise InvalidRequestError(f"session {session_id} holds raw text; go on with generate")
            return self._chat_request(transcript, config, request_id, stream=stream)

        try:
            async with self._turn(
                messages, make_request, session_id, start=sequence_start, end=sequence_end, silence_s=timeout
            ) as answer:
                parts = ""
                async for delta in answer:
                    parts += delta.text
                    if stream:
                        yield Status.STREAM_ING, parts, delta.num_tokens
            # After the block, which adds the turn to the session: a caller may leave at END.
            yield Status.END, parts, answer.num_tokens
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
            for message in (await self._sessions().load(str(session_id))).messages
        ]

    def request(
        self,
        *,
        prompt: object = None,
        prompt_token_ids: tuple[int, ...] | None = None,
        messages: object = None,
        **overrides: Any,
    ) -> Request:
        """Return the request of one prompt or one conversation, to give to `pool`.

        Args:
            prompt: Raw text; no template is applied.
            prompt_token_ids: The model's tokens, in place of `prompt`.
            messages: A conversation, in place of `prompt`. The template is applied.
            overrides: As in `generate`.

        Raises:
            InvalidRequestError: both or neither of `prompt` and `messages`, an unknown role, wrong types, or an unknown
                or wrong parameter.
        """
        if [prompt, prompt_token_ids, messages].count(None) != 2:
            raise InvalidRequestError("give either prompt or messages")
        config = self.defaults.updated(overrides)
        if prompt_token_ids is not None:
            return Request(request_id=uuid.uuid4().hex, prompt_token_ids=prompt_token_ids, config=config)
        if messages is None:
            return _raw_request(prompt, config, None, "prompt")
        return self._chat_request(parse_messages(messages), config)

    def recipe(self) -> dict[str, Any]:
        """Return what another process needs to ask the same engines, once this one has been started.

        It is for JSON, and `made_of` takes it. API keys are left out of it; it says whether there are any.
        """
        return {
            "kind": "engines",
            "engines": [engine.model_dump(mode="json", exclude={"api_key"}) for engine in self._engines],
            "has_key": any(getattr(engine, "api_key", None) for engine in self._engines),
            "meta_template": self._meta_template,
            "address": self._address,
        }

    def statistics(self) -> PoolStatistics:
        """Return counts and loads at this moment."""
        return self.pool.statistics()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self._pool!r}>"

    def _chat_request(
        self,
        messages: tuple[Message, ...],
        config: GenerationConfig,
        request_id: str | None = None,
        *,
        stream: bool = True,
    ) -> Request:
        request_id = uuid.uuid4().hex if request_id is None else _checked(request_id, "request_id")
        if self._template is not None:
            prompt = self._template.render(messages)
            return Request(request_id=request_id, prompt=prompt, config=config, stream=stream)
        if any(isinstance(engine, TritonConfig) for engine in self._engines):
            raise InvalidRequestError("meta_template: a Triton server takes prompts only; say how messages become one")
        return Request(request_id=request_id, messages=messages, config=config, stream=stream)

    def _sessions(self) -> Conversations:
        if self._conversations is None:
            raise NoActorError(f"the {type(self).__name__} has not been started; use it in `async with`, or `start` it")
        return self._conversations

    @asynccontextmanager
    async def _turn(
        self,
        messages: tuple[Message, ...],
        make_request: Any,
        session_id: int | str | None,
        *,
        start: bool,
        end: bool,
        silence_s: float | None,
    ) -> AsyncIterator[Stream]:
        if session_id is None:
            if not (start and end):
                raise InvalidRequestError("session_id: a conversation of several turns needs one")
            async with self.pool.stream(make_request(messages), silence_s=silence_s) as stream:
                yield stream
            return
        async with self._sessions().turn(
            str(session_id), messages, make_request, start=start, end=end, silence_s=silence_s
        ) as stream:
            yield stream

    async def _answer_all(self, requests: list[Request], silence_s: float | None, *, return_dict: bool) -> Any:
        results = await self.pool.generate_many(requests, silence_s=silence_s)
        completions = [result for result in results if isinstance(result, Completion)]
        if len(completions) < len(results):
            raise PartialFailureError(results)
        return [_shown(completion, return_dict=return_dict) for completion in completions]


class AsyncServedModel(AsyncChatbot):
    """A model that `raylm serve` serves, or a Serve config file does: the same actors and sessions that HTTP uses.

    Args:
        model: Its name.
        address: Address of the Ray cluster that it is served on; None is as in `AsyncChatbot`.
        sampling: Generation parameters, as in `AsyncChatbot`.

    Raises:
        InvalidRequestError: a parameter is out of range.
    """

    def __init__(self, model: str, *, address: str | None = None, **sampling: Any) -> None:
        super().__init__((), address=address, **sampling)
        self._model = model
        self._served: ServedPool | None = None

    async def start(self) -> Self:
        """Connect to Ray and join the pools of the model; returns when some slot is up, or there is none.

        Raises:
            ModelNotFoundError: no model of that name is served on the cluster.
            PlacementError: there is no cluster at the address.
            EngineStartError: no engine could be started; the text says what to do.
            NoActorError: the manager of the model is being restarted.
        """
        if not ray.is_initialized():
            self._owns_ray = await asyncio.to_thread(connect, self._address) is not None
        try:
            self._served = await ServedPool.open(self._model)
            await self._served.answering()
        except BaseException:
            await self.aclose()
            raise
        self._pool = self._served.pool
        self._conversations = self._served.conversations
        self._template = self._template or self._served.template
        return self

    def recipe(self) -> dict[str, Any]:
        """See `AsyncChatbot.recipe`."""
        return {"kind": "pool", "name": self._model, "address": self._address}

    async def aclose(self) -> None:
        """Leave. The actors go on for others."""
        if self._served is not None:
            await self._served.aclose()
            self._served = None
        await super().aclose()


def made_of(recipe: Mapping[str, Any], api_key: str | None = None) -> AsyncChatbot:
    """Return a chatbot, not started, that asks the engines of another one.

    Args:
        recipe: What the other one's `recipe` returned.
        api_key: The key of its servers, where it had one: that is in no recipe.

    Raises:
        InvalidRequestError: the recipe is of another version of raylm.
    """
    if recipe["kind"] == "pool":
        return AsyncServedModel(recipe["name"], address=recipe["address"])
    key = {"api_key": api_key} if recipe["has_key"] else {}
    try:
        engines = [_engine_adapter.validate_python({**engine, **key}) for engine in recipe["engines"]]
    except ValidationError as error:
        raise InvalidRequestError(f"the engines are of another version of raylm: {error}") from None
    return AsyncChatbot(engines, meta_template=recipe["meta_template"], address=recipe["address"])


class Chatbot:
    """The same as `AsyncChatbot`, arguments and errors included, for programs without an event loop.

    It is ready when the constructor returns. Use it in `with`, or call `close`.
    """

    def __init__(self, engines: Sequence[EngineConfig], **settings: Any) -> None:
        self._start(AsyncChatbot(engines, **settings))

    def _start(self, chatbot: AsyncChatbot) -> None:
        self._chatbot = chatbot
        # Here and not in the loop's thread: Ray sets its signal handlers only in the main one.
        chatbot._owns_ray = connect(chatbot._address) is not None
        self._loop = LoopThread()
        try:
            self._loop.run(chatbot.start())
        except BaseException:
            self._loop.close()
            raise
        atexit.register(self.close)

    @overload
    def generate(self, inputs: str, *, return_dict: Literal[False] = False, **rest: Any) -> str: ...
    @overload
    def generate(self, inputs: Sequence[str], *, return_dict: Literal[False] = False, **rest: Any) -> list[str]: ...
    @overload
    def generate(self, inputs: str, *, return_dict: Literal[True], **rest: Any) -> dict[str, Any]: ...
    @overload
    def generate(self, inputs: Sequence[str], *, return_dict: Literal[True], **rest: Any) -> list[dict[str, Any]]: ...
    def generate(
        self,
        inputs: str | Sequence[str],
        session_id: int | str | None = None,
        request_id: str | None = None,
        sequence_start: bool = True,
        sequence_end: bool = True,
        ignore_eos: bool = False,
        timeout: float | None = 30,
        *,
        return_dict: bool = False,
        **overrides: Any,
    ) -> Any:
        """Continue raw prompts. See `AsyncChatbot.generate`."""
        return self._run(
            self._chatbot.generate(  # type: ignore[call-overload]
                inputs,
                session_id=session_id,
                request_id=request_id,
                sequence_start=sequence_start,
                sequence_end=sequence_end,
                ignore_eos=ignore_eos,
                timeout=timeout,
                return_dict=return_dict,
                **overrides,
            )
        )

    def chat(
        self,
        inputs: Conversation | Sequence[Conversation],
        *,
        timeout: float | None = None,
        return_dict: bool = False,
        **overrides: Any,
    ) -> Any:
        """Answer conversations. See `AsyncChatbot.chat`."""
        return self._run(self._chatbot.chat(inputs, timeout=timeout, return_dict=return_dict, **overrides))

    def stream_chat(
        self,
        inputs: Conversation | Mapping[str, str] | str,
        session_id: int | str | None = None,
        request_id: str | None = None,
        sequence_start: bool = True,
        sequence_end: bool = True,
        stream: bool = True,
        ignore_eos: bool = False,
        timeout: float | None = 30,
        **overrides: Any,
    ) -> Generator[tuple[Status, str, int], None, None]:
        """Answer one turn of a conversation, token by token. See `AsyncChatbot.stream_chat`."""
        steps = self._chatbot.stream_chat(
            inputs, session_id, request_id, sequence_start, sequence_end, stream, ignore_eos, timeout, **overrides
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
        """Forget a session. See `AsyncChatbot.end_session`."""
        self._run(self._chatbot.end_session(session_id))

    def history(self, session_id: int | str) -> list[dict[str, str]]:
        """Return a session's messages so far. See `AsyncChatbot.history`."""
        return self._run(self._chatbot.history(session_id))

    def statistics(self) -> PoolStatistics:
        """Return counts and loads at this moment."""
        return self._chatbot.statistics()

    def close(self) -> None:
        """End the actors and, where this chatbot started Ray, Ray. May be called twice."""
        atexit.unregister(self.close)
        if self._loop.running:
            # Ray is ended here and not in the loop's thread, which can start no other thread while Python exits.
            owns_ray, self._chatbot._owns_ray = self._chatbot._owns_ray, False
            self._loop.run(self._chatbot.aclose())
            self._loop.close()
            if owns_ray:
                ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._chatbot).replace("Async", "", 1)

    def _run(self, work: Awaitable[T]) -> T:
        if not self._loop.running:
            if isinstance(work, Coroutine):
                work.close()
            raise NoActorError(f"the {type(self).__name__} was closed; make a new one")
        return self._loop.run(work)


class LoopThread:
    """An event loop in a thread of its own. It is uvloop's, as in Ray's actors: a token costs a third less on it."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="raylm", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it has not been closed."""
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

        def cancel() -> None:
            if tasks:
                tasks[0].cancel()
            else:  # the interrupt came before `start` was handed over
                ended.set()

        try:
            self._loop.call_soon_threadsafe(start)
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(cancel)
            ended.wait()
            raise
        return tasks[0].result()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin something; another loop awaits its future with `asyncio.wrap_future`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End the thread. Nothing may be running."""
        # In that thread and not in this one, where another loop may be running, such as a notebook's.
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _raw_request(
    prompt: object, config: GenerationConfig, request_id: str | None, where: str, *, stream: bool = True
) -> Request:
    if prompt == "":
        raise InvalidRequestError(f"{where}: the prompt is empty; send at least one character")
    request_id = uuid.uuid4().hex if request_id is None else _checked(request_id, "request_id")
    return Request(request_id=request_id, prompt=_checked(prompt, where), config=config, stream=stream)


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
