"""What the endpoint refuses, what it survives, and what it writes down."""

from __future__ import annotations

import json
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc
import psutil
import pytest
import requests
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from tests.serve.command import GATEWAY_PORTS, ServeCommand, serve_command, wait_for
from tests.serve.conftest import KEYS, SIMULATED, TOKENS_PER_S

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
KEY = {"Authorization": f"Bearer {KEYS[0]}"}


@pytest.fixture(scope="module")
def python_endpoint() -> Iterator[ServeCommand]:
    """An endpoint behind Serve's own proxy."""
    with serve_command({"models": [{"name": "sim", "engines": [SIMULATED]}]}, proxy="python") as command:
        yield command


class Front(Protocol):
    """What answers HTTP: an endpoint, or a gateway of one."""

    url: str


class Gateway:
    """A gateway that is asked directly, and not through HAProxy."""

    def __init__(self, endpoint: ServeCommand) -> None:
        gateway = endpoint.processes("ray::ServeReplica:raylm:gateway")[0]
        ports = {one.laddr.port for one in gateway.net_connections("tcp4") if one.status == psutil.CONN_LISTEN}
        (port,) = ports.intersection(GATEWAY_PORTS)
        self.url = f"http://127.0.0.1:{port}"


@pytest.fixture(params=["haproxy", "python", "gateway"])
def front(request: pytest.FixtureRequest) -> tuple[Front, ServeCommand]:
    """Each of what clients may reach, with the endpoint that it belongs to."""
    name = "python_endpoint" if request.param == "python" else "simulated_endpoint"
    endpoint: ServeCommand = request.getfixturevalue(name)
    return Gateway(endpoint) if request.param == "gateway" else endpoint, endpoint


@contextmanager
def connection(endpoint: Front) -> Iterator[socket.socket]:
    """A bare connection."""
    host, _, port = endpoint.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connected:
        yield connected


def raw(path: str, body: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    """Return a request as it goes over the wire."""
    lines = [
        method + b" " + path.encode() + b" HTTP/1.1",
        b"host: test",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        *headers,
    ]
    return b"\r\n".join([*lines, b"", body])


def status_of(endpoint: Front, request: bytes) -> int:
    """Send bytes and return the status of the answer."""
    with connection(endpoint) as connected:
        connected.sendall(request)
        answer = b""
        while b"\r\n" not in answer:
            got = connected.recv(4096)
            assert got, "the connection was closed without an answer"
            answer += got
    return int(answer.split()[1])


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches", "/v1/files/x/content"])
def test_no_batches(python_endpoint: ServeCommand, path: str) -> None:
    """An endpoint without a folder says that it takes no files and no batches, and what it lacks."""
    response = python_endpoint.get(path)
    assert response.status_code == 404
    assert "batches.folder" in response.json()["error"]["message"]


# Keys


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_key(strict_endpoint: ServeCommand, key: str, scheme: str) -> None:
    """Each key of the environment and of the file opens, however the scheme is spelled."""
    response = strict_endpoint.get("/v1/models", headers={"Authorization": f"{scheme} {key}"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {KEYS[0]}"},
        {"Authorization": KEYS[0]},
        {"Authorization": f"Bearer {KEYS[0]},{KEYS[1]}"},
        {"Authorization": "Bearer sch\u00e4d".encode()},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/state", "/metrics", "/openapi.json", "/sessions/a", "/nothing"])
def test_no_key(strict_endpoint: ServeCommand, headers: dict[str, Any], path: str) -> None:
    """Without a key, or with a wrong one, it is status 401 everywhere."""
    response = strict_endpoint.get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "AuthenticationError"


def test_key_sent_twice(strict_endpoint: ServeCommand) -> None:
    """Two keys are one too many, even when both are right."""
    header = f"authorization: Bearer {KEYS[0]}".encode()
    assert status_of(strict_endpoint, raw("/v1/models", b"", header, header, method=b"GET")) == 401
    assert status_of(strict_endpoint, raw("/v1/models", b"", header, method=b"GET")) == 200


def test_ray_asks_for_its_token(strict_endpoint: ServeCommand) -> None:
    """Who reaches the port of the cluster's head, and has no token, is told nothing."""
    with grpc.insecure_channel(strict_endpoint.cluster) as channel, pytest.raises(grpc.RpcError) as refused:
        NodeInfoGcsServiceStub(channel).GetAllNodeInfo(GetAllNodeInfoRequest(), timeout=30)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("path", ["/", "/docs", "/static/app.js", "/health"])
def test_open_paths(strict_endpoint: ServeCommand, path: str) -> None:
    """The pages and the health need no key."""
    assert strict_endpoint.get(path).status_code in (200, 503)


@pytest.mark.parametrize("origin", ["https://page.example", "https://other.example"])
def test_pages_of_others(simulated_endpoint: ServeCommand, strict_endpoint: ServeCommand, origin: str) -> None:
    """A page of another origin may use the endpoint if it is told so, and else, as by itself, may not."""
    header = "access-control-allow-origin"
    asking = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for endpoint, allowed in [(simulated_endpoint, None), (strict_endpoint, "https://page.example")]:
        told = {origin} if origin == allowed else {None}
        preflight = requests.options(endpoint.url + CHAT, headers=asking, timeout=60)
        assert {preflight.headers.get(header), endpoint.get("/health", headers=asking).headers.get(header)} == told


# Bodies


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"text"', None),
        (b'{"prompt": "\\ud800"}', None),
        (b'{"prompt": "a", "temperature": NaN}', None),
        (b'{"prompt": "a", "temperature": 1e999}', None),
        (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", None),
        (b'{"prompt": "\xff"}', None),
        (b'{"prompt": 1}', "prompt"),
        (b'{"prompt": [1, "a"]}', "prompt"),
        (b'{"prompt": [-1]}', "prompt"),
        (b'{"prompt": [1e30]}', "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": "a", "max_tokens": "3"}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 99999999999999999999}', "max_tokens"),
        (b'{"prompt": "a", "best_of": 3}', "best_of"),
        (b'{"prompt": "a", "nonsense": 1}', "nonsense"),
        (b'{"prompt": "a", "stream_options": {"nonsense": 1}}', "stream_options"),
        (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options"),
        (b'{"prompt": "a", "request_id": "a\\r\\nx-evil: 1"}', "request_id"),
        (b'{"prompt": "a", "request_id": "\\u20ac"}', "request_id"),
        (b'{"prompt": "a", "session_id": ""}', "session_id"),
        (b'{"prompt": "a", "session_id": 1' + b"0" * 300 + b"}", "session_id"),
        (b'{"prompt": "a", "user": "' + b"u" * 300 + b'"}', "user"),
    ],
)
def test_bad_body(simulated_endpoint: ServeCommand, body: bytes, param: str | None) -> None:
    """What is no JSON, or has wrong types or unknown fields, is status 400, and `param` names the field."""
    response = simulated_endpoint.post("/v1/completions", data=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_not_sent_as_json(simulated_endpoint: ServeCommand) -> None:
    """A body that is not called JSON is refused with the word for what is missing: pages of others can send those."""
    response = simulated_endpoint.post("/generate", data=b'{"inputs": "a"}', headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "content-type: application/json" in response.json()["error"]["message"]


def test_huge_limits(simulated_endpoint: ServeCommand) -> None:
    """The highest numbers that are allowed harm nobody: the loads of such requests add up, and are told to others."""
    with ExitStack() as stack:
        for _ in range(6):
            body = {**HELLO, "max_tokens": 2**63 - 1, "seed": 2**63 - 1, "top_k": 2**63 - 1, "n": 2, "stream": True}
            response = stack.enter_context(
                requests.post(simulated_endpoint.url + CHAT, json=body, stream=True, timeout=60)
            )
            assert response.status_code == 200
        wait_for(lambda: simulated_endpoint.state()["num_running"] >= 12)
    wait_for(lambda: simulated_endpoint.state()["num_running"] == 0)


@pytest.mark.parametrize("chunked", [False, True])
def test_huge_body(strict_endpoint: ServeCommand, chunked: bool) -> None:
    """A body over the limit is status 413, whether its length is told or not."""
    piece = b"x" * 50_000
    body: Any = iter([b'{"prompt": "', piece, piece, piece, b'"}']) if chunked else b'{"prompt": "' + 3 * piece
    response = strict_endpoint.post("/v1/completions", data=body, headers={**KEY, "content-type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "RequestTooLargeError"


@pytest.mark.parametrize("item", ["{}", "1", '"a"', "[1]", "null"])
@pytest.mark.parametrize(
    ("path", "field"), [("/v1/completions", "prompt"), (CHAT, "messages"), ("/generate", "inputs"), (CHAT, "stop")]
)
def test_million_elements(simulated_endpoint: ServeCommand, path: str, field: str, item: str) -> None:
    """A list of a million of anything is refused, and does not take the time of a million."""
    body = f'{{"{field}": [' + ",".join([item] * 1_000_000) + "]}"
    gateways = simulated_endpoint.processes("ray::ServeReplica:raylm:gateway")

    def spent_s() -> float:
        return sum(gateway.cpu_times().user + gateway.cpu_times().system for gateway in gateways)

    before_s = spent_s()
    response = simulated_endpoint.post(path, data=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert spent_s() - before_s < 20
    wait_for(lambda: simulated_endpoint.get("/health").status_code == 200)


def test_too_many_prompts(strict_endpoint: ServeCommand) -> None:
    """Prompts and choices together have a limit, on each route."""
    for path, body, param in [
        ("/v1/completions", {"prompt": ["a"] * 5}, "prompt"),
        ("/v1/completions", {"prompt": ["a"] * 3, "n": 2}, "prompt"),
        ("/generate", {"inputs": ["a"] * 5}, "inputs"),
        (CHAT, {**HELLO, "n": 5}, "n"),
    ]:
        response = strict_endpoint.post(path, {"model": "slow", **body}, headers=KEY)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


# Headers


@pytest.mark.parametrize(
    "headers",
    [
        [b"x_session_id: a"],
        [b"x-session_id: a"],
        [b"x-session-id: a", b"x-session-id: a"],
        [b"x-session-id: a", b"X_Session_Id: b"],
        [b"x-session-id: \xc3\xa4"],
        [b"x-session-id: "],
        [b"x-session-id: " + b"a" * 201],
        [b"x-session-id: a", b"content-length: 1"],
    ],
)
def test_header_tricks(simulated_endpoint: ServeCommand, headers: list[bytes]) -> None:
    """A session header that could be read in two ways is refused."""
    assert status_of(simulated_endpoint, raw(CHAT, json.dumps(HELLO).encode(), *headers)) == 400


@pytest.mark.parametrize(
    "header",
    [
        b"x-session-id: \xff",
        b"x-request-id: \xff",
        b"X-Request-Id: \xff",
        b"serve_multiplexed_model_id: \xff",
        b"serve-multiplexed-model-id: \xff",
        b"x-request-timeout-seconds: 1\r\nx-session-id: \xff",
    ],
)
def test_header_that_serve_cannot_read(front: tuple[Front, ServeCommand], header: bytes) -> None:
    """A header that Serve reads, and that is not ASCII, is refused, and does not make Serve fail."""
    assert status_of(front[0], raw(CHAT, json.dumps(HELLO).encode(), header)) == 400


@pytest.mark.parametrize("header", [b"x-request-disconnect-disabled: \xff", b"x-request-timeout-seconds: \xff"])
def test_header_that_nobody_reads(front: tuple[Front, ServeCommand], header: bytes) -> None:
    """What Serve would obey is passed over, whatever is in it."""
    assert status_of(front[0], raw(CHAT, json.dumps(HELLO).encode(), header)) == 200


def test_no_client_cuts_a_stream(front: tuple[Front, ServeCommand]) -> None:
    """Serve's header for a deadline, which it keeps by cutting the connection, is passed over."""
    body = {**HELLO, "max_tokens": 400, "stream": True}  # 2 s
    headers = {"x-request-timeout-seconds": "0.5"}
    text = requests.post(front[0].url + CHAT, json=body, headers=headers, timeout=60).text
    assert text.endswith("data: [DONE]\n\n")


def test_header_against_body(simulated_endpoint: ServeCommand) -> None:
    """Header and body may both name the session, if it is the same one."""
    headers = {"x-session-id": "7"}
    assert simulated_endpoint.post(CHAT, {**HELLO, "session_id": 7}, headers=headers).status_code == 200
    refused = simulated_endpoint.post(CHAT, {**HELLO, "session_id": "8"}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "session_id")


# Clients that are slow, or gone


@pytest.mark.parametrize("sent", [b"POST /v1/chat", b"\r\ncontent-length: 101\r\n", b"\r\n\r\n", b"\r\n\r\n{ "])
def test_slow_loris(strict_endpoint: ServeCommand, sent: bytes) -> None:
    """Clients that fall silent in mid-request, in its head or its body, get status 408, and hold up nobody else."""
    request = raw(CHAT, b"{" + b" " * 100, f"authorization: Bearer {KEYS[0]}".encode())
    half = request[: request.index(sent) + len(sent)]
    with ExitStack() as stack:
        slow = [stack.enter_context(connection(strict_endpoint)) for _ in range(50)]
        for connected in slow:
            connected.sendall(half)
        assert strict_endpoint.get("/v1/models", headers=KEY).status_code == 200
        for connected in slow:
            assert connected.recv(4096).split()[1] == b"408"
    assert strict_endpoint.get("/v1/models", headers=KEY).status_code == 200


def test_slow_file(strict_endpoint: ServeCommand) -> None:
    """A body that takes longer than any of its silences may goes on being read: as a form that ends in nothing here."""
    header = f"authorization: Bearer {KEYS[0]}".encode()
    request = raw("/v1/files", b" " * 10_000, header).replace(b"application/json", b"multipart/form-data; boundary=x")
    head = request[: request.index(b"\r\n\r\n") + 4]
    began, num_sent = time.monotonic(), 0
    with connection(strict_endpoint) as connected:
        connected.sendall(head)
        while time.monotonic() < began + 12:
            connected.sendall(b" ")
            num_sent += 1
            assert strict_endpoint.get("/v1/models", headers=KEY).status_code == 200
        connected.sendall(b" " * (10_000 - num_sent))
        assert connected.recv(4096).split()[1] == b"400"


@pytest.mark.parametrize("header", [b"accept: */*", b"x-request-disconnect-disabled: ?1"])
@pytest.mark.parametrize("stream", [False, True])
def test_client_leaves(front: tuple[Front, ServeCommand], stream: bool, header: bytes) -> None:
    """When the client is gone, its request is ended in the engine within a second, as the engine itself counts.

    Also that of one that asks Serve not to look.
    """
    asked, endpoint = front
    wait_for(lambda: _in_engines(endpoint)[0] == 0)
    _, before = _in_engines(endpoint)
    aborted = endpoint.state()["num_aborted"]
    body = {**HELLO, "max_tokens": 8000, "stream": stream}  # 40 s
    with connection(asked) as connected:
        sent_at = time.monotonic()
        connected.sendall(raw(CHAT, json.dumps(body).encode(), header))
        wait_for(lambda: _in_engines(endpoint)[0] == 1)
    left_s = time.monotonic() - sent_at
    wait_for(lambda: _in_engines(endpoint)[0] == 0)
    _, after = _in_engines(endpoint)
    assert 0 < (after - before) / TOKENS_PER_S < left_s + 1
    wait_for(lambda: endpoint.state()["num_aborted"] > aborted)
    wait_for(lambda: endpoint.state()["num_running"] == 0)
    assert endpoint.state()["num_aborted"] == aborted + 1


def _in_engines(endpoint: ServeCommand) -> tuple[int, int]:
    """Return how many requests are in the engines, and how many tokens these have generated."""

    def told() -> list[dict[str, Any]]:  # some seconds after the start
        slots: list[dict[str, Any]] = endpoint.state()["slots"]
        return slots if all(slot["engine"] for slot in slots) else []

    slots = wait_for(told)
    return sum(slot["num_running"] for slot in slots), sum(slot["engine"]["num_tokens"] for slot in slots)


def test_heartbeat(strict_endpoint: ServeCommand) -> None:
    """A stream that has nothing to say yet says so."""
    body = {"model": "slow", **HELLO, "stream": True}
    with strict_endpoint.post(CHAT, {**body, "max_tokens": 8000}, headers=KEY, stream=True) as first:
        assert first.status_code == 200
        second = strict_endpoint.post(CHAT, body, headers=KEY, stream=True)  # waits for the first one's end
    text = second.text
    assert text.startswith(": heartbeat\n\n")
    assert text.endswith("data: [DONE]\n\n")


def test_outgrown_after_a_heartbeat(strict_endpoint: ServeCommand) -> None:
    """A conversation that outgrows the context has status -3, also when the client has heard a heartbeat before."""
    running = {"model": "slow", **HELLO, "max_tokens": 8000, "stream": True}
    with requests.post(strict_endpoint.url + CHAT, json=running, headers=KEY, stream=True, timeout=60) as first:
        assert first.status_code == 200
        body = {"model": "slow", "inputs": "word " * 9000, "session_id": uuid.uuid4().hex}
        second = strict_endpoint.post("/stream_chat", body, headers=KEY, stream=True)  # waits for the first one's end
    text = second.text
    assert text.startswith(": heartbeat\n\n")
    assert text.endswith('data: {"status":-3,"text":"","n_tokens":0}\n\n')


def test_failure_in_mid_stream(strict_endpoint: ServeCommand) -> None:
    """A stream whose engine fails, with no attempt left, ends with an `error` event."""
    body = {"model": "slow", "messages": [{"role": "user", "content": "FAIL"}], "stream": True}
    text = strict_endpoint.post(CHAT, body, headers=KEY).text
    *_, kind, data = text.strip().splitlines()
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"] == {
        "message": "simulated failure at token 3",
        "type": "EngineError",
        "param": None,
        "code": 500,
    }
    assert "[DONE]" not in text


@pytest.mark.parametrize("path", [CHAT, "/generate", "/stream_chat"])
def test_saturated(strict_endpoint: ServeCommand, path: str) -> None:
    """When the queue is full, it is status 429, at once and on every route."""
    running = {"model": "slow", **HELLO, "max_tokens": 8000, "stream": True}
    one_more = HELLO if path == CHAT else {"inputs": "a"}
    with ExitStack() as stack:
        for _ in range(2):
            response = requests.post(strict_endpoint.url + CHAT, json=running, headers=KEY, stream=True, timeout=60)
            stack.enter_context(response)
            assert response.status_code == 200  # with the first heartbeat
        refused = strict_endpoint.post(path, {"model": "slow", **one_more}, headers=KEY)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "PoolSaturatedError"
    # One is answered at a time, so when this one is, those before it have gone.
    last = {"model": "slow", **HELLO, "max_tokens": 1}
    wait_for(lambda: strict_endpoint.post(CHAT, last, headers=KEY).status_code == 200)


def test_deadline(strict_endpoint: ServeCommand) -> None:
    """A request that takes longer than the endpoint allows is status 504."""
    body = {"model": "slow", **HELLO, "max_tokens": 8000}
    response = strict_endpoint.post(CHAT, body, headers=KEY)
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "RequestTimeoutError"


def test_long_list(strict_endpoint: ServeCommand) -> None:
    """A list of more prompts than may wait is answered all the same."""
    body = {"model": "slow", "inputs": ["a", "b", "c", "d"], "max_new_tokens": 1}
    response = strict_endpoint.post("/generate", body, headers=KEY)
    assert [result.get("finish_reason") for result in response.json()["results"]] == ["length"] * 4


def test_deadline_of_a_list(strict_endpoint: ServeCommand) -> None:
    """The endpoint's own limit ends the prompts of a list too, each for itself."""
    body = {"model": "slow", "inputs": ["a", "b"], "max_new_tokens": 8000, "timeout": None}
    response = strict_endpoint.post("/generate", body, headers=KEY)
    assert [result["error"]["type"] for result in response.json()["results"]] == ["RequestTimeoutError"] * 2


def test_two_sessions_of_one_name(strict_endpoint: ServeCommand) -> None:
    """Where two models have a session of that name each, the one that is meant has to be named."""
    for model in ("slow", "none"):
        turn = {"model": model, "prompt": "one", "max_tokens": 1, "session_id": "both", "sequence_start": True}
        assert strict_endpoint.post("/v1/completions", turn, headers=KEY).status_code == 200
    url = f"{strict_endpoint.url}/sessions/both"
    for refused in (
        requests.get(url, headers=KEY, timeout=60),
        requests.delete(url, headers=KEY, timeout=60),
        requests.post(f"{url}/fork", json={"session_id": "third"}, headers=KEY, timeout=60),
    ):
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "model"
    assert requests.delete(f"{url}?model=none", headers=KEY, timeout=60).status_code == 200
    assert requests.get(url, headers=KEY, timeout=60).json()["model"] == "slow"


def test_state_without_one_manager(strict_endpoint: ServeCommand) -> None:
    """Where the manager of one model does not answer, the others are told of all the same."""
    manager, _ = strict_endpoint.processes("ray::ManagerActor")
    manager.suspend()
    try:
        models = strict_endpoint.get("/state", headers=KEY).json()["models"]
        metrics = strict_endpoint.get("/metrics", headers=KEY).text
    finally:
        manager.resume()
    (silent,) = (model["name"] for model in models if "has not answered" in model["problem"])
    (other,) = (model["name"] for model in models if model["slots"])
    assert {silent, other} == {"slow", "none"}
    assert f'raylm_requests_finished_total{{model="{other}"}}' in metrics
    assert f'model="{silent}"' not in metrics


def test_cancel_without_managers(strict_endpoint: ServeCommand) -> None:
    """A request is cancelled at its own gateway whatever the managers of the models do."""
    name = uuid.uuid4().hex
    body = {"model": "none", **HELLO, "max_tokens": 8000, "stream": True, "request_id": name}
    managers = strict_endpoint.processes("ray::ManagerActor")
    assert len(managers) == 2
    with requests.post(strict_endpoint.url + CHAT, json=body, headers=KEY, stream=True, timeout=60) as running:
        events = running.iter_lines()
        next(events)
        for manager in managers:
            manager.suspend()
        try:
            cancelled = strict_endpoint.post(f"/requests/{name}/cancel", headers=KEY)
        finally:
            for manager in managers:
                manager.resume()
        assert cancelled.json() == {"request_id": name, "cancelled": True}
        assert b"RequestCancelledError" in list(events)[-2]


# The log


def _log_folder(endpoint: ServeCommand) -> Path:
    (raylet,) = endpoint.processes("raylet/raylet")
    found = re.search(r"--session[-_]dir=(\S+)", " ".join(raylet.cmdline()))
    assert found is not None
    return Path(found[1], "logs")


def _log_lines(endpoint: ServeCommand) -> list[dict[str, Any]]:
    lines = []
    for file in _log_folder(endpoint).rglob("worker-*.err"):
        # The last one may be half written. Names may have line separators of Unicode in them.
        lines += [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1] if line.startswith(b"{")]
    return lines


def test_no_key_is_in_the_log(strict_endpoint: ServeCommand) -> None:
    """Neither a key that opens the endpoint nor one that does not is written anywhere in Ray's folder."""
    keys = (*KEYS, uuid.uuid4().hex)
    for key in keys:
        path = f"/requests/{uuid.uuid4().hex}/cancel"
        strict_endpoint.post(path, headers={"Authorization": f"Bearer {key}"})
        wait_for(lambda path=path: any(line.get("path") == path for line in _log_lines(strict_endpoint)))
    written = b"".join(file.read_bytes() for file in _log_folder(strict_endpoint).rglob("*") if file.is_file())
    assert not [key for key in keys if key.encode() in written]


def test_log(simulated_endpoint: ServeCommand) -> None:
    """Each request is a line with its id and its session, and without its text."""
    names = []
    secret = uuid.uuid4().hex
    for path, body in [
        (CHAT, {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}),
        (CHAT, {"messages": [{"role": "user", "content": secret}], "max_tokens": 2, "stream": True}),
        ("/v1/completions", {"prompt": [secret, f"FAIL {secret}"]}),
        ("/generate", {"inputs": f"FAIL {secret}", "sequence_end": False}),
        ("/stream_chat", {"inputs": secret, "sequence_start": False}),
    ]:
        names.append(uuid.uuid4().hex)
        session_id = f"session-of-{names[-1]}"
        simulated_endpoint.post(path, {**body, "request_id": names[-1], "session_id": session_id})
    told = {}

    def complete() -> bool:
        lines = _log_lines(simulated_endpoint)
        told.update({line.get("request_id"): line for line in lines if line["message"] == "request"})
        return all(name in told for name in names)

    wait_for(complete)
    for name in names:
        assert told[name]["session_id"] == f"session-of-{name}"
        assert told[name]["duration_ms"] > 0
    assert [told[name]["status"] for name in names] == [200, 200, 500, 500, 200]
    assert [told[name].get("error") for name in names[2:]] == ["EngineError", "EngineError", "SessionNotFoundError"]
    assert told[names[1]]["slot"] in (0, 1)
    (raylet,) = simulated_endpoint.processes("raylet/raylet")
    found = re.search(r"--session[-_]dir=(\S+)", " ".join(raylet.cmdline()))
    assert found is not None
    for file in Path(found[1], "logs").rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_log_of_refusals(simulated_endpoint: ServeCommand) -> None:
    """A request that is refused, at whatever point, is told with the ids that it came with."""
    refused = {"nonsense": 1}, {"model": "unknown"}, {"best_of": 3}, {"prompt": ""}, {"sequence_start": True, "n": 2}
    names = [uuid.uuid4().hex for _ in refused]
    for name, wrong in zip(names, refused, strict=True):
        body = {"prompt": "a", "request_id": name, "session_id": f"session-of-{name}", **wrong}
        response = simulated_endpoint.post("/v1/completions", body)
        assert response.status_code in (400, 404)
        assert response.headers["x-raylm-request-id"] == name
    told: dict[str, dict[str, Any]] = {}

    def complete() -> bool:
        told.update({str(line.get("request_id")): line for line in _log_lines(simulated_endpoint)})
        return all(name in told for name in names)

    wait_for(complete)
    assert [told[name]["session_id"] for name in names] == [f"session-of-{name}" for name in names]


def test_log_of_a_header(simulated_endpoint: ServeCommand) -> None:
    """The session that the header names is told also where the body cannot be read."""
    name = uuid.uuid4().hex
    headers = {"x-session-id": name, "content-type": "application/json"}
    assert simulated_endpoint.post("/v1/completions", data=b"{", headers=headers).status_code == 400
    wait_for(lambda: [line for line in _log_lines(simulated_endpoint) if line.get("session_id") == name])


def test_log_of_sessions_and_cancelling(simulated_endpoint: ServeCommand) -> None:
    """What is done to a session or a request is told with its id."""
    name = uuid.uuid4().hex
    simulated_endpoint.get(f"/sessions/{name}")
    simulated_endpoint.delete(f"/sessions/{name}")
    simulated_endpoint.post(f"/sessions/{name}/fork", {"session_id": "a-copy"})
    simulated_endpoint.post(f"/requests/{name}/cancel")

    def told(field: str) -> list[tuple[str, str]]:
        lines = [line for line in _log_lines(simulated_endpoint) if line.get(field) == name]
        return sorted((line["method"], line["path"]) for line in lines)

    of_session = [("DELETE", f"/sessions/{name}"), ("GET", f"/sessions/{name}"), ("POST", f"/sessions/{name}/fork")]
    wait_for(lambda: told("session_id") == of_session and told("request_id") == [("POST", f"/requests/{name}/cancel")])


@pytest.mark.parametrize("evil", ["a\r\nx-evil: 1", "\u20ac", " a", "a" * 1000])
def test_refused_id_is_in_no_header(simulated_endpoint: ServeCommand, evil: str) -> None:
    """An id that is refused adds nothing of its own to the headers of the answer."""
    response = simulated_endpoint.post("/v1/completions", {"prompt": "a", "request_id": evil})
    assert response.status_code == 400
    assert "x-evil" not in response.headers
    assert len(response.headers.get("x-raylm-request-id", "")) <= 200


def test_log_prompts() -> None:
    """Where the endpoint is told so, the text is in the log."""
    config = {"models": [{"name": "sim", "engines": [{"kind": "simulated"}]}], "gateway": {"log_prompts": True}}
    with serve_command(config, proxy="python") as endpoint:
        endpoint.post("/generate", {"inputs": "to be written", "max_new_tokens": 1})
        wait_for(lambda: any(line.get("text") == "to be written" for line in _log_lines(endpoint)))
