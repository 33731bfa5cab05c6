"""HTTPEngine: a client of an lmdeploy api_server of any version, or of any server that speaks OpenAI's protocol.

    sse.py       bytes -> events
    dialects.py  what a server understands; request -> route and body; event -> text, tokens, finish reason
    upstream.py  what failures are here, and the circuit breaker
    this file    connections, retries, and pieces -> deltas

aiohttp streams the answers: 256 of them are 256 tasks on one loop and one bounded pool of connections. requests asks
what the server is, once and in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import aiohttp
import msgspec
import requests
import urllib3

from raylm.config import HTTPConfig
from raylm.engines.base import Emit
from raylm.engines.dialects import (
    ENCODE,
    INTERACTIVE,
    READERS,
    TOKENIZE,
    Call,
    ErrorEventError,
    MetaInfo,
    Piece,
    Server,
    TokenCounts,
    ask_for_tokens,
    describe,
    plan,
)
from raylm.engines.sse import EventParser, LineParser
from raylm.engines.text import StopWords
from raylm.engines.upstream import CONNECT, NOT_HTTP, SILENT, TLS, Breaker, excerpt, refusal, translate
from raylm.engines.watch import Watch
from raylm.errors import (
    EngineError,
    EngineStartError,
    InvalidRequestError,
    ProtocolError,
    RaylmError,
    RequestTimeoutError,
    UpstreamError,
)
from raylm.messages import (
    Candidates,
    Delta,
    Details,
    EngineInfo,
    EngineStatistics,
    FinishReason,
    Generated,
    Request,
    Usage,
)

_UNKNOWN_CONTEXT = 1 << 20  # tokens; the server itself refuses what is too long

_MAX_TRIES = 3  # of a request of which nothing was generated
_RETRY_S = 0.2  # before the second try, twice that before the third, where the server names no time
_MAX_RETRY_AFTER_S = 5.0  # a longer wait is the pool's, which has other servers

_HEALTH_TIMEOUT_S = 5.0  # shorter than the pool takes an actor to hang
_DRAIN_S = 1.0  # for the end of a body whose last event has come; then the connection is closed, not used again
_MAX_ERROR_BYTES = 1 << 16
_KEEPALIVE_S = 4.0  # uvicorn closes an idle connection after 5; this side has to be the first

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class _DivergedError(Exception):
    """An answer that was generated again does not begin with what the client has of it already."""


class _Generation:
    """Turns the pieces of one answer into deltas.

    A delta counts only tokens whose text has been shown to its end. So when the answer is continued elsewhere, from its
    text, what was held back is generated and counted again, and not twice.
    """

    def __init__(self, request: Request, emit: Emit, call: Call) -> None:
        generated = request.generated or Generated("", [], 0)
        self._emit = emit
        self._num_before = call.num_before
        self._stop_words = StopWords(request.config.stop_words)
        self._skip = call.skip
        self._num_tokens = call.num_before  # that came
        self._num_shown = generated.num_tokens  # ... and whose text is out
        self._held = ""  # text that the stop words have let go of, of a token that they have not
        # Of each token whose text is not out: how much text is before its end, and the tokens and ids up to there.
        self._ends: deque[tuple[int, int, int]] = deque()
        self._num_fed = 0  # characters
        self._num_emitted = 0
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._token_texts: list[str] = []  # of each of those, if the server tells
        self._top_logprobs: list[Candidates] = []
        self._num_candidates = request.config.top_logprobs
        self._num_ids_out = generated.num_tokens - call.num_before  # of `_token_ids`; earlier attempts told the first
        self._num_ids_shown = self._num_ids_out
        self._finish_reason: FinishReason | None = None
        self.usage: TokenCounts | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that came in this call."""
        return self._num_tokens - self._num_before

    @property
    def finished(self) -> bool:
        """Whether the text is whole."""
        return self._finish_reason is not None

    def advance(self, pieces: list[Piece]) -> bool:
        """Take what came, and emit what may be shown of it. Return whether a stop word ended the text.

        Raises:
            _DivergedError: the answer does not begin with what the client has already.
        """
        hit = False
        for piece in pieces:
            self._count(piece)
            if text := piece.text:
                if self._skip:
                    text = self._skip_over(text)
                out, hit = self._stop_words.feed(text)
                self._held += out
                if hit:
                    self._finish_reason = "stop"
                    break
                self._num_fed += len(text)
                if not self._skip:
                    self._ends.append((self._num_fed, self._num_tokens, len(self._token_ids)))
            if piece.finish_reason is not None:
                self._finish_reason = piece.finish_reason
        self._emit_whole_tokens()
        return hit

    def _emit_whole_tokens(self) -> None:
        """Emit the text up to the end of a token: cut within one, it would be continued with other tokens."""
        end = self._num_emitted
        while self._ends and self._ends[0][0] <= self._num_emitted + len(self._held):
            end, num_tokens, self._num_ids_shown = self._ends.popleft()
            self._num_shown = max(self._num_shown, num_tokens)
        if end > self._num_emitted:
            length = end - self._num_emitted
            shown, self._held = self._held[:length], self._held[length:]
            self._num_emitted = end
            self._emit(self._delta(shown, self._num_shown))

    def _count(self, piece: Piece) -> None:
        counts = piece.usage
        if piece.token_ids:
            self._num_tokens += len(piece.token_ids)
            self._token_ids += piece.token_ids
            self._logprobs += piece.logprobs
            if piece.token_texts:
                self._token_texts += piece.token_texts
                self._top_logprobs += [ranked[: self._num_candidates] for ranked in piece.top_logprobs]
        elif counts is None or not counts.completion_tokens:
            self._num_tokens += piece.num_tokens
        if counts is not None:
            self.usage = counts
            self._num_tokens = max(self._num_tokens, self._num_before + counts.completion_tokens)

    def _skip_over(self, text: str) -> str:
        """Return what of `text` the client does not have."""
        if self._skip.startswith(text):
            self._skip = self._skip[len(text) :]
            return ""
        if text.startswith(self._skip):
            text, self._skip = text[len(self._skip) :], ""
            return text
        raise _DivergedError

    def _delta(self, text: str, num_tokens: int) -> Delta:
        start, end = self._num_ids_out, max(self._num_ids_out, self._num_ids_shown)
        self._num_ids_out = end
        delta = Delta(text, num_tokens, tuple(self._token_ids[start:end]), tuple(self._logprobs[start:end]))
        if self._token_texts:
            candidates = self._top_logprobs[start:end] if self._num_candidates else ()
            delta.details = Details(tuple(self._token_texts[start:end]), tuple(candidates))
        return delta

    def finish(self, usage: TokenCounts) -> None:
        """Emit the last delta.

        Raises:
            _DivergedError: the answer ended before what the client has already.
        """
        if self._skip:
            raise _DivergedError
        num_tokens = max(self._num_shown, self._num_tokens)
        self._num_ids_shown = len(self._token_ids)
        last = self._delta(self._held + self._stop_words.flush(), num_tokens)
        last.finish_reason = self._finish_reason
        prompt_tokens = max(0, usage.prompt_tokens - self._num_before)
        last.usage = Usage(prompt_tokens, num_tokens, usage.cached_tokens)
        self._emit(last)


class HTTPEngine:
    """Generates at a server that speaks OpenAI's protocol, and knows the extensions of lmdeploy, vllm and sglang.

    Messages go to the server as they are, and its own chat template renders them; raw prompts go as they are, too.
    Sessions at a server of lmdeploy before 0.5 (`interactive_mode`) are not used, though `Request.session_id` could
    name them: such a session lives in one server's memory and ends with it, and a turn that is sent again after a fault
    would be in it twice. The whole transcript is sent each time; a server's prefix cache makes that cheap.

    Token counts are the server's. While an answer streams from a server that tells them at the end, an event counts as
    a token. A server that tells none in its streams is asked for them afterwards; `Usage.prompt_tokens` is 0 where it
    does not tell even then.

    Reasoning that a server tells apart from the text (`reasoning_content`) comes before it as text of the same answer:
    the model wrote it, and its tokens are counted. The marks around it are not told.

    An answer is continued from the text of its earlier attempt. It arrives at the greedy text of an undisturbed one
    where the tokenizer cuts that text into the tokens that the model wrote. One with a repetition penalty is generated
    again from its start at a server of lmdeploy, which would not penalise the tokens of the earlier attempt; if it
    begins otherwise then, it is continued all the same.

    Args:
        config: Which server and model.

    Source: lmdeploy 0.4 to 0.18, `lmdeploy.serve.openai`.
    """

    def __init__(self, config: HTTPConfig) -> None:
        self._config = config
        self._url = base_url(config.url)
        self._session: aiohttp.ClientSession | None = None
        self._server: Server | None = None
        self._model = ""
        self._slots = asyncio.Semaphore(config.capacity)
        self._running: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._breaker = Breaker()
        self._probing = False
        self._num_tokens = 0
        self._heard_at = 0.0  # when the latest token of any request came

    async def start(self) -> EngineInfo:
        """Ask the server what it is. See `engines.base.Engine.start`. After a failure it may be called again.

        Raises:
            EngineStartError: the server is not there, refuses the key, or does not serve the model.
        """
        config = self._config
        tls = await asyncio.to_thread(_tls_context, config)
        server = await asyncio.to_thread(probe, self._url, config)
        if config.model_name is not None and config.model_name not in server.models:
            raise EngineStartError(
                f"{self._url} does not serve {config.model_name!r}; set model_name to one of {', '.join(server.models)}"
            )
        self._server = server
        self._model = config.model_name or server.models[0]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=config.capacity + 2,  # every request, and a health check
                ssl=tls,
                keepalive_timeout=_KEEPALIVE_S,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Content-Type": "application/json", **_authorization(config)},
            timeout=self._timeouts(config.idle_timeout_s),
        )
        return EngineInfo(
            engine="http",
            engine_version=server.version,
            model=self._model,
            max_context=config.max_context or server.max_context or _UNKNOWN_CONTEXT,
            capacity=config.capacity,
            device=f"http {server.kind} at {self._url}",
        )

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate one request. See `engines.base.Engine.generate`. Cancelling it closes the connection.

        Raises:
            InvalidRequestError: the server refuses the request. ContextLengthError, ModelNotFoundError (404) or
                RequestTooLargeError (413) where it says that.
            AuthenticationError: the server refuses the key.
            PoolSaturatedError: the server is full; `retry_after_s` says for how long, where it tells.
            EngineError: the server has let go of the request (408, 499).
            UpstreamError: the server failed, or has failed so often that it is not tried at present; or the answer
                cannot be continued exactly.
            ProtocolError: what the server sends cannot be understood.
            RequestTimeoutError: the server was silent for `idle_timeout_s`: after the first token of this request, or
                towards all requests of this engine.
        """
        _check(request)
        # A timeout that `close` sets off: it ends the request wherever it waits, and is no cancellation by the caller.
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._running.add(scope)
                async with self._slots:
                    await self._generate(request, emit)
        except TimeoutError:
            raise _not_running() from None
        except _DivergedError:
            raise UpstreamError(
                "the answer could not be continued exactly: the server does not continue messages, and generated again "
                "it begins otherwise. Send the request again, or set a meta_template, which makes messages one prompt"
            ) from None
        finally:
            self._running.discard(scope)
            if not self._running:
                self._idle.set()

    async def _generate(self, request: Request, emit: Emit) -> None:
        server = self._server
        if server is None:
            raise _not_running()
        call = plan(server, self._model, request)
        await self._pass_breaker()
        with self._blaming():
            if request.generated and request.generated.num_tokens >= request.config.max_new_tokens:
                counts = await self._count_prompt(
                    plan(server, self._model, msgspec.structs.replace(request, generated=None))
                )
                num_tokens = request.generated.num_tokens
                usage = Usage(counts.prompt_tokens, num_tokens, counts.cached_tokens)
                emit(Delta("", num_tokens, finish_reason="length", usage=usage))
            else:
                try:
                    await self._stream(call, _Generation(request, emit, call))
                except _DivergedError:  # before anything was emitted
                    call = plan(server, self._model, request, repeat=False)
                    if call.skip:
                        raise
                    await self._stream(call, _Generation(request, emit, call))
        self._breaker.succeed()

    async def _stream(self, call: Call, generation: _Generation) -> None:
        body = await self._body(call)
        idle_timeout_s = self._config.idle_timeout_s
        try:
            async with asyncio.timeout(None) as scope:
                watch = Watch(partial(scope.reschedule, 0), idle_timeout_s, lambda: self._heard_at)
                try:
                    await self._read(call, body, generation, watch)
                finally:
                    watch.stop()
        except TimeoutError:
            if not watch.expired:
                raise
            raise RequestTimeoutError(
                SILENT.format(url=self._url, error="no event", idle_timeout_s=idle_timeout_s)
            ) from None

    async def _read(self, call: Call, body: bytes, generation: _Generation, watch: Watch) -> None:
        time = asyncio.get_running_loop().time
        lines = call.path == INTERACTIVE
        parser: EventParser | LineParser = LineParser() if lines else EventParser()
        read = READERS[call.path]
        done = stopped = ended = False
        async with self._post(call.path, body, watch) as response:
            content = response.content
            while not (done or stopped or ended):
                chunk = await content.readany()
                watch.heard_at = time()
                ended = not chunk
                pieces = []
                for event in parser.finish() if ended else parser.feed(chunk):
                    if event == b"[DONE]":
                        done = True
                        break
                    try:
                        pieces.append(read(event))
                    except ErrorEventError as error:
                        raise self._refusal(None, error.body) from None
                if pieces:
                    watch.begun = True
                    self._heard_at = watch.heard_at
                    before = generation.num_tokens
                    stopped = generation.advance(pieces)
                    self._num_tokens += generation.num_tokens - before
            watch.stop()
            if stopped:
                response.close()  # a server that does not know this stop word would go on
            elif not done and not lines:
                raise ProtocolError(f"{self._url} ended an answer without [DONE]; look into its log")
            elif not generation.finished:
                raise ProtocolError(f"{self._url} ended an answer without a finish reason; look into its log")
            generation.finish(generation.usage or await self._count_prompt(call))
            if done and not stopped:
                # A connection is used again when its body has been read to the end.
                with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                    async with asyncio.timeout(_DRAIN_S):
                        await content.readany()

    async def _count_prompt(self, call: Call) -> TokenCounts:
        """Return the prompt's length, as the generation of one token tells it. 0 where that fails.

        The answer is whole by then: raised, a failure here would have it continued after its end.
        """
        counting = call.counting()
        try:
            async with self._post(counting.path, await self._body(counting)) as response:
                answer = await response.read()
            counted = msgspec.json.decode(answer, type=_Counted)
        except (RaylmError, aiohttp.ClientError, msgspec.DecodeError, UnicodeDecodeError) as error:
            _log.warning("%s did not tell the length of a prompt, which is given as 0: %s", self._url, error)
            return TokenCounts()
        return counted.usage or TokenCounts(counted.input_tokens or counted.meta_info.prompt_tokens)

    async def _body(self, call: Call) -> bytes:
        """Return a call's body as JSON."""
        if call.encode is None:
            return _to_json(call.body)
        return _to_json({**call.body, "input_ids": await self._ask_tokens(ENCODE, {"input": call.encode})})

    @contextlib.asynccontextmanager
    async def _post(self, path: str, body: bytes, watch: Watch | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, again where nothing came of it, and yield the answer once it is no refusal.

        Args:
            path: The route.
            body: What to send.
            watch: Has an eye on the answer, which is a stream then.
        """
        timeouts = self._timeouts(None if watch else self._config.idle_timeout_s)
        for tries in range(1, _MAX_TRIES + 1):
            if self._session is None:
                raise _not_running()
            wait_s = _RETRY_S * 2 ** (tries - 1)
            try:
                response = await self._session.post(
                    self._url + path, data=body, allow_redirects=False, timeout=timeouts
                )
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                if tries == _MAX_TRIES or isinstance(error, aiohttp.ClientSSLError):
                    raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError):
                # As a rule an idle connection that the server closed just now. Twice is no accident: a prompt that
                # kills servers shall not have many.
                if tries > 1:
                    raise
                wait_s = 0.0
            else:
                try:
                    if response.status == requests.codes.ok and not (watch and _is_document(response)):
                        yield response
                        return
                    refused = self._refusal(
                        None if response.status == requests.codes.ok else response.status,
                        await _beginning(response),
                        response.headers.get("Retry-After"),
                    )
                finally:
                    response.release()
                if refused.retry_after_s is not None:
                    wait_s = refused.retry_after_s
                if tries == _MAX_TRIES or response.status not in (429, 503) or wait_s > _MAX_RETRY_AFTER_S:
                    raise refused
            if watch is not None:
                watch.heard_at = asyncio.get_running_loop().time() + wait_s
            await asyncio.sleep(wait_s)

    def _timeouts(self, idle_timeout_s: float | None) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_timeout_s, sock_read=idle_timeout_s)

    async def tokenize(self, request: Request) -> tuple[int, ...]:
        """Return the ids of the prompt's tokens, where the server has a route that tells them.

        Raises:
            InvalidRequestError: it has none, and cannot count tokens; or as for `generate`.
        """
        _check(request)
        if self._server is None:
            raise _not_running()
        if request.prompt_token_ids is not None:
            return request.prompt_token_ids
        path, body = ask_for_tokens(self._server, self._model, request)
        await self._pass_breaker()
        with self._blaming():
            token_ids = await self._ask_tokens(path, body)
        self._breaker.succeed()
        return tuple(token_ids)

    async def _ask_tokens(self, path: str, body: dict[str, Any]) -> list[int]:
        async with self._post(path, _to_json(body)) as response:
            answer = await response.read()
        try:
            counted = msgspec.json.decode(answer, type=_Encoded)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._refusal(None, answer) from None
        if not (token_ids := counted.tokens if path == TOKENIZE else counted.input_ids):
            raise ProtocolError(f"{self._url}{path} answered without tokens: {excerpt(answer)}")
        return token_ids

    async def check_health(self) -> None:
        """Return when the server says that it works. A server that is down is no reason to replace this client.

        Raises:
            UpstreamError: the server is down, or says that it does not work.
            EngineError: the engine has not started, or was closed.
        """
        if self._session is None or self._server is None:
            raise _not_running()
        url = self._url + self._server.health_path
        failed: RaylmError | None = None
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S), self._session.get(url, allow_redirects=False) as response:
                if not response.ok:
                    failed = self._refusal(response.status, await _beginning(response))
        except TimeoutError:
            failed = UpstreamError(
                f"{url} did not answer in {_HEALTH_TIMEOUT_S:g} s; look at the server's load and log"
            )
        except aiohttp.ClientError as error:
            failed = UpstreamError(translate(error, self._url, self._config.idle_timeout_s).message)
        if isinstance(failed, UpstreamError):
            self._breaker.fail(failed, time.monotonic())
            raise failed
        if self._breaker.open:  # else failures count on: a server may be healthy by its own word alone
            self._breaker.succeed()

    def statistics(self) -> EngineStatistics:
        """Return the load. The cache is the server's own matter."""
        return EngineStatistics(num_running=len(self._running), num_tokens=self._num_tokens)

    async def close(self) -> None:
        """Close all connections, upon which the server aborts. Requests that still run fail with EngineError."""
        session, self._session, self._server = self._session, None, None
        if self._running:
            self._idle.clear()
            for scope in self._running:
                if not scope.expired():
                    scope.reschedule(0)
            await self._idle.wait()
        if session is not None:
            await session.close()

    async def _pass_breaker(self) -> None:
        """Return when the server may be tried. While the breaker is open, whoever comes when a probe is due makes it.

        Raises:
            UpstreamError: the breaker is open.
        """
        breaker = self._breaker
        if not breaker.open:
            return
        wait_s = breaker.wait_s(time.monotonic())
        if wait_s > 0 or self._probing:
            raise UpstreamError(
                f"{self._url} is not tried at present, for it failed several times in a row; the last time: "
                f"{breaker.last_error}",
                # Not for as long as the breaker is open: a health check may close it at any time.
                retry_after_s=min(max(_RETRY_S, wait_s), 1.0),
            )
        self._probing = True
        try:
            await self.check_health()
        finally:
            self._probing = False

    @contextlib.contextmanager
    def _blaming(self) -> Iterator[None]:
        """Translate errors, and tell the breaker of those that are the server's fault. A refusal is none."""
        try:
            yield
        except (UpstreamError, RequestTimeoutError) as error:
            self._breaker.fail(error, time.monotonic())
            raise
        except RaylmError:
            self._breaker.succeed()
            raise
        except aiohttp.ClientError as error:
            translated = translate(error, self._url, self._config.idle_timeout_s)
            self._breaker.fail(translated, time.monotonic())
            raise translated from error

    def _refusal(self, status: int | None, body: bytes, retry_after: str | None = None) -> RaylmError:
        models = self._server.models if self._server else ()
        return refusal(self._url, status, body, models=models, retry_after=retry_after)


class _Counted(msgspec.Struct):
    usage: TokenCounts | None = None
    input_tokens: int = 0
    meta_info: MetaInfo = MetaInfo()


class _Encoded(msgspec.Struct):
    input_ids: list[int] = []  # lmdeploy's name
    tokens: list[int] = []  # the others'


def _to_json(body: dict[str, Any]) -> bytes:
    try:
        return _encode(body)
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"a text of the request is no valid Unicode: {error}; repair it") from None


def base_url(url: str) -> str:
    """Return `url` with a scheme, and without `/v1` and slashes at its end."""
    full = url if "://" in url else f"http://{url}"
    return full.rstrip("/").removesuffix("/v1").rstrip("/")


def probe(url: str, config: HTTPConfig) -> Server:
    """Ask a server what it is. Blocks; a server that does not listen yet has `connect_timeout_s` to begin.

    Raises:
        EngineStartError: it is not there, refuses the key, or is no server of this kind.
    """
    hint = "give the url of an lmdeploy api_server, or of another server that speaks OpenAI's protocol"
    with requests.Session() as session:
        session.trust_env = False  # a netrc would replace the key, and aiohttp asks no proxy either
        session.headers.update(_authorization(config))
        session.verify = config.verify_tls and (config.ca_file or True)
        if not config.verify_tls:
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

        def get(path: str) -> requests.Response:
            timeouts = (config.connect_timeout_s, config.idle_timeout_s)
            return session.get(url + path, timeout=timeouts, allow_redirects=False)

        give_up_at = time.monotonic() + config.connect_timeout_s
        while True:
            try:
                models = get("/v1/models")
                break
            except requests.exceptions.SSLError as error:
                raise EngineStartError(TLS.format(url=url, error=error)) from error
            except requests.ConnectionError as error:
                if time.monotonic() > give_up_at:
                    raise EngineStartError(CONNECT.format(url=url, error=error)) from error
                time.sleep(_RETRY_S)
            except requests.RequestException as error:
                raise EngineStartError(NOT_HTTP.format(url=url, error=error)) from error
        if models.status_code in (401, 403):
            raise EngineStartError(f"{url} refuses the API key; set api_key to one that the server knows")
        if models.status_code != requests.codes.ok:
            raise EngineStartError(f"{url}/v1/models answered {models.status_code}: {excerpt(models.content)}; {hint}")

        def ask(path: str) -> Any:
            """Return the JSON at `path`; None where there is none, and the server's kind has to tell."""
            try:
                answer = get(path)
                return answer.json() if answer.ok else None
            except requests.RequestException:
                return None

        openapi = ask("/openapi.json")
        has_version = isinstance(openapi, dict) and "/version" in openapi.get("paths", {})
        version = ask("/version") if has_version else None
        try:
            return describe(models.json(), openapi, version)
        except (requests.exceptions.JSONDecodeError, ProtocolError) as error:
            raise EngineStartError(
                f"{url}/v1/models answered with something else ({error}): {excerpt(models.content)}; {hint}"
            ) from None


def _tls_context(config: HTTPConfig) -> ssl.SSLContext | bool:
    if not config.verify_tls or config.ca_file is None:
        return config.verify_tls
    try:
        return ssl.create_default_context(cafile=config.ca_file)
    except OSError as error:
        raise EngineStartError(f"ca_file {config.ca_file}: {error}; give a file of certificates in PEM") from error


def _authorization(config: HTTPConfig) -> dict[str, str]:
    return {} if config.api_key is None else {"Authorization": f"Bearer {config.api_key}"}


def _check(request: Request) -> None:
    if request.messages is None and not (request.prompt or request.prompt_token_ids):
        raise InvalidRequestError("the prompt is empty; send some text")
    if request.messages is not None and not request.messages:
        raise InvalidRequestError("messages is empty; send at least one")


def _not_running() -> EngineError:
    return EngineError("the engine is not running: it has not started, or was closed; start it")


def _is_document(response: aiohttp.ClientResponse) -> bool:
    """Whether an answer is one document where a stream was asked for."""
    return response.content_type in ("application/json", "text/html")


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    """Return as much of a body as an error message needs."""
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_ERROR_BYTES:
            break
    return body
