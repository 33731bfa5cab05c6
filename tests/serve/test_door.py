"""The door alone, before an application that answers everything: what passes, by headers and path."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from raylm.config import BatchesConfig, GatewayConfig
from raylm.serve.door import Door


def status_of(
    method: str,
    path: str,
    headers: dict[str, str],
    config: GatewayConfig | None = None,
    root_path: str = "",
    *,
    local: bool = False,
) -> int:
    """Send a request through a door and return the status of the answer."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    answer = PlainTextResponse("behind the door")
    door = Door(answer, config or GatewayConfig(), BatchesConfig(folder="/files"), local=local)
    asyncio.run(door(scope, receive, send))
    status: int = sent[0]["status"]
    return status


FORM = {"host": "127.0.0.1:8000", "content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://127.0.0.1:8000"},
        {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"origin": "https://behind.example", "sec-fetch-site": "same-origin"},
        {"origin": "https://app.example", "sec-fetch-site": "cross-site"},
        {"origin": "https://app.example"},
        {"origin": "https://other.example", "content-type": "application/json"},
    ],
)
def test_own_pages(headers: dict[str, str]) -> None:
    """Clients that are no browsers may upload, and the endpoint's own pages, and those that the configuration names.

    What other pages send as JSON is for CORS to refuse, for a browser asks first.
    """
    config = GatewayConfig(cors_origins=("https://app.example",))
    assert status_of("POST", "/v1/files", FORM | headers, config) == 200


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches/b/cancel", "/requests/r/cancel"])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://other.example", "sec-fetch-site": "cross-site"},
        {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"},
        {"origin": "null", "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "https://other.example"},
        {"origin": "http://127.0.0.1:3000"},
        {"origin": "null"},
    ],
)
def test_foreign_pages(path: str, headers: dict[str, str]) -> None:
    """What a browser sends for a page of another site without asking is status 403."""
    config = GatewayConfig(cors_origins=("https://app.example",))
    assert status_of("POST", path, FORM | headers, config) == 403


def test_any_page() -> None:
    """Where the configuration lets in all pages, it does."""
    headers = {"origin": "https://other.example", "sec-fetch-site": "cross-site"}
    assert status_of("POST", "/v1/files", FORM | headers, GatewayConfig(cors_origins=("*",))) == 200


LOCAL_HOSTS = (
    "127.0.0.1:8000",
    "localhost",
    "LOCALHOST:8000",
    "app.localhost",
    "[::1]:8000",
    "[::1]",
    "10.0.0.7:80",
    "[::ffff:127.0.0.1]:80",
    "raylm:8000",
    "",
)
NAMES = (
    "rebound.example",
    "rebound.example:8000",
    "127.0.0.1.rebound.example",
    "localhost.rebound.example",
    "localhost.",
)


@pytest.mark.parametrize(("host", "status"), [*((host, 200) for host in LOCAL_HOSTS), *((host, 403) for host in NAMES)])
def test_an_endpoint_for_this_machine_alone_knows_its_host(host: str, status: int) -> None:
    """It answers to no name that another site may have lead to it, whatever the method."""
    for method in ("GET", "POST"):
        assert status_of(method, "/v1/models", {"host": host}, local=True) == status
        assert status_of(method, "/v1/models", {"host": host}) == 200


def test_hosts_that_are_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that the configuration has are let in, and where keys are needed all are."""
    monkeypatch.setenv("KEYS", "secret")
    named = GatewayConfig(cors_origins=("https://app.example",))
    keyed = GatewayConfig(api_keys_env="KEYS")
    headers = {"host": "app.example", "authorization": "Bearer secret"}
    for config in (named, keyed, GatewayConfig(cors_origins=("*",))):
        assert status_of("GET", "/v1/models", headers, config, local=True) == 200


async def test_a_body_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that comes in drops is refused when the patience with it is used up, and one that flows is not."""
    now_s = 0.0  # by a clock of its own, which a machine that stands still does not stop
    monkeypatch.setattr("raylm.serve.door.time", SimpleNamespace(perf_counter=lambda: now_s))

    async def read(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    async def post(drop: bytes, interval_s: float) -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            nonlocal now_s
            now_s += interval_s
            await asyncio.sleep(0)
            drops.pop()
            return {"type": "http.request", "body": drop, "more_body": bool(drops)}

        async def send(message: Any) -> None:
            sent.append(message)

        drops = [drop] * 20
        app = Starlette(routes=[Route("/", read, methods=["POST"])])
        door = Door(app, GatewayConfig(body_timeout_s=30), BatchesConfig(folder="/files"))
        scope = {"type": "http", "method": "POST", "path": "/", "root_path": "", "query_string": b"", "headers": []}
        await door(scope, receive, send)
        status: int = sent[0]["status"]
        return status

    assert await post(b"x", 6) == 408
    assert await post(b"x" * 12_000, 6) == 200


@pytest.mark.parametrize(
    ("root_path", "path", "status"),
    [
        ("/llm", "/llm/", 200),
        ("/llm", "/llm", 200),
        ("/llm", "/llm/health", 200),
        ("/llm", "/llm/static/app.js", 200),
        ("/llm", "/llm/v1/models", 401),
        ("/static", "/static/v1/models", 401),
        ("/static", "/static/health", 200),
        ("/static", "/static/static/app.js", 200),
        ("", "/static/app.js", 200),
        ("", "/llm/health", 401),
    ],
)
def test_keys_under_a_prefix(monkeypatch: pytest.MonkeyPatch, root_path: str, path: str, status: int) -> None:
    """Which paths need a key does not depend on where the application is mounted."""
    monkeypatch.setenv("DOOR_KEYS", "key")
    assert status_of("GET", path, {}, GatewayConfig(api_keys_env="DOOR_KEYS"), root_path) == status


@pytest.mark.parametrize(("path", "status"), [("/llm/v1/files", 200), ("/llm/v1/chat/completions", 413)])
def test_limits_under_a_prefix(path: str, status: int) -> None:
    """A file may be longer than other bodies, wherever the application is mounted."""
    headers = {"content-length": "1000"}
    assert status_of("POST", path, headers, GatewayConfig(max_body_bytes=100), "/llm") == status
