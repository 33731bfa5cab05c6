"""Gateway: HTTP in, Pool out. One runs in each replica of the Serve deployment, and keeps nothing that others lack.

`build_gateway` makes the FastAPI application. What is written on the wire is in `schema.py`, what every request passes
is in `door.py`.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache, partial
from importlib.resources import files
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Path
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import Response

from raylm._version import __version__
from raylm.actors.manager_actor import serve
from raylm.config import ServeConfig
from raylm.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    NoActorError,
    RaylmError,
    RequestIncompleteError,
    RequestTooLargeError,
    SessionNotFoundError,
)
from raylm.messages import RAW_ROLE, Completion, GenerationConfig, Lane, Message, Request, Status
from raylm.serve.batches.routes import FORM, Batches
from raylm.serve.document import describe
from raylm.serve.door import Door, facts, note
from raylm.serve.metrics import CONTENT_TYPE, render
from raylm.serve.schema import (
    MAX_INT,
    Cancelled,
    ChatCompletionBody,
    ChatWire,
    CompletionBody,
    CompletionWire,
    ForkBody,
    GenerateBody,
    Generated,
    Health,
    ModelCard,
    ModelList,
    SessionEnded,
    SessionForked,
    State,
    StreamChatBody,
    StreamChatWire,
    TokenizeBody,
    Tokens,
    Transcript,
    Wire,
    error_body,
    event,
    receipt_headers,
)
from raylm.serve.streams import EventStream, Turn
from raylm.served import ServedPool
from raylm.statistics import ModelState
from raylm.stream import Stream

_RETRY_AFTER_S = 1.0
"""What a client is told where an error does not say itself when to come again."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode

SessionPath = Annotated[str, Path(min_length=1, max_length=200)]


class _StrictRequest(HTTPRequest):
    """A request whose body is JSON to the letter: what Python takes beyond it, engines and messages cannot hold."""

    async def json(self) -> Any:
        """Return the body.

        Raises:
            json.JSONDecodeError: it is not JSON, or has half a character, or numbers out of range, or is too deep.
        """
        body = await self.body()
        try:
            return _decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class _StrictRoute(APIRoute):
    """A route that takes strict JSON."""

    def get_route_handler(self) -> Callable[[HTTPRequest], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: HTTPRequest) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class JSON(Response):
    """A JSON response, encoded by msgspec, which knows our structs."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return _encode(content)


class Gateway:
    """Answers the routes.

    Args:
        config: What is served.
        as_of: When that was said; see `raylm.actors.manager_actor.serve`.

    Attributes:
        batches: Answers those of files and batches.
    """

    def __init__(self, config: ServeConfig, as_of: int) -> None:
        self._config = config
        self._as_of = as_of
        self._served: dict[str, ServedPool] = {}
        self.batches = Batches(config)
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Join, or make, the pool of each model. Their engines may still be loading when this returns."""
        for model in self._config.models:
            await serve(model, self._as_of)
            self._served[model.name] = await self._stack.enter_async_context(await ServedPool.open(model.name))
        await self.batches.start()
        self._stack.push_async_callback(self.batches.aclose)

    async def aclose(self) -> None:
        """Leave all pools."""
        await self._stack.aclose()

    # OpenAI's routes

    async def models(self) -> Response:
        """List the models that are served."""
        return JSON(ModelList([_card(each) for each in self._still_served]))

    async def model(self, model_id: SessionPath) -> Response:
        """Return one of them."""
        return JSON(_card(self._find(model_id)))

    async def chat_completions(self, body: ChatCompletionBody, http: HTTPRequest) -> Response:
        """Answer a conversation."""
        request_id, session_id = _identify(body, http, body.user)
        served = self._find(body.model)
        config = body.to_config()
        self._check_number("n", body.n or 1)
        messages = tuple(message.to_message() for message in body.messages)
        self._note_text(messages)
        wire = ChatWire(
            f"chatcmpl-{request_id}",
            served.config.name,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            logprobs=bool(body.logprobs),
        )
        if body.is_turn:
            _only_one_choice(body.n)
            turn = self._turn(
                served,
                messages,
                lambda transcript: _chat_request(served, request_id, transcript, config),
                session_id,
                start=bool(body.sequence_start),
                end=bool(body.sequence_end),
            )
            return await self._respond([turn], wire, stream=bool(body.stream))
        requests = [
            _chat_request(served, name, messages, choice) for name, choice in _choices(request_id, config, body.n)
        ]
        return await self._respond(self._all(served, requests, session_id), wire, stream=bool(body.stream))

    async def completions(self, body: CompletionBody, http: HTTPRequest) -> Response:
        """Continue raw prompts."""
        request_id, session_id = _identify(body, http, body.user)
        served = self._find(body.model)
        config = body.to_config()
        prompts = body.to_prompts()
        self._check_number("prompt", len(prompts) * (body.n or 1))
        self._note_text(prompts)
        wire = CompletionWire(
            f"cmpl-{request_id}",
            served.config.name,
            [prompt if isinstance(prompt, str) else None for prompt in prompts for _ in range(body.n or 1)],
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            logprobs=body.logprobs is not None,
            echo=bool(body.echo),
        )
        if body.is_turn:
            _only_one_choice(body.n)
            if body.echo:
                raise InvalidRequestError("echo: a turn of a session answers with its own text alone")
            if len(prompts) > 1 or not isinstance(prompts[0], str):
                raise InvalidRequestError("prompt: a session takes one prompt of text at a time")
            turn = self._turn(
                served,
                (Message(RAW_ROLE, prompts[0]),),
                lambda transcript: _raw_request(request_id, _raw_text(transcript), config),
                session_id,
                start=bool(body.sequence_start),
                end=bool(body.sequence_end),
            )
            return await self._respond([turn], wire, stream=bool(body.stream))
        requests = [
            _raw_request(name if len(prompts) == 1 else f"{name}/{index}", prompt, choice)
            for index, prompt in enumerate(prompts)
            for name, choice in _choices(request_id, config, body.n)
        ]
        return await self._respond(self._all(served, requests, session_id), wire, stream=bool(body.stream))

    # The seed's routes

    async def generate(self, body: GenerateBody, http: HTTPRequest) -> Response:
        """Continue one prompt, or many: then each has its own answer or error."""
        request_id, session_id = _identify(body, http)
        served = self._find(body.model)
        config = body.to_config()
        self._note_text(body.inputs)
        if isinstance(body.inputs, list):
            if not (body.sequence_start and body.sequence_end):
                raise InvalidRequestError("inputs: a session's transcript takes one prompt at a time, not a list")
            self._check_number("inputs", len(body.inputs))
            requests = [
                _raw_request(f"{request_id}/{index}", prompt, config) for index, prompt in enumerate(body.inputs)
            ]
            timeout_s = self._config.gateway.request_timeout_s
            if session_id is None:
                results = await served.pool.generate_many(requests, timeout_s=timeout_s, silence_s=body.timeout)
            else:
                results = await served.conversations.pinned_many(
                    requests, session_id, timeout_s=timeout_s, silence_s=body.timeout
                )
            shown = [_shown(result) if isinstance(result, Completion) else error_body(result) for result in results]
            return JSON({"results": shown})
        if not body.inputs:
            raise InvalidRequestError("inputs: the prompt is empty; send at least one character")
        turn = self._seed_turn(
            served,
            (Message(RAW_ROLE, body.inputs),),
            lambda transcript: _raw_request(request_id, _raw_text(transcript), config),
            session_id,
            body,
        )
        async with turn as stream:
            completion = await stream.completion()
        note(completion.receipt, completion.finish_reason)
        return JSON(_shown(completion), headers=receipt_headers(completion.receipt))

    async def stream_chat(self, body: StreamChatBody, http: HTTPRequest) -> Response:
        """Answer one turn of a conversation, as events of status, text so far and number of tokens."""
        request_id, session_id = _identify(body, http)
        served = self._find(body.model)
        config = body.to_config()
        messages = body.to_messages()
        if not messages:
            raise InvalidRequestError("inputs: send at least one message")
        self._note_text(messages)
        turn = self._seed_turn(
            served,
            messages,
            lambda transcript: _chat_request(served, request_id, transcript, config),
            session_id,
            body,
        )
        wire = StreamChatWire(stream=body.stream)
        return _StatusStream([turn], wire, self._config.gateway.heartbeat_s)

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Return the tokens of a prompt or of a conversation with its template."""
        served = self._find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("prompt: give either this or messages")
        config = GenerationConfig()
        if body.messages is not None:
            messages = tuple(message.to_message() for message in body.messages)
            request = _chat_request(served, "tokenize", messages, config)
        else:
            request = _raw_request("tokenize", body.prompt or "", config)
        tokens = await served.pool.tokenize(request)
        return JSON(Tokens(tokens, len(tokens), served.pool.max_context))

    # Sessions and requests

    async def show_session(self, session_id: SessionPath, model: str | None = None) -> Response:
        """Return a session's transcript."""
        served, found = await self._session(session_id, model)
        return JSON(Transcript(session_id, served.config.name, found.slot, found.messages))

    async def end_session(self, session_id: SessionPath, model: str | None = None) -> Response:
        """Forget a session."""
        served, _ = await self._session(session_id, model)
        await served.conversations.end(session_id)
        return JSON(SessionEnded(session_id))

    async def fork_session(self, session_id: SessionPath, body: ForkBody) -> Response:
        """Begin another session with the transcript of this one."""
        served, found = await self._session(session_id, body.model)
        await served.conversations.fork(session_id, str(body.session_id))
        return JSON(SessionForked(str(body.session_id), served.config.name, found.slot))

    async def cancel_request(self, request_id: SessionPath) -> Response:
        """Abort a request. Where another gateway has it, that one is asked to: status 202."""
        facts.get()["request_id"] = request_id
        served = list(self._served.values())  # one that has ended may run it
        here = [each.cancel(request_id) for each in served]
        if any(here):
            return JSON(Cancelled(request_id, True))
        asked = await asyncio.gather(*(each.cancel_elsewhere(request_id) for each in served), return_exceptions=True)
        for error in asked:  # once all were asked
            if error is not None:
                raise error
        return JSON(Cancelled(request_id, "asked"), status_code=202)

    # The state of things

    async def health(self) -> Response:
        """Say whether every model that is still served has an actor, or gets one when there is work."""
        served = self._still_served
        if not served:
            raise NoActorError("every model has been ended; `raylm up` serves them again", retry_after_s=_RETRY_AFTER_S)
        down = [each.config.name for each in served if not each.answers]
        if down:
            raise NoActorError(f"no actor is up for {', '.join(down)}", retry_after_s=_RETRY_AFTER_S)
        return JSON(Health())

    async def state(self) -> Response:
        """Say what all gateways and other clients do with the models."""
        return JSON(State(await self._states()))

    async def metrics(self) -> Response:
        """Return the same for Prometheus."""
        # Else counters of a model that is not known of would fall to 0.
        known = [state for state in await self._states() if not state.problem]
        return Response(render(known, self.batches.counts), media_type=CONTENT_TYPE)

    async def page(self) -> Response:
        """Return the page."""
        return _file("index.html")

    async def docs(self) -> Response:
        """Return the page that shows /openapi.json."""
        return _file("docs.html")

    # What the routes have in common

    @property
    def _still_served(self) -> list[ServedPool]:
        """Those of its models that nobody has ended meanwhile."""
        return [served for served in self._served.values() if served.is_served]

    def _find(self, model: str | None) -> ServedPool:
        if model is None and len(self._served) == 1:
            (served,) = self._served.values()
        elif model is None:
            raise InvalidRequestError(f"model: say which one: {', '.join(self._served)}")
        elif model in self._served:
            served = self._served[model]
        else:
            raise ModelNotFoundError(f"model: no {model!r} is served here; there are: {', '.join(self._served)}")
        facts.get()["model"] = served.config.name
        served.pool.check_open()
        return served

    def _check_number(self, param: str, number: int) -> None:
        if number > self._config.gateway.max_prompts:
            raise InvalidRequestError(
                f"{param}: at most {self._config.gateway.max_prompts} prompts and choices at a time"
            )

    def _note_text(self, text: object) -> None:
        if self._config.gateway.log_prompts:
            facts.get()["text"] = text

    def _all(self, served: ServedPool, requests: Sequence[Request], session_id: str | None) -> list[Turn]:
        """Return a turn for each of several requests that are no turns of a session kept here."""
        timeout_s = self._config.gateway.request_timeout_s
        lane: Lane = "interactive" if len(requests) == 1 else "batch"
        if session_id is None:
            return [_alone(served, request, lane=lane, timeout_s=timeout_s) for request in requests]
        return [
            served.conversations.pinned(request, session_id, lane=lane, timeout_s=timeout_s) for request in requests
        ]

    def _turn(
        self,
        served: ServedPool,
        messages: tuple[Message, ...],
        make_request: Callable[[tuple[Message, ...]], Request],
        session_id: str | None,
        *,
        start: bool,
        end: bool,
        silence_s: float | None = None,
    ) -> Turn:
        timeout_s = self._config.gateway.request_timeout_s
        if session_id is None:
            if not (start and end):
                raise InvalidRequestError("session_id: a conversation of several turns needs one")
            return _alone(served, make_request(messages), timeout_s=timeout_s, silence_s=silence_s)
        return served.conversations.turn(
            session_id, messages, make_request, start=start, end=end, timeout_s=timeout_s, silence_s=silence_s
        )

    def _seed_turn(
        self,
        served: ServedPool,
        messages: tuple[Message, ...],
        make_request: Callable[[tuple[Message, ...]], Request],
        session_id: str | None,
        body: GenerateBody | StreamChatBody,
    ) -> Turn:
        if session_id is not None and not body.is_turn:
            timeout_s = self._config.gateway.request_timeout_s
            return served.conversations.pinned(
                make_request(messages), session_id, timeout_s=timeout_s, silence_s=body.timeout
            )
        return self._turn(
            served,
            messages,
            make_request,
            session_id,
            start=body.sequence_start,
            end=body.sequence_end,
            silence_s=body.timeout,
        )

    async def _respond(self, turns: Sequence[Turn], wire: Wire, *, stream: bool) -> Response:
        if stream:
            return EventStream(turns, wire, self._config.gateway.heartbeat_s)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_complete(turn)) for turn in turns]
        except* RaylmError as errors:
            first = errors.exceptions[0]
        else:
            completions = [task.result() for task in tasks]
            note(completions[0].receipt, completions[0].finish_reason)
            return JSON(wire.whole(completions), headers=receipt_headers(completions[0].receipt))
        raise first

    async def _session(self, session_id: str, model: str | None) -> tuple[ServedPool, Any]:
        facts.get()["session_id"] = session_id
        found = []
        for served in [self._find(model)] if model is not None else self._still_served:
            with suppress(SessionNotFoundError):
                found.append((served, await served.conversations.load(session_id)))
        if not found:
            raise SessionNotFoundError(f"there is no session {session_id}")
        if len(found) > 1:
            names = " and ".join(served.config.name for served, _ in found)
            raise InvalidRequestError(f"model: {names} have a session {session_id} each; name the one you mean")
        return found[0]

    async def _states(self) -> list[ModelState]:
        """Return what each model does; of one whose manager does not answer only that, unless none of them does."""
        served = self._still_served
        states: list[ModelState] = []
        errors: list[NoActorError] = []
        for each, found in zip(
            served, await asyncio.gather(*(each.state() for each in served), return_exceptions=True), strict=True
        ):
            if isinstance(found, NoActorError):
                errors.append(found)
                found = ModelState(name=each.config.name, problem=str(found))
            if isinstance(found, BaseException):
                raise found
            states.append(found)
        if errors and len(errors) == len(states):
            raise errors[0]
        return states


class _StatusStream(EventStream):
    """A stream for whose failures the seed's table has a status."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send all of it."""
        try:
            await super().__call__(scope, receive, send)
        except (SessionNotFoundError, ContextLengthError) as error:
            facts.get()["error"] = type(error).__name__
            await Response(self._last_words(error), media_type="text/event-stream")(scope, receive, send)

    def _last_words(self, error: Exception) -> bytes:
        if isinstance(error, SessionNotFoundError):
            status = Status.SESSION_CLOSED
        elif isinstance(error, ContextLengthError):
            status = Status.SESSION_OUT_OF_LIMIT
        else:
            return super()._last_words(error)
        return event({"status": status, "text": "", "n_tokens": 0})


def build_gateway(config: ServeConfig, as_of: int, *, local: bool) -> FastAPI:
    """Return the application, which joins the models' pools when it starts.

    Args:
        config: What is served.
        as_of: When that was said; see `raylm.actors.manager_actor.serve`.
        local: It is for this machine alone; see `Door`.
    """
    gateway = Gateway(config, as_of)
    batches = gateway.batches

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        yield
        await gateway.aclose()

    app = FastAPI(
        title="raylm",
        version=__version__,
        summary="A Ray cluster as one pool of LLM inference actors.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=JSON,
    )
    routes: list[tuple[str, str, Callable[..., Any], str]] = [
        ("POST", "/v1/chat/completions", gateway.chat_completions, "OpenAI"),
        ("POST", "/v1/completions", gateway.completions, "OpenAI"),
        ("GET", "/v1/models", gateway.models, "OpenAI"),
        ("GET", "/v1/models/{model_id:path}", gateway.model, "OpenAI"),
        ("GET", "/v1/files", batches.list_files, "files and batches"),
        ("GET", "/v1/files/{file_id}", batches.show_file, "files and batches"),
        ("DELETE", "/v1/files/{file_id}", batches.delete_file, "files and batches"),
        ("GET", "/v1/files/{file_id}/content", batches.file_content, "files and batches"),
        ("POST", "/v1/batches", batches.create_batch, "files and batches"),
        ("GET", "/v1/batches", batches.list_batches, "files and batches"),
        ("GET", "/v1/batches/{batch_id}", batches.show_batch, "files and batches"),
        ("POST", "/v1/batches/{batch_id}/cancel", batches.cancel_batch, "files and batches"),
        ("POST", "/generate", gateway.generate, "generation"),
        ("POST", "/stream_chat", gateway.stream_chat, "generation"),
        ("POST", "/tokenize", gateway.tokenize, "generation"),
        # Ids may have a `/` in them.
        ("GET", "/sessions/{session_id:path}", gateway.show_session, "sessions"),
        ("DELETE", "/sessions/{session_id:path}", gateway.end_session, "sessions"),
        ("POST", "/sessions/{session_id:path}/fork", gateway.fork_session, "sessions"),
        ("POST", "/requests/{request_id}/cancel", gateway.cancel_request, "requests"),
        ("GET", "/health", gateway.health, "state"),
        ("GET", "/state", gateway.state, "state"),
        ("GET", "/metrics", gateway.metrics, "state"),
    ]
    app.router.route_class = _StrictRoute
    for method, path, route, tag in routes:
        app.add_api_route(path, route, methods=[method], tags=[tag], operation_id=route.__name__)
    app.add_api_route(
        "/v1/files",
        batches.create_file,
        methods=["POST"],
        tags=["files and batches"],
        operation_id="create_file",
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}},
    )
    app.add_api_route("/", gateway.page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/docs", gateway.docs, methods=["GET"], include_in_schema=False)
    app.mount("/static", StaticFiles(packages=[("raylm.serve", "static")]))
    handlers: dict[type[Exception], Any] = {
        RaylmError: _on_error,
        RequestValidationError: _on_invalid,
        HTTPException: _on_http,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.openapi = cache(partial(describe, app))  # type: ignore[method-assign] # FastAPI's way of having one's own
    app.add_middleware(Door, config=config.gateway, batches=config.batches, local=local)
    if config.gateway.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.gateway.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    return app


@asynccontextmanager
async def _alone(
    served: ServedPool,
    request: Request,
    *,
    lane: Lane = "interactive",
    timeout_s: float | None,
    silence_s: float | None = None,
) -> AsyncIterator[Stream]:
    """Run a request of no session. It begins when the block is entered, so that what is never entered runs never."""
    async with served.pool.stream(request, lane=lane, timeout_s=timeout_s, silence_s=silence_s) as stream:
        yield stream


async def _complete(turn: Turn) -> Completion:
    async with turn as stream:
        return await stream.completion()


def _file(name: str) -> Response:
    return FileResponse(str(files("raylm.serve") / "static" / name))


def _identify(
    body: ChatCompletionBody | CompletionBody | GenerateBody | StreamChatBody,
    http: HTTPRequest,
    user: str | None = None,
) -> tuple[str, str | None]:
    """Return the ids of a request and of its session, and make them part of its lines of log."""
    request_id = body.request_id or uuid.uuid4().hex
    about = facts.get()
    about["request_id"] = request_id
    if user is not None:
        about["user"] = user
    session_id = _session(http, body.session_id)
    if session_id is not None:
        about["session_id"] = session_id
    return request_id, session_id


def _session(http: HTTPRequest, in_body: str | int | None) -> str | None:
    in_header: str | None = http.state.session_id
    body = None if in_body is None else str(in_body)
    if body is not None and not 0 < len(body) <= 200:
        raise InvalidRequestError("session_id: 1 to 200 characters")
    if in_header is not None and body is not None and in_header != body:
        raise InvalidRequestError("session_id: differs from the header x-session-id")
    return body if body is not None else in_header


def _choices(request_id: str, config: GenerationConfig, n: int | None) -> list[tuple[str, GenerationConfig]]:
    """Return an id and a configuration for each of `n` choices. With a seed, each choice has its own."""
    if n is None or n == 1:
        return [(request_id, config)]
    seeds = [None if config.seed is None else (config.seed + index) % MAX_INT for index in range(n)]
    return [(f"{request_id}/{index}", msgspec.structs.replace(config, seed=seed)) for index, seed in enumerate(seeds)]


def _only_one_choice(n: int | None) -> None:
    if n not in (None, 1):
        raise InvalidRequestError("n: a turn of a session has one answer")


def _chat_request(
    served: ServedPool, request_id: str, messages: tuple[Message, ...], config: GenerationConfig
) -> Request:
    if any(message.role == RAW_ROLE for message in messages):
        raise InvalidRequestError("session_id: that session holds raw text; go on with /generate or /v1/completions")
    if served.template is not None:
        return Request(request_id=request_id, prompt=served.template.render(messages), config=config)
    return Request(request_id=request_id, messages=messages, config=config)


def _raw_request(request_id: str, prompt: str | tuple[int, ...], config: GenerationConfig) -> Request:
    if isinstance(prompt, str):
        return Request(request_id=request_id, prompt=prompt, config=config)
    return Request(request_id=request_id, prompt_token_ids=prompt, config=config)


def _raw_text(transcript: Sequence[Message]) -> str:
    if any(message.role not in (RAW_ROLE, "assistant") for message in transcript):
        raise InvalidRequestError("session_id: that session is a conversation; go on with a chat route")
    return "".join(message.content for message in transcript)


def _card(served: ServedPool) -> ModelCard:
    return ModelCard(served.config.name, served.pool.max_context)


def _shown(completion: Completion) -> Generated:
    return Generated(completion.text, completion.finish_reason, completion.usage, completion.receipt)


# What is raised, as an answer


async def _on_error(http: HTTPRequest, error: RaylmError) -> Response:
    headers = {}
    if error.status_code in (429, 503):
        headers["retry-after"] = f"{max(1, round(error.retry_after_s or _RETRY_AFTER_S))}"
    facts.get({}).update(error=type(error).__name__)
    body = error_body(error, path=http.url.path)
    return JSON(body, status_code=error.status_code, headers=headers)


async def _on_invalid(_: HTTPRequest, invalid: RequestValidationError) -> Response:
    problem = invalid.errors()[0]
    where = [str(part) for part in problem["loc"] if part not in ("body", "query", "path")]
    if problem["type"] == "json_invalid":
        param, message = None, f"the body is no valid JSON: {problem['ctx']['error']}"
    elif not where:
        param, message = None, "the body has to be a JSON object, sent with content-type: application/json"
    else:
        param, message = where[0], f"{'.'.join(where)}: {problem['msg']}"
    error = InvalidRequestError(message)
    sent = invalid.body if isinstance(invalid.body, dict) else {}
    ids = {
        name: str(sent[name])[:200] for name in ("request_id", "session_id") if isinstance(sent.get(name), str | int)
    }
    facts.get({}).update(ids, error=type(error).__name__)
    return JSON(error_body(error, param), status_code=error.status_code)


_DOOR_ERRORS = {kind.status_code: kind for kind in (RequestIncompleteError, RequestTooLargeError)}
"""What the door raises while the body is read, where only an HTTPException gets through FastAPI."""


async def _on_http(_: HTTPRequest, error: HTTPException) -> Response:
    kind = _DOOR_ERRORS.get(error.status_code, HTTPException)
    facts.get({}).update(error=kind.__name__)
    detail = {"message": str(error.detail), "type": kind.__name__, "param": None, "code": error.status_code}
    return JSON({"error": detail}, status_code=error.status_code, headers=error.headers)
