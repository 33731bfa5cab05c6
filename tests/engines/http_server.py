"""A small server that speaks OpenAI's protocol in the dialects of several real ones, on a real socket.

Its model is a function of the text so far, so a test knows that a continued answer is right by comparing it to a whole
one. Words are ASCII, Chinese and emoji; half of an emoji is a token. What it is to do wrong stands in `Toy.script`.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import random
import re
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from zlib import crc32

from aiohttp import web

Dialect = Literal["lmdeploy", "old-lmdeploy", "vllm", "openai"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MODEL = "toy"
EOS = b""
_WORDS = (
    *(" the", " capital", " of", " France", " is", " Paris", " and", " once", " upon", " time", " there", " was"),
    *(" 你好", " 世界", " 😀", " 🚀", " a", " king"),
)
_TOKEN = re.compile(r" ?[\x00-\x1f!-~]+| ?[^\x00-\x7f\U00010000-\U0010ffff]|.", re.DOTALL)

_COMMON = {"model", "max_tokens", "temperature", "top_p", "stop", "stream", "seed", "stream_options"}
_FIELDS: dict[Dialect, dict[str, set[str]]] = {
    "lmdeploy": {
        "/v1/chat/completions": _COMMON
        | {"messages", "input_ids", "top_k", "repetition_penalty", "ignore_eos", "min_new_tokens"}
        | {"return_token_ids", "logprobs", "return_logprob"},
        "/v1/completions": _COMMON | {"prompt", "top_k", "repetition_penalty", "ignore_eos", "logprobs"},
        "/generate": {"prompt", "input_ids", "max_tokens", "temperature", "top_p", "top_k", "stop", "stream"}
        | {"repetition_penalty", "ignore_eos", "return_logprob"},
        "/v1/encode": {"input", "add_bos"},
    },
    "old-lmdeploy": {
        "/v1/chat/completions": (_COMMON - {"stream_options", "seed"})
        | {"messages", "top_k", "repetition_penalty", "ignore_eos", "logprobs", "top_logprobs"},
        "/v1/completions": (_COMMON - {"stream_options", "seed"})
        | {"prompt", "top_k", "repetition_penalty", "ignore_eos", "logprobs"},
        "/v1/chat/interactive": {"prompt", "session_id", "interactive_mode", "stream", "request_output_len"},
        "/v1/encode": {"input", "add_bos"},
    },
    "vllm": {
        "/v1/chat/completions": _COMMON
        | {"messages", "top_k", "repetition_penalty", "ignore_eos", "min_tokens", "return_token_ids", "logprobs"}
        | {"continue_final_message", "add_generation_prompt", "presence_penalty", "frequency_penalty"}
        | {"response_format", "top_logprobs"},
        "/v1/completions": _COMMON
        | {"prompt", "top_k", "repetition_penalty", "ignore_eos", "min_tokens", "return_token_ids", "logprobs"}
        | {"presence_penalty", "frequency_penalty", "response_format"},
        "/tokenize": set(),
    },
    "openai": {},
}


def tokenize(text: str) -> list[bytes]:
    """Return the tokens of a text. Those of two texts, one after the other, are those of both together."""
    tokens = []
    for piece in _TOKEN.findall(text):
        encoded = piece.encode()
        tokens += [encoded[:2], encoded[2:]] if piece > "\uffff" else [encoded]
    return tokens


def token_id(token: bytes) -> int:
    """Return the id of a token."""
    return crc32(token) & 0x7FFFFFFF


def next_word(text: str, seed: int) -> str:
    """Return what the model says after `text`: a word, or the rest of one."""
    start = max(text.rfind(" "), text.rfind(">") + 1, 0)
    for cut in (start, len(text)):
        word = _WORDS[crc32(text[:cut].encode(), seed) % len(_WORDS)]
        if text[:cut].endswith(">"):
            word = word[1:]
        if word.startswith(text[cut:]) and word != text[cut:]:
            return word[len(text) - cut :]
    raise AssertionError("unreachable: every word begins with nothing")


def generate(prompt: str, seed: int, min_tokens: int) -> Iterator[bytes]:
    """Yield the tokens of an answer; `EOS` now and then, for whoever minds it."""
    text, num_tokens = prompt, 0
    while True:
        if num_tokens >= min_tokens and crc32(text.encode(), seed + 1) % 23 == 0:
            yield EOS
        word = next_word(text, seed)
        for token in tokenize(word):
            num_tokens += 1
            yield token
        text += word


def render(messages: Sequence[dict[str, str]], *, open_end: bool) -> str:
    """Return a conversation as one prompt. With `open_end` a last message of the assistant goes on."""
    text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages)
    return text[:-1] if open_end and messages[-1]["role"] == "assistant" else f"{text}<assistant>"


def sse(*events: object, end: bytes = b"\n\n") -> bytes:
    """Return events as they stand in a stream; a str stands there as it is."""
    return b"".join(
        b"data: " + (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)).encode() + end
        for event in events
    )


def chunk(text: str | None, finish_reason: str | None = None, **more: object) -> dict[str, Any]:
    """Return an event of `/v1/completions`."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], **more}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Return the event with the token counts."""
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [], "usage": counts}


def answer(status: int, body: object, content_type: str = "application/json", **headers: str) -> Handler:
    """Return a handler that answers with one document."""

    async def handle(request: web.Request) -> web.StreamResponse:
        text = body if isinstance(body, str) else json.dumps(body)
        shown = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, text=text, content_type=content_type, headers=shown)

    return handle


def stream(*parts: bytes, then: Literal["end", "reset", "stall"] = "end", gzip: bool = False) -> Handler:
    """Return a handler that sends these parts, each on its own, and then ends, resets the connection or stalls."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if gzip:
            response.enable_compression(web.ContentCoding.gzip)
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)  # so that the parts arrive apart
        if then == "stall":
            await asyncio.Event().wait()
        if then == "reset" and request.transport is not None:
            request.transport.abort()
        return response

    return handle


@dataclass
class Toy:
    """One server.

    Attributes:
        dialect: Whose server it plays.
        model: Name of its model; it has a second one, `other`.
        api_key: The key that it asks for; None: none.
        max_context: Prompt and generated tokens together.
        tokens_per_s: Of each stream.
        script: What happens to the next generations, in order; the ones after that are answered well.
        calls: Path and body of each generation so far, scripted ones too.
        num_running: Generations under way.
        healthy: What `/health` says.
        url: Where it is, once it runs.
    """

    dialect: Dialect = "lmdeploy"
    model: str = MODEL
    api_key: str | None = None
    max_context: int = 1024
    tokens_per_s: float = 500
    script: list[Handler] = field(default_factory=list)
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    num_running: int = 0
    healthy: bool = True
    url: str = ""

    @asynccontextmanager
    async def running(
        self, port: int = 0, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> AsyncIterator[Toy]:
        """Serve as long as the context lasts."""
        application = web.Application(middlewares=[self._authenticate])
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/health", self._health)
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/chat/interactive", "/generate"):
            application.router.add_post(path, self._generate)
        if self.dialect != "openai":
            application.router.add_get("/openapi.json", self._openapi)
            application.router.add_post("/v1/encode", self._encode)
            application.router.add_post("/tokenize", self._tokenize)
            application.router.add_get("/version", self._version)
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, host, port, ssl_context=tls)
        await site.start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    @contextmanager
    def in_thread(self) -> Iterator[Toy]:
        """Serve from a thread with a loop of its own, as long as the context lasts."""
        started, stop = threading.Event(), asyncio.Event()
        loop = asyncio.new_event_loop()

        async def serve() -> None:
            async with self.running():
                started.set()
                await stop.wait()

        thread = threading.Thread(target=loop.run_until_complete, args=[serve()], name="toy server")
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()

    @web.middleware
    async def _authenticate(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"message": "Unauthorized.", "code": 401, "object": "error"}, status=401)
        return await handler(request)

    async def _models(self, _: web.Request) -> web.Response:
        owner = {"old-lmdeploy": "lmdeploy", "openai": "somebody"}.get(self.dialect, self.dialect)
        cards = [{"id": name, "object": "model", "owned_by": owner} for name in (self.model, "other")]
        if self.dialect == "vllm":
            cards[0]["max_model_len"] = self.max_context  # type: ignore[assignment]
        return web.json_response({"object": "list", "data": cards})

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"status": "healthy"} if self.healthy else {"message": "engine is dead"},
            status=200 if self.healthy else 503,
        )

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.11.0"})

    async def _openapi(self, _: web.Request) -> web.Response:
        paths: dict[str, Any] = {"/version": {"get": {}}} if self.dialect == "vllm" else {}
        schemas = {}
        for number, (path, fields) in enumerate(_FIELDS[self.dialect].items()):
            schema = {"$ref": f"#/components/schemas/Body{number}"}
            paths[path] = {"post": {"requestBody": {"content": {"application/json": {"schema": schema}}}}}
            schemas[f"Body{number}"] = {"type": "object", "properties": {name: {} for name in fields}}
        return web.json_response({"paths": paths, "components": {"schemas": schemas}})

    async def _encode(self, request: web.Request) -> web.Response:
        tokens = tokenize((await request.json())["input"])
        self._vocabulary |= {token_id(token): token for token in tokens}
        return web.json_response({"input_ids": [token_id(token) for token in tokens], "length": len(tokens)})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        tokens = tokenize(body["prompt"] if "prompt" in body else render(body["messages"], open_end=False))
        self._vocabulary |= {token_id(token): token for token in tokens}
        return web.json_response({"tokens": [token_id(token) for token in tokens], "count": len(tokens)})

    _vocabulary: dict[int, bytes] = field(default_factory=dict)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls.append((request.path, body))
        self.num_running += 1
        try:
            if self.script:
                return await self.script.pop(0)(request)
            return await self._answer(request, body)
        finally:
            self.num_running -= 1

    async def answer_well(self, request: web.Request) -> web.StreamResponse:
        """Answer as a request that the script has nothing for: what a script may end with."""
        return await self._answer(request, await request.json())

    def _prompt(self, path: str, body: dict[str, Any]) -> str:
        prompt = body.get("prompt")
        if ids := prompt if isinstance(prompt, list) and path == "/v1/completions" else body.get("input_ids"):
            return b"".join(self._vocabulary[number] for number in ids).decode()
        if path in ("/v1/completions", "/generate"):
            return str(prompt)
        if path == "/v1/chat/interactive":
            return render(body["prompt"], open_end=False)
        open_end = self.dialect == "lmdeploy" or body.get("continue_final_message", False)
        return render(body["messages"], open_end=open_end)

    def _refused(self, status: int, message: str) -> web.Response:
        error = {"object": "error", "message": message, "type": "invalid_request_error", "code": status}
        # lmdeploy before 0.5 said so with status 200.
        return web.json_response(error, status=200 if self.dialect == "old-lmdeploy" else status)

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        path = request.path
        if path.startswith("/v1") and path != "/v1/chat/interactive" and body["model"] not in (self.model, "other"):
            return self._refused(404, f"The model {body['model']!r} does not exist.")
        prompt = self._prompt(path, body)
        prompt_tokens = len(tokenize(prompt))
        room = self.max_context - prompt_tokens
        if room < 1:
            return self._refused(
                400,
                f"Input length ({prompt_tokens}) must be smaller than the model context length ({self.max_context}).",
            )
        limit = min(body.get("max_tokens") or body.get("request_output_len") or 512, room)
        greedy = body.get("top_k") == 1 or body.get("temperature") == 0
        seed = 0 if greedy else body.get("seed", random.getrandbits(32)) % 2**32
        min_tokens = body.get("min_new_tokens") or body.get("min_tokens") or 0
        stop_words, end_words = body.get("stop") or [], []
        if "lmdeploy" in self.dialect:
            # Each token that has one of them in it ends the sequence, unless it is one of several tokens.
            stop_words, end_words = [], [word.encode() for word in stop_words if len(tokenize(word)) == 1]
        decode = codecs.getincrementaldecoder("utf-8")().decode
        tells_usage = (body.get("stream_options") or {}).get("include_usage")
        continuous = (body.get("stream_options") or {}).get("continuous_usage_stats")
        streamed = body.get("stream", False)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if streamed:
            await response.prepare(request)
        text, num_tokens, reason = "", 0, "length"
        for token in generate(prompt, seed, min_tokens):
            if num_tokens == limit:
                break
            if token == EOS or any(word in token for word in end_words):
                if body.get("ignore_eos"):
                    continue
                reason = "stop"
                break
            await asyncio.sleep(1 / self.tokens_per_s)
            num_tokens += 1
            self._vocabulary[token_id(token)] = token
            new = decode(token)
            if hit := next((word for word in stop_words if word in text + new), None):
                new = (text + new)[len(text) : (text + new).index(hit)]
                reason = "stop"
            text += new
            if streamed:
                event = self._event(path, body, new, [token], None, prompt_tokens, num_tokens)
                if continuous:
                    event |= {"usage": usage(prompt_tokens, num_tokens)["usage"]}
                await self._send(response, path, event)
            if hit:
                break
        counts = usage(prompt_tokens, num_tokens)["usage"]
        if not streamed:
            if path == "/v1/chat/interactive":
                return web.json_response({"text": text, "tokens": num_tokens, "input_tokens": prompt_tokens})
            if path == "/generate":
                return web.json_response({"text": text, "meta_info": counts})
            return web.json_response({"choices": [{"text": text, "finish_reason": reason}], "usage": counts})
        await self._send(response, path, self._event(path, body, "", [], reason, prompt_tokens, num_tokens))
        if tells_usage:
            await self._send(response, path, {"choices": [], "usage": counts})
        if path != "/v1/chat/interactive":
            await response.write(sse("[DONE]"))
        return response

    async def _send(self, response: web.StreamResponse, path: str, event: dict[str, Any]) -> None:
        if path == "/v1/chat/interactive":
            await response.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")
        else:
            await response.write(sse(event))

    def _event(
        self,
        path: str,
        body: dict[str, Any],
        text: str,
        tokens: list[bytes],
        reason: str | None,
        prompt_tokens: int,
        num_tokens: int,
    ) -> dict[str, Any]:
        if path == "/v1/chat/interactive":
            return {"text": text, "tokens": num_tokens, "input_tokens": prompt_tokens, "finish_reason": reason}
        if path == "/generate":
            ids = [token_id(token) for token in tokens]
            meta: dict[str, Any] = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
            meta["finish_reason"] = reason and {"type": reason}
            if body.get("return_logprob") and ids:
                meta["output_token_logprobs"] = [(-(number % 7) / 10, number) for number in ids]
            return {"text": text, "output_ids": ids, "meta_info": meta}
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if path == "/v1/completions":
            choice["text"] = text
        else:
            choice["delta"] = {"role": "assistant", "content": text}
        ids = [token_id(token) for token in tokens]
        logprobs = [-(number % 7) / 10 for number in ids]
        if body.get("return_token_ids"):
            choice["token_ids" if self.dialect == "vllm" else "output_ids"] = ids
        if body.get("return_logprob"):
            choice["output_token_logprobs"] = list(zip(logprobs, ids, strict=True))
        elif body.get("logprobs") and path == "/v1/completions":
            told = list(zip(map(repr, tokens), logprobs, strict=True))
            others = {f"other {n}": -3.0 - n for n in range(body["logprobs"])}
            choice["logprobs"] = {
                "token_logprobs": logprobs,
                "tokens": [token for token, _ in told],
                "top_logprobs": [{**others, token: logprob} for token, logprob in told],
            }
        elif body.get("logprobs"):
            others = {f"other {n}": -3.0 - n for n in range(body.get("top_logprobs") or 0)}
            choice["logprobs"] = {
                "content": [
                    {
                        "token": repr(token),
                        "logprob": logprob,
                        "top_logprobs": [
                            {"token": name, "logprob": value}
                            for name, value in {**others, repr(token): logprob}.items()
                        ],
                    }
                    for token, logprob in zip(tokens, logprobs, strict=True)
                ]
            }
        return {"id": "1", "object": "chunk", "choices": [choice]}
