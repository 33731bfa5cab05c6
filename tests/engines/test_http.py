"""The HTTP engine against a real server on a socket, in several dialects and with scripted faults."""

import asyncio
import datetime
import email.utils
import ipaddress
import itertools
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import msgspec
import pytest
import requests
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from raylm.config import HTTPConfig
from raylm.engines import http
from raylm.engines.http import HTTPEngine, base_url
from raylm.engines.sse import EventParser, LineParser
from raylm.engines.upstream import ERRORS, Breaker, refusal, translate
from raylm.errors import (
    AuthenticationError,
    ContextLengthError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    ModelNotFoundError,
    PoolSaturatedError,
    ProtocolError,
    RaylmError,
    RequestTimeoutError,
    RequestTooLargeError,
    UpstreamError,
)
from raylm.messages import Generated, Message
from tests.ports import kept_port

from .conftest import Prompt, Record, ask, make_request, run, until
from .http_server import MODEL, Dialect, Handler, Toy, answer, chunk, render, sse, stream, tokenize, usage

STORY = "Once upon a time"
QUESTION = ask("What is the capital of France?")
DONE = sse(chunk("", "stop"), usage(4, 2), "[DONE]")

Start = Callable[..., Awaitable[tuple[Toy, HTTPEngine]]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts a server and an engine on it, and ends both after the test. The start itself has a minute."""
    async with AsyncExitStack() as stack:

        async def start(toy: Toy | None = None, **settings: object) -> tuple[Toy, HTTPEngine]:
            server = await stack.enter_async_context((toy or Toy()).running())
            config = HTTPConfig(**({"url": server.url, "api_key": server.api_key} | settings))
            engine = HTTPEngine(config.updated({"idle_timeout_s": 60}))
            await engine.start()
            engine._config = config
            stack.push_async_callback(engine.close)
            return server, engine

        yield start


# The stream parser


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_events_do_not_depend_on_how_the_body_is_cut(size: int, end: bytes) -> None:
    """Events come out the same from chunks of any size, with either line end; comments and other fields are no data."""
    body = ": comment\n\nevent: message\nid: 1\ndata: 你好 😀\n\ndata:two\ndata: lines\n\n\ndata: [DONE]\n\n"
    encoded = body.encode().replace(b"\n", end)
    parser = EventParser()
    events = [event for at in range(0, len(encoded), size) for event in parser.feed(encoded[at : at + size])]
    assert [event.decode() for event in events] == ["你好 😀", "two\nlines", "[DONE]"]


def test_event_that_the_body_does_not_end() -> None:
    """The last event counts though no blank line ends it."""
    parser = EventParser()
    assert parser.feed(b"data: [DONE]") == []
    assert parser.finish() == [b"[DONE]"]


@pytest.mark.parametrize("parser", [EventParser(), LineParser()], ids=["events", "lines"])
def test_endless_line(parser: EventParser | LineParser) -> None:
    """A line without end is an error and not all of the memory."""
    with pytest.raises(ProtocolError):
        assert [parser.feed(b"x" * (1 << 20)) for _ in range(100)] == []


def test_lines() -> None:
    """Lines come out whole; blank ones and the end of the last are no matter."""
    parser = LineParser()
    assert parser.feed('{"a": "你'.encode()[:-1]) == []
    assert [*parser.feed("你".encode()[-1:] + b'"}\n\n{}'), *parser.finish()] == ['{"a": "你"}'.encode(), b"{}"]


# Errors and the breaker


def tree(base: type[BaseException]) -> set[type[BaseException]]:
    """Return a class and all classes below it."""
    return {base}.union(*(tree(child) for child in base.__subclasses__()))


def test_every_error_of_aiohttp_is_in_the_table() -> None:
    """Each class of aiohttp's own tree has its place in the table, and the text names the server."""
    assert {kind for kind in tree(aiohttp.ClientError) if kind.__module__.startswith("aiohttp")} == set(ERRORS)
    for error, text in ERRORS.values():
        assert issubclass(error, RaylmError)
        assert "{url}" in text


def test_errors_say_what_happened() -> None:
    """A translated error is of its table's class and says why."""
    error = translate(aiohttp.ServerDisconnectedError(), "http://there", 1)
    assert isinstance(error, UpstreamError)
    assert "http://there" in str(error)
    assert "disconnected" in str(error)
    silent = translate(aiohttp.SocketTimeoutError("no news"), "http://there", 7)
    assert isinstance(silent, RequestTimeoutError)
    assert "7 s" in str(silent)


@pytest.mark.parametrize(
    ("status", "body", "kind", "text"),
    [
        (400, '{"message": "top_p must be in (0, 1]"}', InvalidRequestError, "top_p"),
        (400, '{"error": {"message": "too long", "code": "context_length_exceeded"}}', ContextLengthError, "too long"),
        (400, '{"message": "This model\'s maximum context length is 8 tokens"}', ContextLengthError, "8 tokens"),
        (422, '{"detail": [{"loc": ["body", "n"], "msg": "odd"}]}', InvalidRequestError, "odd"),
        (401, '{"detail": {"error": {"message": "no key"}}}', AuthenticationError, "no key"),
        (403, "<html><b>Forbidden</b></html>", AuthenticationError, "403: Forbidden"),
        (404, '{"error": "no such model"}', ModelNotFoundError, "served a, b"),
        (413, "", RequestTooLargeError, "nothing"),
        (413, '{"message": "maximum context length is 8"}', ContextLengthError, "8"),
        (408, "", EngineError, "nothing"),
        (429, "{}", PoolSaturatedError, "429"),
        (499, "{}", EngineError, "499"),
        (301, "", ProtocolError, "redirects"),
        (500, "Internal Server Error", UpstreamError, "Internal"),
        (503, '{"message": "asleep"}', UpstreamError, "asleep"),
        (None, '{"object": "error", "message": "bad", "code": 400}', InvalidRequestError, "bad"),
        (None, '{"error": {"message": "died", "type": "server_error"}}', UpstreamError, "died"),
        (None, "<html>Welcome</html>", ProtocolError, "Welcome"),
    ],
)
def test_refusals(status: int | None, body: str, kind: type[RaylmError], text: str) -> None:
    """Each status has its error, which carries what the server said."""
    error = refusal("http://there", status, body.encode(), models=["a", "b"])
    assert type(error) is kind
    assert text in str(error)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("-1", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None), (None, None)],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    """Seconds in Retry-After are carried on; a date that is past is now."""
    assert refusal("", 429, b"", retry_after=header).retry_after_s == seconds


def test_retry_after_a_date() -> None:
    """A date in Retry-After is carried on as the seconds until then."""
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=900)
    for usegmt in (True, False):
        seconds = refusal("", 503, b"", retry_after=email.utils.format_datetime(date, usegmt=usegmt)).retry_after_s
        assert seconds is not None
        assert 800 < seconds <= 900


def test_breaker() -> None:
    """It opens after failures in a row, waits twice as long after each failed probe, and closes with an answer."""
    breaker, error = Breaker(max_failures=3, delay_s=1, max_delay_s=3), UpstreamError("down")
    breaker.fail(error, 0)
    breaker.fail(error, 0)
    breaker.succeed()
    for _ in range(3):
        assert not breaker.open
        breaker.fail(error, 10)
    assert (breaker.open, breaker.wait_s(10.5)) == (True, 0.5)
    breaker.fail(error, 10.5)
    assert breaker.wait_s(10.5) == 0.5
    for at, wait_s in ((11, 2), (13, 3), (16, 3)):
        breaker.fail(error, at)
        assert breaker.wait_s(at) == wait_s
    breaker.succeed()
    assert not breaker.open


# Starting


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:23333", "http://host:23333"),
        ("host:23333", "http://host:23333"),
        ("https://host/v1/", "https://host"),
        ("http://host/models/v1", "http://host/models"),
    ],
)
def test_url(url: str, base: str) -> None:
    """A scheme may be missing, and a trailing /v1 is the same as none."""
    assert base_url(url) == base


@pytest.mark.parametrize(
    ("dialect", "kind", "version"),
    [("lmdeploy", "lmdeploy", "unknown"), ("vllm", "vllm", "0.11.0"), ("openai", "openai", "unknown")],
)
async def test_info(dialect: Dialect, kind: str, version: str) -> None:
    """The engine says what the server is, and takes its first model."""
    async with Toy(dialect).running() as toy:
        engine = HTTPEngine(HTTPConfig(url=toy.url))
        info = await engine.start()
        await engine.close()
    assert (info.engine, info.engine_version, info.model) == ("http", version, MODEL)
    assert info.device == f"http {kind} at {toy.url}"
    assert info.max_context == (1024 if dialect == "vllm" else 1 << 20)


async def test_model_that_is_not_served() -> None:
    """A model that the server does not have is an error that names those it has."""
    async with Toy().running() as toy:
        with pytest.raises(EngineStartError, match=r"'none'.*toy, other"):
            await HTTPEngine(HTTPConfig(url=toy.url, model_name="none")).start()


@pytest.mark.parametrize(("key", "right"), [("secret", True), ("wrong", False), (None, False)])
async def test_api_key(key: str | None, right: bool) -> None:
    """The key opens the server; a wrong one or none is an error at the start."""
    async with Toy(api_key="secret").running() as toy:
        engine = HTTPEngine(HTTPConfig(url=toy.url, api_key=key))
        if not right:
            with pytest.raises(EngineStartError, match="api_key"):
                await engine.start()
            return
        await engine.start()
        assert (await run(engine, make_request(STORY, max_new_tokens=3))).text
        toy.api_key = "another"
        with pytest.raises(AuthenticationError):
            await run(engine, make_request(STORY))
        await engine.close()


async def test_nobody_listens() -> None:
    """A server that is not there is an error that names its address."""
    with kept_port() as port, pytest.raises(EngineStartError, match=f"cannot connect to http://127.0.0.1:{port}"):
        await HTTPEngine(HTTPConfig(url=f"127.0.0.1:{port}", connect_timeout_s=0.1)).start()


async def test_server_that_comes_up_late() -> None:
    """A server that does not listen yet is waited for."""
    with kept_port() as port:
        engine = HTTPEngine(HTTPConfig(url=f"127.0.0.1:{port}", connect_timeout_s=60))
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0.1)
        async with Toy().running(port):
            assert (await starting).model == MODEL
            await engine.close()


async def test_url_of_something_else() -> None:
    """A server of another kind is an error that says what it answered."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<h1>Welcome to nginx</h1>", content_type="text/html")

    application = web.Application()
    application.router.add_get("/v1/models", page)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    with pytest.raises(EngineStartError, match="Welcome to nginx"):
        await HTTPEngine(HTTPConfig(url=f"http://127.0.0.1:{runner.addresses[0][1]}")).start()
    with pytest.raises(EngineStartError, match="404"):
        await HTTPEngine(HTTPConfig(url=f"http://127.0.0.1:{runner.addresses[0][1]}/elsewhere")).start()
    await runner.cleanup()


@pytest.mark.parametrize("kind", sorted(tree(requests.RequestException), key=lambda kind: kind.__name__))
async def test_every_error_of_requests_fails_the_start(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever requests raises is an EngineStartError that names the server."""

    def fail(*_: object, **__: object) -> None:
        raise kind("reason", "", 0) if kind is requests.exceptions.JSONDecodeError else kind("reason")

    monkeypatch.setattr(requests.Session, "get", fail)
    engine = HTTPEngine(HTTPConfig(url="http://there", connect_timeout_s=0.001))
    with pytest.raises(EngineStartError, match="http://there"):
        await engine.start()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "raylm test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.mark.parametrize("settings", ["ca_file", "unverified", "neither"])
async def test_tls(certificate: Path, settings: str) -> None:
    """A certificate is checked against ca_file, or not at all if asked so; otherwise a strange one is an error."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with Toy().running(tls=context) as toy:
        config = {
            "ca_file": HTTPConfig(url=toy.url, ca_file=str(certificate)),
            "unverified": HTTPConfig(url=toy.url, verify_tls=False),
            "neither": HTTPConfig(url=toy.url),
        }[settings]
        engine = HTTPEngine(config)
        if settings == "neither":
            with pytest.raises(EngineStartError, match="ca_file"):
                await engine.start()
            return
        await engine.start()
        assert (await run(engine, make_request(STORY, max_new_tokens=3))).text
        await engine.close()


async def test_ca_file_that_is_none() -> None:
    """A ca_file that cannot be read is an error that names it."""
    with pytest.raises(EngineStartError, match="no-such-file"):
        await HTTPEngine(HTTPConfig(url="https://127.0.0.1:1", ca_file="/no-such-file")).start()


# Dialects


@pytest.mark.parametrize("dialect", ["lmdeploy", "old-lmdeploy", "vllm", "openai"])
@pytest.mark.parametrize("prompt", [STORY, QUESTION], ids=["prompt", "messages"])
async def test_counts_in_every_dialect(start: Start, dialect: Dialect, prompt: str | tuple[Message, ...]) -> None:
    """Text, tokens, finish reason and usage are right, whatever the server tells and when."""
    _, engine = await start(Toy(dialect))
    whole = await run(engine, make_request(prompt, max_new_tokens=20))
    text = STORY if prompt == STORY else "<user>What is the capital of France?\n<assistant>"
    assert whole.usage.prompt_tokens == len(tokenize(text))
    assert whole.usage.completion_tokens == len(tokenize(whole.text)) == whole.deltas[-1].num_tokens
    assert whole.finish_reason in ("stop", "length")
    counts = [delta.num_tokens for delta in whole.deltas]
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("dialect", "prompt", "paths"),
    [
        ("lmdeploy", STORY, ["/generate"]),
        ("lmdeploy", QUESTION, ["/v1/chat/completions"]),
        ("old-lmdeploy", STORY, ["/v1/completions", "/v1/completions"]),
        ("old-lmdeploy", QUESTION, ["/v1/chat/interactive"]),
        ("openai", STORY, ["/v1/completions"]),
    ],
)
async def test_routes(start: Start, dialect: Dialect, prompt: str, paths: list[str]) -> None:
    """Raw prompts and messages go to their routes; only a server that tells no counts is asked for them again."""
    toy, engine = await start(Toy(dialect))
    await run(engine, make_request(prompt, max_new_tokens=5))
    assert [path for path, _ in toy.calls] == paths


@pytest.mark.parametrize(
    "fault",
    [
        answer(500, "broken"),
        answer(429, {"message": "full"}, Retry_After="60"),
        answer(200, "<html>Welcome</html>", "text/html"),
        stream(then="reset"),
    ],
    ids=["500", "429", "html", "reset"],
)
async def test_an_answer_is_whole_though_its_prompt_cannot_be_counted(start: Start, fault: Handler) -> None:
    """Where only the question for the prompt's length fails, the answer ends as it did, and the length is 0."""
    toy, engine = await start(Toy("old-lmdeploy"))
    whole = await run(engine, make_request(STORY, max_new_tokens=5))
    toy.script = [toy.answer_well, fault]
    record = await run(engine, make_request(STORY, max_new_tokens=5))
    assert (record.text, record.finish_reason) == (whole.text, whole.finish_reason)
    assert record.usage == msgspec.structs.replace(whole.usage, prompt_tokens=0)
    toy.script = [fault]
    ended = await run(engine, make_request(STORY, whole.generated(len(whole.deltas)), max_new_tokens=5))
    assert (ended.text, ended.usage) == ("", record.usage)


async def test_whole_transcript_goes_to_an_old_server(start: Start) -> None:
    """A turn of a session is sent with all before it, and the server keeps no state."""
    toy, engine = await start(Toy("old-lmdeploy"))
    messages = (Message("user", "hi"), Message("assistant", "hello"), Message("user", "again"))
    request = make_request(messages, max_new_tokens=3)
    request.session_id, request.session_end = "s", False
    await run(engine, request)
    ((_, body),) = toy.calls
    assert [message["content"] for message in body["prompt"]] == ["hi", "hello", "again"]
    assert body["interactive_mode"] is False


async def test_parameters_of_lmdeploy(start: Start) -> None:
    """Each parameter reaches lmdeploy under its own name."""
    toy, engine = await start()
    parameters = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.2, "seed": 3}
    parameters |= {"ignore_eos": True, "min_new_tokens": 2, "max_new_tokens": 9}
    await run(engine, make_request(QUESTION, **parameters))
    ((_, body),) = toy.calls
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.2, "seed": 3}
    expected |= {"ignore_eos": True, "min_new_tokens": 2, "max_tokens": 9, "model": MODEL}
    assert {name: body[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("dialect", "sent"),
    [("lmdeploy", ["<|im_end|>"]), ("old-lmdeploy", ["<|im_end|>"]), ("openai", ["#", "<|im_end|>"])],
)
async def test_stop_words_that_a_server_is_sent(start: Start, dialect: Dialect, sent: list[str]) -> None:
    """An lmdeploy server is sent those alone that may be special tokens, and none when it would ban them."""
    toy, engine = await start(Toy(dialect))
    await run(engine, make_request(QUESTION, stop_words=["#", "<|im_end|>"], max_new_tokens=3))
    if dialect != "openai":
        await run(engine, make_request(QUESTION, stop_words=["<|im_end|>"], ignore_eos=True, max_new_tokens=3))
        assert not toy.calls.pop()[1].get("stop")
    assert toy.calls[0][1]["stop"] == sent


@pytest.mark.parametrize(("dialect", "unlimited"), [("lmdeploy", 0), ("vllm", -1)])
async def test_no_top_k(start: Start, dialect: Dialect, unlimited: int) -> None:
    """No limit is said as the server says it, for a missing one would be its default."""
    toy, engine = await start(Toy(dialect))
    await run(engine, make_request(STORY, temperature=1.0, top_k=None, max_new_tokens=2))
    assert toy.calls[0][1]["top_k"] == unlimited


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1.0, "top_k": 5},
        {"ignore_eos": True},
        {"repetition_penalty": 1.1},
        {"min_new_tokens": 2},
        {"logprobs": True},
        {"echo": True},
        {"json_schema": "{}"},
    ],
    ids=str,
)
async def test_parameter_that_a_server_lacks(start: Start, parameters: dict[str, object]) -> None:
    """A parameter that the server would pass over is an error that names it, and nothing is sent."""
    toy, engine = await start(Toy("openai"))
    with pytest.raises(InvalidRequestError, match=list(parameters)[-1]):
        await run(engine, make_request(STORY, **parameters))
    assert toy.calls == []


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
async def test_penalties(start: Start, name: str) -> None:
    """OpenAI's penalties go to OpenAI's servers. One that takes them and does nothing does not get them."""
    for dialect in ("vllm", "openai"):
        toy, engine = await start(Toy(dialect))
        await run(engine, make_request(STORY, max_new_tokens=2, **{name: 0.5}))
        assert toy.calls[0][1][name] == 0.5
    for dialect, prompt in itertools.product(("lmdeploy", "old-lmdeploy"), (STORY, ask("Who?"))):
        toy, engine = await start(Toy(dialect))
        with pytest.raises(InvalidRequestError, match=f"^{name}: "):
            await run(engine, make_request(prompt, max_new_tokens=2, **{name: 0.5}))
        assert toy.calls == []


@pytest.mark.parametrize("prompt", [STORY, ask("Who?")], ids=["prompt", "messages"])
async def test_json_schema(start: Start, prompt: Prompt) -> None:
    """A JSON schema goes to the server, which begins an answer anew rather than continue in the middle of a value."""
    toy, engine = await start(Toy("vllm"))
    parameters = {"max_new_tokens": 12, "json_schema": '{"type": "object"}'}
    whole = await run(engine, make_request(prompt, **parameters))
    said = toy.calls[0][1]["response_format"]
    assert (said["type"], said["json_schema"]["schema"]) == ("json_schema", {"type": "object"})
    generated = whole.generated(5)
    rest = await run(engine, make_request(prompt, generated, **parameters))
    assert generated.text + rest.text == whole.text
    assert toy.calls[1][1] == toy.calls[0][1]
    with pytest.raises(UpstreamError, match="continued exactly"):
        await run(engine, make_request(prompt, generated, temperature=1.0, **parameters))


@pytest.mark.parametrize("prompt", [STORY, ask("Who?")], ids=["prompt", "messages"])
async def test_top_logprobs(start: Start, prompt: Prompt) -> None:
    """Each token has its text, and as many candidates as were asked for, the likeliest first."""
    _, engine = await start(Toy("vllm"))
    record = await run(engine, make_request(prompt, max_new_tokens=8, ignore_eos=True, logprobs=True, top_logprobs=2))
    details = record.details
    assert len(details.token_texts) == len(details.top_logprobs) == len(record.logprobs) == 8
    for text, logprob, ranked in zip(details.token_texts, record.logprobs, details.top_logprobs, strict=True):
        assert ranked == ((text, logprob), ("other 0", -3.0))
    without = await run(engine, make_request(prompt, max_new_tokens=8, ignore_eos=True, logprobs=True))
    assert (without.details.token_texts, without.details.top_logprobs) == (details.token_texts, ())


@pytest.mark.parametrize("dialect", ["lmdeploy", "vllm"])
async def test_prompt_token_ids(start: Start, dialect: Dialect) -> None:
    """Token ids are a prompt; what was generated is continued by its ids, or else from the start."""
    toy, engine = await start(Toy(dialect))
    token_ids = await engine.tokenize(make_request(STORY))
    assert len(token_ids) == len(tokenize(STORY))
    expected = await run(engine, make_request(STORY, max_new_tokens=12))
    for parameters in ({}, {"min_new_tokens": 2}):
        whole = await run(engine, make_request(token_ids, max_new_tokens=12, **parameters))
        assert whole.text == expected.text
        part = whole.generated(4)
        for ids in (part.token_ids, []):
            generated = Generated(part.text, ids, part.num_tokens)
            rest = await run(engine, make_request(token_ids, generated, max_new_tokens=12, **parameters))
            assert part.text + rest.text == whole.text
            body = toy.calls[-1][1]
            assert (body.get("input_ids") or body["prompt"]) == [*token_ids, *ids]


async def test_prompt_token_ids_that_no_route_takes(start: Start) -> None:
    """Where token ids would be taken for something else they are refused, and nothing is sent."""
    toy, engine = await start(Toy("old-lmdeploy"))
    with pytest.raises(InvalidRequestError, match=r"^prompt_token_ids: "):
        await run(engine, make_request((1, 2)))
    assert toy.calls == []


async def test_tokenize(start: Start) -> None:
    """The tokens of a prompt, and of messages where the server tells those."""
    _, vllm = await start(Toy("vllm"))
    _, openai = await start(Toy("openai"))
    messages = ask("Who?")
    rendered = render([{"role": "user", "content": "Who?"}], open_end=False)
    assert len(await vllm.tokenize(make_request(messages))) == len(tokenize(rendered))
    for prompt in (STORY, messages):
        with pytest.raises(InvalidRequestError, match="cannot count tokens"):
            await openai.tokenize(make_request(prompt))


async def test_neutral_parameters_are_no_matter(start: Start) -> None:
    """What a parameter cannot change needs no honouring: top_k and seed of a greedy request."""
    toy, engine = await start(Toy("openai"))
    await run(engine, make_request(STORY, top_k=40, seed=7, max_new_tokens=2))
    assert "top_k" not in toy.calls[0][1]


async def test_raw_prompt_that_needs_more_than_completions(start: Start) -> None:
    """A raw prompt may have to go to the chat route of lmdeploy, as token ids, for a seed with log-probabilities."""
    toy, engine = await start()
    plain = await run(engine, make_request(STORY, max_new_tokens=6))
    record = await run(engine, make_request(STORY, max_new_tokens=6, logprobs=True, min_new_tokens=6))
    assert record.text == plain.text
    assert len(record.token_ids) == record.usage.completion_tokens == sum(len(d.logprobs) for d in record.deltas)
    assert toy.calls[-1][0] == "/v1/chat/completions"


async def test_stop_word_that_the_server_does_not_know(start: Start) -> None:
    """A server drops stop words of several tokens: the text ends there all the same, and so does the generation."""
    toy, engine = await start(Toy(tokens_per_s=200))
    whole = await run(engine, make_request(STORY, max_new_tokens=24, ignore_eos=True))
    word = whole.text[20:34]
    record = await run(engine, make_request(STORY, max_new_tokens=900, ignore_eos=True, stop_words=[word]))
    assert (record.text, record.finish_reason) == (whole.text.partition(word)[0], "stop")
    assert record.usage.prompt_tokens == whole.usage.prompt_tokens
    await until(lambda: toy.num_running == 0)


async def test_lone_surrogate(start: Start) -> None:
    """A prompt that is no Unicode is an error of the request."""
    _, engine = await start()
    with pytest.raises(InvalidRequestError, match="Unicode"):
        await run(engine, make_request("\ud83d"))


# Continuing


@pytest.mark.parametrize("dialect", ["lmdeploy", "vllm", "openai", "old-lmdeploy"])
@pytest.mark.parametrize("prompt", [STORY, QUESTION], ids=["prompt", "messages"])
async def test_continuation_in_every_dialect(start: Start, dialect: Dialect, prompt: str | tuple[Message, ...]) -> None:
    """A continued greedy answer is the undisturbed one, whether the server goes on with messages or begins again."""
    _, engine = await start(Toy(dialect))
    whole = await run(engine, make_request(prompt, max_new_tokens=20, min_new_tokens=0))
    for cut in range(1, len(whole.deltas)):
        generated = whole.generated(cut)
        rest = await run(engine, make_request(prompt, generated, max_new_tokens=20))
        assert generated.text + rest.text == whole.text
        assert rest.usage == whole.usage
        counts = [generated.num_tokens, *(delta.num_tokens for delta in rest.deltas)]
        assert counts == sorted(counts)


async def test_messages_are_continued_where_the_server_can(start: Start) -> None:
    """The server goes on with a last message of the assistant; white space at its end would be trimmed."""
    toy, engine = await start()
    await run(engine, make_request(QUESTION, Generated("Paris", [], 1), max_new_tokens=5))
    assert toy.calls[-1][1]["messages"][-1] == {"role": "assistant", "content": "Paris"}
    assert toy.calls[-1][1]["max_tokens"] == 4
    with pytest.raises(UpstreamError, match="exactly"):
        await run(engine, make_request(QUESTION, Generated("Paris ", [], 1), max_new_tokens=5))
    assert toy.calls[-1][1]["messages"][-1]["role"] == "user"


@pytest.mark.parametrize("prompt", [STORY, QUESTION], ids=["prompt", "messages"])
async def test_penalised_answer_is_repeated(start: Start, prompt: str | tuple[Message, ...]) -> None:
    """At lmdeploy, which penalises no token of a prompt, a penalised answer is generated again, and no text twice."""
    toy, engine = await start()
    parameters = {"max_new_tokens": 20, "repetition_penalty": 1.1}
    whole = await run(engine, make_request(prompt, **parameters))
    generated = whole.generated(4)
    rest = await run(engine, make_request(prompt, generated, **parameters))
    assert toy.calls[-1] == toy.calls[0]
    assert (generated.text + rest.text, rest.usage) == (whole.text, whole.usage)
    assert generated.token_ids + rest.token_ids == whole.token_ids


@pytest.mark.parametrize("prompt", [STORY, QUESTION], ids=["prompt", "messages"])
async def test_penalised_answer_that_begins_otherwise(start: Start, prompt: str | tuple[Message, ...]) -> None:
    """A penalised answer that began elsewhere, and begins otherwise here, is continued from its text."""
    toy, engine = await start()
    generated = Generated("Something else", [], 2)
    parameters = {"max_new_tokens": 20, "ignore_eos": True}
    plain = await run(engine, make_request(prompt, generated, **parameters))
    rest = await run(engine, make_request(prompt, generated, repetition_penalty=1.1, **parameters))
    assert (rest.text, rest.usage) == (plain.text, plain.usage)
    assert len(toy.calls) == 3


@pytest.mark.parametrize("parameters", [{}, {"temperature": 1.0, "top_k": None}], ids=["greedy", "sampled"])
async def test_answer_that_cannot_be_continued(start: Start, parameters: dict[str, object]) -> None:
    """An answer that would not go on with what the client has is an error, and shows nothing."""
    _, engine = await start(Toy("openai"))
    record = Record()
    request = make_request(QUESTION, Generated("Something else", [], 2), max_new_tokens=20, **parameters)
    with pytest.raises(UpstreamError, match="continued exactly"):
        await engine.generate(request, record.emit)
    assert record.deltas == []


async def test_continued_answer_shorter_than_its_beginning(start: Start) -> None:
    """An answer that ends before what the client has is no continuation of it."""
    toy, engine = await start(Toy("openai"))
    toy.script = [stream(sse({"choices": [{"delta": {"content": "Par"}}]}), DONE)]
    with pytest.raises(UpstreamError, match="continued exactly"):
        await run(engine, make_request(QUESTION, Generated("Paris", [], 2), max_new_tokens=20))


# Faults


async def test_half_characters_and_half_lines(start: Start) -> None:
    """An answer that arrives byte by byte is the same."""
    toy, engine = await start(Toy("vllm"))
    whole = sse(chunk("你好"), chunk(" 😀")) + DONE
    toy.script = [stream(*(whole[at : at + 1] for at in range(len(whole))))]
    record = await run(engine, make_request(STORY))
    assert (record.text, record.usage.completion_tokens) == ("你好 😀", 2)


async def test_stop_word_in_half_characters(start: Start) -> None:
    """A stop word that is split over events, and its characters over packets, ends the text before it."""
    toy, engine = await start(Toy("vllm"))
    whole = sse(chunk("你好 世"), chunk("界 "), chunk("😀"), chunk("🚀"), chunk("", "length")) + DONE
    toy.script = [stream(*(whole[at : at + 1] for at in range(len(whole))))]
    record = await run(engine, make_request(STORY, stop_words=["界 😀"]))
    assert (record.text, record.finish_reason) == ("你好 世", "stop")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_is_text(start: Start, name: str) -> None:
    """What a server tells apart as reasoning is not lost: it is text, before the rest."""
    toy, engine = await start(Toy("vllm"))
    told = [{name: "Hm"}, {name: ", Paris.", "content": None}, {"content": "Paris"}]
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in told]
    toy.script = [stream(sse(*events), sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), DONE)]
    assert (await run(engine, make_request(QUESTION))).text == "Hm, Paris.Paris"


async def test_an_empty_finish_reason_is_none(start: Start) -> None:
    """Some servers send one with each event but the last."""
    toy, engine = await start(Toy("vllm"))
    toy.script = [stream(sse(chunk("a", ""), chunk("b", ""), chunk("", "stop")) + DONE)]
    record = await run(engine, make_request(STORY))
    assert (record.text, record.finish_reason) == ("ab", "stop")


async def test_usage_that_counts_nothing_is_not_believed(start: Start) -> None:
    """Tokens of a server whose every event says that there are none yet are counted by its events."""
    toy, engine = await start(Toy("vllm"))
    events = [chunk(text, usage={"prompt_tokens": 3, "completion_tokens": 0}) for text in ("a", "b")]
    toy.script = [stream(sse(*events, chunk("", "stop")) + DONE)]
    record = await run(engine, make_request(STORY))
    assert (record.text, record.deltas[-1].num_tokens) == ("ab", 2)


async def test_gzip(start: Start) -> None:
    """A compressed answer is understood."""
    toy, engine = await start(Toy("vllm"))
    toy.script = [stream(sse(chunk("a")), DONE, gzip=True)]
    assert (await run(engine, make_request(STORY))).text == "a"


@pytest.mark.parametrize(
    ("handler", "kind", "text"),
    [
        (stream(sse(chunk("a"), chunk("", "stop"))), ProtocolError, "DONE"),
        (stream(sse(chunk("a"), "[DONE]")), ProtocolError, "finish reason"),
        (stream(), ProtocolError, "DONE"),
        (stream(sse("{not json")), ProtocolError, "not json"),
        (stream(b"<html>busy</html>"), ProtocolError, "DONE"),
        (stream(sse(chunk("a")), sse({"error": {"message": "out of memory", "code": 500}})), UpstreamError, "memory"),
        (stream(sse({"error": {"message": "maximum context length", "code": 400}})), ContextLengthError, "maximum"),
        (stream(sse({"object": "error", "message": "no", "code": 400})), InvalidRequestError, "no"),
        (stream(sse(chunk("a"), chunk("", "error"), "[DONE]")), UpstreamError, "'error'"),
        (stream(sse(chunk("a"), chunk("", "abort"), "[DONE]")), UpstreamError, "'abort'"),
        (stream(sse(chunk("a"), chunk("", "content_filter"), "[DONE]")), InvalidRequestError, "content filter"),
        (stream(sse({"choices": [{"delta": {"refusal": "I will not"}}]})), InvalidRequestError, "I will not"),
        (stream(sse(chunk("a")), then="reset"), UpstreamError, "broke"),
        (answer(200, "<h1>Please log in</h1>", "text/html"), ProtocolError, "Please log in"),
        (answer(200, {"object": "error", "message": "wrong", "code": 400}), InvalidRequestError, "wrong"),
        (answer(200, {"choices": []}), ProtocolError, "stream"),
        (answer(302, "", Location="http://elsewhere"), ProtocolError, "redirect"),
        (answer(400, {"message": "no", "code": 400}), InvalidRequestError, "no"),
        (answer(404, {"message": "The model 'x' does not exist."}), ModelNotFoundError, "toy, other"),
        (answer(500, "oops", "text/plain"), UpstreamError, "oops"),
        (answer(429, {"message": "full"}, Retry_After="60"), PoolSaturatedError, "full"),
        (answer(503, {"message": "asleep"}, Retry_After="60"), UpstreamError, "asleep"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
async def test_faults(start: Start, handler: Handler, kind: type[RaylmError], text: str) -> None:
    """Each fault is an error of its class that says what happened, nothing ends well that did not, and life goes on."""
    toy, engine = await start(Toy("vllm"))
    toy.script = [handler]
    record = Record()
    with pytest.raises(RaylmError, match=text) as raised:
        await engine.generate(make_request(STORY), record.emit)
    assert type(raised.value) is kind
    assert all(delta.finish_reason is None for delta in record.deltas)
    assert len(toy.calls) == 1
    assert (await run(engine, make_request(STORY, max_new_tokens=3))).text


@pytest.mark.parametrize("parts", [[], [sse(chunk("a"))]], ids=["at once", "after a token"])
async def test_stall(start: Start, parts: list[bytes]) -> None:
    """A server that falls silent is an error after `idle_timeout_s`, and its connection is closed."""
    toy, engine = await start(idle_timeout_s=0.2)
    toy.script = [stream(*parts, then="stall")]
    with pytest.raises(RequestTimeoutError, match="idle_timeout_s"):
        await run(engine, make_request(STORY))
    await until(lambda: toy.num_running == 0)


def steady_clock() -> Callable[[], float]:
    """Return a clock that goes on by 10 ms at most between two looks: where it stands still, so do server and client.

    A loop that sleeps for longer looks at it again and again.
    """
    now = seen = time.monotonic()

    def clock() -> float:
        nonlocal now, seen
        seen, before = time.monotonic(), seen
        now += min(seen - before, 0.01)
        return now

    return clock


async def test_requests_may_wait_for_their_turn_in_the_server(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first token a request is left where it is while others get theirs, and no longer."""
    toy, engine = await start(Toy(max_context=100_000), idle_timeout_s=0.2)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", steady_clock())
    turn = asyncio.Event()

    async def queue(request: web.Request) -> web.StreamResponse:
        await turn.wait()
        return await toy.answer_well(request)

    busy = Record()
    running = asyncio.create_task(
        engine.generate(make_request(STORY, max_new_tokens=50_000, ignore_eos=True), busy.emit)
    )
    await busy.wait()
    toy.script = [queue] * 6  # more than open the breaker
    waiting = [asyncio.create_task(run(engine, make_request(STORY, max_new_tokens=3))) for _ in toy.script]
    await busy.wait(len(busy.deltas) + 300)  # 0.6 s at 500 tokens/s
    turn.set()
    assert all([(await each).text for each in waiting])
    toy.script = [stream(then="stall")]
    stalled = asyncio.create_task(run(engine, make_request(STORY)))
    await until(lambda: toy.num_running == 2)
    running.cancel()
    with pytest.raises(RequestTimeoutError, match="idle_timeout_s"):
        await stalled


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_waited_for(start: Start, status: int) -> None:
    """A full server is asked again after the time that it names."""
    toy, engine = await start()
    toy.script = [answer(status, {"message": "full"}, Retry_After="0.05")] * 2
    assert (await run(engine, make_request(STORY, max_new_tokens=3))).text
    assert len(toy.calls) == 3


async def test_retries_end(start: Start) -> None:
    """A server that stays full is left to the pool, with the time that it named."""
    toy, engine = await start()
    toy.script = [answer(429, {"message": "full"}, Retry_After="0.05")] * 9
    with pytest.raises(PoolSaturatedError) as raised:
        await run(engine, make_request(STORY))
    assert raised.value.retry_after_s == 0.05
    assert len(toy.calls) == 3


async def test_connection_lost_before_the_answer_is_tried_again(start: Start) -> None:
    """A connection that ends before the answer begins costs one more try, and not many."""
    toy, engine = await start()

    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    toy.script = [hang_up]
    assert (await run(engine, make_request(STORY, max_new_tokens=3))).text
    toy.script, toy.calls = [hang_up, hang_up, hang_up], []
    with pytest.raises(UpstreamError):
        await run(engine, make_request(STORY))
    assert len(toy.calls) == 2


async def test_connections_are_used_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests one after the other share a connection."""
    for name in ("_DRAIN_S", "_KEEPALIVE_S"):  # a busy machine takes its time within a request and between two
        monkeypatch.setattr(http, name, 60)
    toy, engine = await start(Toy("vllm"))
    ports = set()

    async def note(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        return await stream(sse(chunk("a")), DONE)(request)

    toy.script = [note, note, note]
    for _ in range(3):
        await run(engine, make_request(STORY))
    assert len(ports) == 1


async def test_cancellation_reaches_the_server(start: Start) -> None:
    """Cancelling a request ends it at the server, wherever it is."""
    toy, engine = await start(capacity=1)
    record = Record()
    request = make_request(STORY, max_new_tokens=900, ignore_eos=True)
    running, waiting = (asyncio.create_task(engine.generate(request, record.emit)) for _ in range(2))
    await record.wait(2)
    assert toy.num_running == 1
    for task in (running, waiting):
        task.cancel()
    await asyncio.wait([running, waiting])
    assert running.cancelled()
    assert waiting.cancelled()
    await until(lambda: toy.num_running == 0)
    assert len(toy.calls) == 1
    assert engine.statistics().num_running == 0


async def test_emit_that_fails(start: Start) -> None:
    """What the receiver of the deltas raises is the caller's own, and ends the request at the server."""
    toy, engine = await start()

    def fail(_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        await engine.generate(make_request(STORY, max_new_tokens=900, ignore_eos=True), fail)
    await until(lambda: toy.num_running == 0)


# Health and the breaker at work


async def test_health(start: Start) -> None:
    """A server that says that it is ill is an upstream error with its words."""
    toy, engine = await start()
    await engine.check_health()
    toy.healthy = False
    with pytest.raises(UpstreamError, match="engine is dead"):
        await engine.check_health()


async def test_server_that_dies_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures open the breaker; then requests fail at once and say for how long; the server's return closes it."""
    now = 0.0
    with kept_port() as port:
        async with Toy().running(port) as toy:
            engine = HTTPEngine(HTTPConfig(url=toy.url))
            await engine.start()
        monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: now))
        with pytest.raises(UpstreamError, match="cannot connect"):
            await engine.check_health()
        for _ in range(4):
            with pytest.raises(UpstreamError, match="cannot connect"):
                await run(engine, make_request(STORY))
        with pytest.raises(UpstreamError, match="not tried at present") as raised:
            await run(engine, make_request(STORY))
        assert raised.value.retry_after_s is not None
        assert raised.value.retry_after_s <= 1

        async with Toy().running(port):
            with pytest.raises(UpstreamError, match="not tried at present"):
                await run(engine, make_request(STORY))
            now += raised.value.retry_after_s
            assert (await run(engine, make_request(STORY, max_new_tokens=3))).text
        await engine.close()


async def test_refusals_do_not_open_the_breaker(start: Start) -> None:
    """Refusals, and requests that were let go of, are no fault of the server's: any number of them leaves it in use."""
    toy, engine = await start()
    refusals = [answer(400, {"message": "no"}), answer(401, {}), answer(429, {}, Retry_After="60"), answer(408, {})]
    toy.script = [*refusals, answer(499, {})] * 5
    for _ in range(25):
        with pytest.raises((InvalidRequestError, AuthenticationError, PoolSaturatedError, EngineError)):
            await run(engine, make_request(STORY))
    assert (await run(engine, make_request(STORY, max_new_tokens=3))).text
