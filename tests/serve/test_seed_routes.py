"""The routes with the seed's words, sessions, cancelling, and what the endpoint says of itself."""

from __future__ import annotations

import itertools
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from raylm.engines.simulated import greedy_text
from tests.serve.command import ServeCommand, serve_command, wait_for

GREEDY = {"temperature": 0, "max_new_tokens": 6}


@pytest.fixture
def session_id() -> str:
    """A session that no other test knows."""
    return uuid.uuid4().hex


def events(response: requests.Response) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream; an `error` event has the key `error`."""
    assert response.status_code == 200, response.text
    for line in response.iter_lines(chunk_size=1):
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            yield json.loads(line.removeprefix(b"data: "))


def stream_chat(endpoint: ServeCommand, inputs: Any, **settings: Any) -> list[dict[str, Any]]:
    """Return all events of a turn."""
    body = {"inputs": inputs, **GREEDY, **settings}
    return list(events(endpoint.post("/stream_chat", body, stream=True)))


@contextmanager
def running(endpoint: ServeCommand, path: str, body: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
    """A long stream that has begun, until the block is left; yields the events that are to come."""
    with endpoint.post(path, {"stream": True, **body}, stream=True) as response:
        to_come = events(response)
        next(to_come)
        yield to_come


# /generate


def test_generate(simulated_endpoint: ServeCommand) -> None:
    """One prompt has one answer, with what it cost and how it came about."""
    answer = simulated_endpoint.post("/generate", {"inputs": "one two", **GREEDY}).json()
    assert answer["text"] == greedy_text("one two", 6)
    assert answer["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 6}
    assert answer["receipt"]["engine"] == "simulated"


def test_generate_list(simulated_endpoint: ServeCommand) -> None:
    """A list keeps its order, and a prompt that fails has its own error."""
    prompts = [f"number {number}" for number in range(30)]
    prompts[11:13] = "FAIL", ""
    results = simulated_endpoint.post("/generate", {"inputs": prompts, **GREEDY}).json()["results"]
    texts = [result.get("text") for result in results]
    expected: list[str | None] = [greedy_text(prompt, 6) for prompt in prompts]
    expected[11:13] = None, None
    assert texts == expected
    errors = [result["error"]["type"] for result in results[11:13]]
    assert errors == ["EngineError", "InvalidRequestError"]


@pytest.mark.parametrize("where", ["header", "body"])
def test_list_in_a_session(simulated_endpoint: ServeCommand, session_id: str, where: str) -> None:
    """The prompts of a list that names a session are answered in the slot of that name, whichever gateway is asked."""
    body = {"inputs": ["one", "two", "three"], **GREEDY, **({"session_id": session_id} if where == "body" else {})}
    headers = {"x-session-id": session_id} if where == "header" else {}
    receipts = [
        result["receipt"]
        for _ in range(4)
        for result in simulated_endpoint.post("/generate", body, headers=headers).json()["results"]
    ]
    assert len({receipt["slot"] for receipt in receipts}) == 1
    assert {receipt["why"] for receipt in receipts} == {"pinned"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"inputs": ""}, "inputs"),
        ({"inputs": ["a"], "sequence_end": False}, "inputs"),
        ({"inputs": "a", "sequence_end": False}, "session_id"),
        ({"inputs": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"inputs": "a", "min_new_tokens": 9, "max_new_tokens": 3}, None),
        ({"inputs": "a", "sampling": 1}, "sampling"),
        ({}, "inputs"),
    ],
)
def test_wrong_generate(simulated_endpoint: ServeCommand, body: dict[str, Any], param: str | None) -> None:
    """What is wrong is refused by name."""
    response = simulated_endpoint.post("/generate", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_empty_list(simulated_endpoint: ServeCommand) -> None:
    """No prompts have no results."""
    assert simulated_endpoint.post("/generate", {"inputs": []}).json() == {"results": []}


# /stream_chat


def test_stream_chat(simulated_endpoint: ServeCommand) -> None:
    """Text is cumulative, statuses are 1 until the last, which is 0 and has the receipt."""
    *parts, last = stream_chat(simulated_endpoint, "hello")
    whole = greedy_text("user: hello\n", 6)
    assert {part["status"] for part in parts} == {1}
    assert all(later["text"].startswith(part["text"]) for part, later in itertools.pairwise(parts))
    assert [part["n_tokens"] for part in parts] == sorted({part["n_tokens"] for part in parts})
    assert (last["status"], last["text"], last["n_tokens"]) == (0, whole, 6)
    assert last["receipt"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 6}


def test_one_event(simulated_endpoint: ServeCommand) -> None:
    """With stream=false there is one event, which has all of it."""
    (event,) = stream_chat(simulated_endpoint, {"role": "user", "content": "hello"}, stream=False)
    assert (event["status"], event["text"]) == (0, greedy_text("user: hello\n", 6))


def test_session(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """Turns add up: the second answer depends on the first, and after the end the session is closed."""
    first = stream_chat(simulated_endpoint, "one", session_id=session_id, sequence_end=False)[-1]["text"]
    second = stream_chat(simulated_endpoint, "two", session_id=session_id, sequence_start=False, sequence_end=False)[
        -1
    ]["text"]
    assert second == greedy_text(f"user: one\nassistant: {first}\nuser: two\n", 6)
    messages = simulated_endpoint.get(f"/sessions/{session_id}").json()["messages"]
    assert [message["content"] for message in messages] == ["one", first, "two", second]
    stream_chat(simulated_endpoint, "three", session_id=session_id, sequence_start=False)
    (closed,) = stream_chat(simulated_endpoint, "four", session_id=session_id, sequence_start=False)
    assert closed == {"status": -2, "text": "", "n_tokens": 0}


def test_number_as_session(simulated_endpoint: ServeCommand) -> None:
    """A session may be named by a number, and is the same as that of its digits."""
    number = uuid.uuid4().int >> 80
    stream_chat(simulated_endpoint, "one", session_id=number, sequence_end=False)
    assert simulated_endpoint.get(f"/sessions/{number}").status_code == 200
    assert simulated_endpoint.delete(f"/sessions/{number}").json() == {"session_id": str(number), "ended": True}


def test_outgrown(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """A conversation that outgrows the context has status -3."""
    (event,) = stream_chat(simulated_endpoint, "word " * 9000, session_id=session_id)
    assert event["status"] == -3


@pytest.mark.parametrize(
    ("body", "param"),
    [({"inputs": []}, "inputs"), ({"inputs": [{"role": "user"}]}, "inputs"), ({"inputs": "a", "top_p": 2}, "top_p")],
)
def test_wrong_stream_chat(simulated_endpoint: ServeCommand, body: dict[str, Any], param: str) -> None:
    """A failure before the first event is an ordinary error."""
    response = simulated_endpoint.post("/stream_chat", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_failed_stream_chat(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """A failure in the middle is an `error` event, and the session is as it was before."""
    stream_chat(simulated_endpoint, "one", session_id=session_id, sequence_end=False)
    before = simulated_endpoint.get(f"/sessions/{session_id}").json()
    body = {"inputs": "FAIL", "session_id": session_id, "sequence_start": False, "sequence_end": False, **GREEDY}
    text = simulated_endpoint.post("/stream_chat", body).text
    *_, kind, data = text.strip().splitlines()
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == 500
    assert simulated_endpoint.get(f"/sessions/{session_id}").json() == before


# Sessions on OpenAI's routes


def test_chat_session(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """With sequence_start a chat completion is a turn of a session whose transcript is kept."""

    def say(text: str, **settings: Any) -> str:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "temperature": 0}
        answer = simulated_endpoint.post("/v1/chat/completions", {**body, "session_id": session_id, **settings})
        content: str = answer.json()["choices"][0]["message"]["content"]
        return content

    first = say("one", sequence_start=True)
    second = say("two", sequence_start=False, sequence_end=True)
    assert second == greedy_text(f"user: one\nassistant: {first}\nuser: two\n", 4)
    assert simulated_endpoint.get(f"/sessions/{session_id}").status_code == 404


def test_text_session(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """The same for raw text, where each turn goes on right after the one before; /generate may take it up."""
    body = {"session_id": session_id, "max_tokens": 4, "temperature": 0, "stream": True}
    stream = simulated_endpoint.post("/v1/completions", {**body, "prompt": "one ", "sequence_start": True})
    first = "".join(
        json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        for line in stream.text.splitlines()
        if line.startswith("data: {")
    )
    answer = simulated_endpoint.post(
        "/generate", {"inputs": "two", "session_id": session_id, "sequence_start": False, **GREEDY}
    )
    assert answer.json()["text"] == greedy_text(f"one {first}two", 6)


def test_kinds_do_not_mix(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """A conversation is not continued as raw text."""
    stream_chat(simulated_endpoint, "one", session_id=session_id, sequence_end=False)
    body = {"prompt": "two", "session_id": session_id, "sequence_start": False}
    response = simulated_endpoint.post("/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "session_id"


def test_no_echo_in_a_session(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """A turn is not echoed: its prompt is the whole transcript, and the client has sent a part of it."""
    body = {"prompt": "one", "session_id": session_id, "sequence_start": True, "echo": True}
    response = simulated_endpoint.post("/v1/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "echo")


def test_unknown_session(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """A session that was never begun is unknown on every route but /stream_chat, which has a status for it."""
    body = {"prompt": "two", "session_id": session_id, "sequence_start": False}
    assert simulated_endpoint.post("/v1/completions", body).status_code == 404
    assert simulated_endpoint.get(f"/sessions/{session_id}").json()["error"]["type"] == "SessionNotFoundError"
    assert simulated_endpoint.delete(f"/sessions/{session_id}").status_code == 404
    assert simulated_endpoint.post(f"/sessions/{session_id}/fork", {"session_id": "new"}).status_code == 404


@pytest.mark.parametrize("suffix", ["", "/with/slashes", " äöü?#%"])
def test_fork(simulated_endpoint: ServeCommand, session_id: str, suffix: str) -> None:
    """A fork begins with the transcript of the other, and each goes on by itself. Any name will do."""
    session_id, fork = session_id + suffix, f"fork-{session_id}{suffix}"
    path, fork_path = (f"/sessions/{requests.utils.quote(name, safe='')}" for name in (session_id, fork))
    stream_chat(simulated_endpoint, "one", session_id=session_id, sequence_end=False)
    forked = simulated_endpoint.post(f"{path}/fork", {"session_id": fork}).json()
    assert (forked["session_id"], forked["model"]) == (fork, "sim")
    before = simulated_endpoint.get(path).json()
    stream_chat(simulated_endpoint, "two", session_id=fork, sequence_start=False, sequence_end=False)
    assert simulated_endpoint.get(path).json() == before
    assert len(simulated_endpoint.get(fork_path).json()["messages"]) == 4
    assert simulated_endpoint.delete(fork_path).status_code == 200
    assert simulated_endpoint.get(path).status_code == 200


def test_busy_session(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """A session has one turn at a time, whichever gateway is asked."""
    body = {"inputs": "one", "session_id": session_id, "sequence_end": False, "max_new_tokens": 8000}
    with running(simulated_endpoint, "/stream_chat", body):
        for _ in range(4):  # both gateways
            response = simulated_endpoint.post("/stream_chat", {**body, "sequence_start": False})
            assert response.status_code == 409
            assert response.json()["error"]["type"] == "SessionBusyError"
    # The client that left gave the session back.
    wait_for(lambda: simulated_endpoint.get(f"/sessions/{session_id}").status_code == 404)


@pytest.mark.parametrize("where", ["header", "body", "both"])
def test_affinity(simulated_endpoint: ServeCommand, session_id: str, where: str) -> None:
    """A session that is a name alone stays in one slot, whichever gateway is asked."""
    named: dict[str, Any] = {"session_id": session_id} if where != "header" else {}
    headers = {"x-session-id": session_id} if where != "body" else {}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **named}
    slots = []
    for number in range(8):
        path = "/v1/chat/completions" if number % 2 else "/v1/completions"
        asked = body if number % 2 else {"prompt": "hi", "max_tokens": 2, **named}
        slots.append(simulated_endpoint.post(path, asked, headers=headers).headers["x-raylm-slot"])
    assert len(set(slots)) == 1


@pytest.mark.parametrize("path", ["/generate", "/stream_chat"])
def test_header_alone(simulated_endpoint: ServeCommand, session_id: str, path: str) -> None:
    """On the seed's routes the header alone pins too: no transcript begins or ends, and requests may run together."""
    stream_chat(simulated_endpoint, "one", session_id=session_id, sequence_end=False)
    before = simulated_endpoint.get(f"/sessions/{session_id}").json()
    long = {"inputs": "hello", "max_new_tokens": 8000}
    headers = {"x-session-id": session_id}
    with simulated_endpoint.post("/stream_chat", long, headers=headers, stream=True) as running:
        next(events(running))
        response = simulated_endpoint.post(path, {"inputs": "hello", **GREEDY}, headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["x-raylm-slot"] == running.headers["x-raylm-slot"] == str(before["slot"])
        assert response.headers["x-raylm-why"] == "pinned"
    assert simulated_endpoint.get(f"/sessions/{session_id}").json() == before


def test_header_of_a_turn(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """With a word on the sequence, a request whose session is in the header is a turn of it."""
    headers = {"x-session-id": session_id}
    body = {"inputs": "one ", "sequence_end": False, **GREEDY}
    first = simulated_endpoint.post("/generate", body, headers=headers).json()["text"]
    body = {"inputs": "two", "sequence_start": False, **GREEDY}
    second = simulated_endpoint.post("/generate", body, headers=headers).json()["text"]
    assert second == greedy_text(f"one {first}two", 6)


def test_sessions_spread(simulated_endpoint: ServeCommand) -> None:
    """New sessions go to both slots."""
    slots = set()
    for _ in range(6):
        body = {"prompt": "hi", "max_tokens": 2, "session_id": uuid.uuid4().hex}
        slots.add(simulated_endpoint.post("/v1/completions", body).headers["x-raylm-slot"])
    assert slots == {"0", "1"}


# Cancelling


@pytest.mark.parametrize("body", [{"prompt": "hi"}, {"prompt": ["hi", "ho"], "n": 2}])
def test_cancel(simulated_endpoint: ServeCommand, body: dict[str, Any]) -> None:
    """A request is cancelled by its id, with all its parts, also by a gateway that does not have it."""
    statuses = set()
    # The proxy chooses the gateway with the fewest connections, and of equal ones each in turn.
    with running(simulated_endpoint, "/v1/completions", {"prompt": "hi", "max_tokens": 8000}):
        for number in range(30):
            name = uuid.uuid4().hex
            asked = {**body, "max_tokens": 8000, "request_id": name}
            with running(simulated_endpoint, "/v1/completions", asked) as to_come:
                if number % 2:
                    simulated_endpoint.get("/health")
                cancelled = simulated_endpoint.post(f"/requests/{name}/cancel")
                here = cancelled.status_code == 200
                assert cancelled.json() == {"request_id": name, "cancelled": True if here else "asked"}
                *_, last = to_come
            assert last["error"]["type"] == "RequestCancelledError"
            statuses.add(cancelled.status_code)
            if len(statuses) == 2:
                break
    assert statuses == {200, 202}


def test_cancel_of_a_whole_answer(simulated_endpoint: ServeCommand) -> None:
    """A request that is no stream ends with status 499."""
    name = uuid.uuid4().hex
    answers: list[requests.Response] = []
    body = {"prompt": "hi", "max_tokens": 8000, "request_id": name}
    thread = threading.Thread(target=lambda: answers.append(simulated_endpoint.post("/v1/completions", body)))
    thread.start()

    def cancelled() -> bool:
        simulated_endpoint.post(f"/requests/{name}/cancel")
        thread.join(0.1)
        return not thread.is_alive()

    wait_for(cancelled)
    assert answers[0].status_code == 499
    assert answers[0].json()["error"]["type"] == "RequestCancelledError"


# What the endpoint says of itself


def test_tokenize(simulated_endpoint: ServeCommand) -> None:
    """The tokens of a prompt or of a conversation are told."""
    of_text = simulated_endpoint.post("/tokenize", {"prompt": "one two three"}).json()
    assert of_text["count"] == len(of_text["tokens"]) == 3
    assert of_text["max_model_len"] == 8192
    of_chat = simulated_endpoint.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()
    assert of_chat["count"] == 2
    for body in ({}, {"prompt": "a", "messages": []}):
        assert simulated_endpoint.post("/tokenize", body).json()["error"]["param"] == "prompt"


def test_health(simulated_endpoint: ServeCommand) -> None:
    """With an actor for every model, all is well."""
    assert simulated_endpoint.get("/health").json() == {"status": "ok"}


def test_state(simulated_endpoint: ServeCommand) -> None:
    """The state has every slot, and what runs at any gateway."""

    def told() -> dict[str, Any]:
        state = simulated_endpoint.state()
        return state if (state["num_running"], state["num_clients"]) == (1, 2) else {}

    with running(simulated_endpoint, "/v1/completions", {"prompt": "hi", "max_tokens": 8000}):
        state = wait_for(told)
    assert state["name"] == "sim"
    assert state["num_clients"] == 2
    assert [(slot["slot"], slot["state"], slot["capacity"]) for slot in state["slots"]] == [
        (0, "up", 1024),
        (1, "up", 1024),
    ]
    assert len({slot["pid"] for slot in state["slots"]}) == 2


def _metrics(endpoint: ServeCommand) -> dict[str, float]:
    samples = [
        sample for family in text_string_to_metric_families(endpoint.told("/metrics").text) for sample in family.samples
    ]
    return {f"{sample.name}{sorted(sample.labels.items())}": sample.value for sample in samples}


def test_metrics(simulated_endpoint: ServeCommand, session_id: str) -> None:
    """Counters count what was sent, over all gateways; histograms agree with them."""
    label = "[('model', 'sim')]"
    wait_for(lambda: _metrics(simulated_endpoint)["raylm_requests_running" + label] == 0)  # those of others are told
    before = _metrics(simulated_endpoint)
    for _ in range(6):
        assert simulated_endpoint.post("/generate", {"inputs": "a b", **GREEDY}).status_code == 200
    stream_chat(simulated_endpoint, "c d", session_id=session_id, sequence_end=False)
    assert simulated_endpoint.post("/generate", {"inputs": "FAIL", **GREEDY}).status_code == 500

    def grown(name: str) -> float:
        return _metrics(simulated_endpoint)[name + label] - before[name + label]

    expected = {
        "raylm_requests_finished_total": 7,
        "raylm_requests_failed_total": 1,
        "raylm_tokens_total": 42,
        "raylm_first_token_seconds_count": 7,
        "raylm_token_gap_seconds_count": 7,
        "raylm_queue_seconds_count": 7,
        "raylm_sessions": 1,
        "raylm_requests_running": 0,
    }
    wait_for(lambda: {name: grown(name) for name in expected} == expected)
    after = _metrics(simulated_endpoint)
    assert after["raylm_requests_running" + label] == 0
    # What failed was tried again, each time in place of an attempt that was lost.
    moves = "raylm_moves_total[('cause', 'failed'), ('model', 'sim')]"
    moved = after[moves] - before.get(moves, 0)
    assert moved > 0
    assert after["raylm_attempts_total" + label] - before["raylm_attempts_total" + label] == 8 + moved


def _slot_metrics(endpoint: ServeCommand, name: str) -> list[float]:
    metrics = _metrics(endpoint)
    return [metrics[f"raylm_slot_{name}[('model', 'sim'), ('slot', '{slot}')]"] for slot in range(2)]


def test_metrics_of_slots(simulated_endpoint: ServeCommand) -> None:
    """Each slot tells whether it is up, what it works on, and how many tokens its engine has made."""
    wait_for(lambda: _slot_metrics(simulated_endpoint, "running") == [0, 0])
    before = _slot_metrics(simulated_endpoint, "tokens_total")
    with running(simulated_endpoint, "/v1/completions", {"prompt": "hi", "max_tokens": 8000}):
        wait_for(lambda: sorted(_slot_metrics(simulated_endpoint, "running")) == [0, 1])
        busy = _slot_metrics(simulated_endpoint, "running").index(1)
        wait_for(lambda: _slot_metrics(simulated_endpoint, "outstanding_tokens")[busy] >= 8000)
        wait_for(lambda: _slot_metrics(simulated_endpoint, "tokens_total")[busy] > before[busy])
    wait_for(lambda: _slot_metrics(simulated_endpoint, "running") == [0, 0])
    wait_for(lambda: _slot_metrics(simulated_endpoint, "outstanding_tokens") == [0, 0])
    wait_for(lambda: _slot_metrics(simulated_endpoint, "up") == [1, 1])
    assert _slot_metrics(simulated_endpoint, "deaths_total") == [0, 0]


def test_metrics_of_a_rescue() -> None:
    """What the watchdog has rescued is a move of its own cause, and the actor that hung is a death in its slot."""
    hanging = {"kind": "simulated", "faults": [{"match": "HANG", "at_token": 3, "action": "hang"}]}
    pool = {"first_token_timeout_s": 20, "token_gap_timeout_s": 5, "health_timeout_s": 10}
    model = {"name": "sim", "engines": [hanging, {"kind": "simulated"}], "pool": pool}
    with serve_command({"models": [model]}, proxy="python") as endpoint:
        wait_for(lambda: _slot_metrics(endpoint, "up") == [1, 1])
        with running(endpoint, "/v1/completions", {"prompt": "HANG", "max_tokens": 100}) as first:
            # One of two that are asked at the same time is at the actor that hangs.
            answer = endpoint.post("/generate", {"inputs": ["HANG", "HANG"], **GREEDY})
            assert [result["text"] for result in answer.json()["results"]] == [greedy_text("HANG", 6)] * 2
            assert "error" not in list(first)[-1]
        wait_for(lambda: _metrics(endpoint).get("raylm_moves_total[('cause', 'silent'), ('model', 'sim')]", 0) >= 1)
        wait_for(lambda: _slot_metrics(endpoint, "deaths_total")[0] >= 1)
        wait_for(lambda: _slot_metrics(endpoint, "up") == [1, 1])


def test_docs(simulated_endpoint: ServeCommand) -> None:
    """The page of the API loads nothing from elsewhere, which its policy would not let it either."""
    page = simulated_endpoint.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("docs.js", "docs.css", "style.css", "api.js"):
        assert simulated_endpoint.get(f"/static/{name}").status_code == 200
    assert "/v1/chat/completions" in simulated_endpoint.get("/openapi.json").json()["paths"]
