"""Files and batches through OpenAI's own client, and what may be killed meanwhile."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai.types import Batch

from raylm.engines.simulated import greedy_text
from tests.serve.command import ServeCommand, serve_command, wait_for
from tests.serve.conftest import EXPIRES_AFTER_S, KEYS

CHAT = "/v1/chat/completions"
NUM_TOKENS = 20
NUM_ROWS = 200

_ENDED = ("completed", "failed", "expired", "cancelled")
_TIMEOUT_S = 180.0


def row(name: str, **changes: Any) -> dict[str, Any]:
    """Return a row of a batch's file."""
    body = {"model": "sim", "messages": [{"role": "user", "content": name}], "max_tokens": 5, "temperature": 0}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body | changes}


def long_rows(number: int = NUM_ROWS) -> list[dict[str, Any]]:
    """Return rows that nobody else has sent, and that take a while."""
    batch = uuid.uuid4().hex[:8]
    return [row(f"{batch}-{index}", max_tokens=NUM_TOKENS) for index in range(number)]


def upload(client: openai.OpenAI, rows: Sequence[dict[str, Any]]) -> str:
    """Upload a batch's file and return its id."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return client.files.create(file=("rows.jsonl", content), purpose="batch").id


def begin(client: openai.OpenAI, rows: Sequence[dict[str, Any]], endpoint: Any = CHAT) -> Batch:
    """Begin a batch."""
    return client.batches.create(input_file_id=upload(client, rows), endpoint=endpoint, completion_window="24h")


def until(client: openai.OpenAI, batch: Batch, *statuses: str, num_done: int = 0) -> Batch:
    """Return a batch as soon as it has one of these statuses, by default one that is final, and so many rows done."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        assert counts is not None
        if batch.status in (statuses or _ENDED) and counts.completed + counts.failed >= num_done:
            return batch
        assert batch.status not in _ENDED, batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)


def lines(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """Return the rows of an output or of an error file by their names, each of which is there once."""
    if file_id is None:
        return {}
    rows = [json.loads(line) for line in client.files.content(file_id).iter_lines()]
    assert [name for name, count in Counter(row["custom_id"] for row in rows).items() if count > 1] == []
    return {row["custom_id"]: row for row in rows}


def texts(answers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return what a chat batch was answered."""
    return {name: row["response"]["body"]["choices"][0]["message"]["content"] for name, row in answers.items()}


def right(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return what greedy rows have to be answered."""
    return {row["custom_id"]: greedy_text(f"user: {row['custom_id']}\n", row["body"]["max_tokens"]) for row in rows}


def client_of(endpoint: ServeCommand, key: str = "none") -> openai.OpenAI:
    """Return OpenAI's client, which does not retry, so that tests see what the endpoint says."""
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(simulated_endpoint: ServeCommand) -> Iterator[openai.OpenAI]:
    """A client of the endpoint with two gateways."""
    with client_of(simulated_endpoint) as client:
        yield client


@pytest.fixture(scope="module")
def strict(strict_endpoint: ServeCommand) -> Iterator[openai.OpenAI]:
    """A client of the endpoint with keys and low limits."""
    with client_of(strict_endpoint, KEYS[0]) as client:
        yield client


# A batch


def test_chat_batch(client: openai.OpenAI) -> None:
    """Every row is answered once, and rightly; those that fail are in the error file, and the batch tells all of it."""
    good = [row(f"good {number}") for number in range(300)]
    bad = [row("FAIL", max_tokens=5), row("hot", temperature=9), row("long", messages=[])]
    batch = begin(client, [*good[:100], *bad, *good[100:]])
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", CHAT)
    batch = until(client, batch)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 303, "completed": 300, "failed": 3}
    assert batch.model == "sim"
    answers, failures = lines(client, batch.output_file_id), lines(client, batch.error_file_id)
    assert texts(answers) == right(good)
    assert list(answers) == [row["custom_id"] for row in good]
    first = answers["good 0"]
    assert (first["error"], first["response"]["status_code"]) == (None, 200)
    assert first["response"]["body"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert {name: row["response"]["status_code"] for name, row in failures.items()} == {
        "FAIL": 500,
        "hot": 400,
        "long": 400,
    }
    assert "temperature" in failures["hot"]["response"]["body"]["error"]["message"]
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(time for time in times if time is not None)
    assert batch.expires_at == batch.created_at + 24 * 3600
    assert (batch.failed_at, batch.expired_at, batch.cancelling_at, batch.cancelled_at) == (None,) * 4
    for file_id in (batch.output_file_id, batch.error_file_id):
        file = client.files.retrieve(str(file_id))
        assert (file.purpose, file.bytes) == ("batch_output", len(client.files.content(str(file_id)).content))


def test_completion_batch(client: openai.OpenAI) -> None:
    """Raw prompts are answered as well; a batch in which nothing fails has no error file."""
    rows = [
        {"custom_id": f"{number}", "method": "POST", "url": "/v1/completions", "body": body}
        for number, body in enumerate(
            [{"prompt": "one two", "max_tokens": 4, "temperature": 0}, {"model": "sim", "prompt": [1, 2, 3]}]
        )
    ]
    batch = until(client, begin(client, rows, "/v1/completions"))
    assert (batch.status, batch.error_file_id) == ("completed", None)
    answers = lines(client, batch.output_file_id)
    assert answers["0"]["response"]["body"]["choices"][0]["text"] == greedy_text("one two", 4)
    assert answers["1"]["response"]["body"]["usage"]["prompt_tokens"] == 3


def test_nothing_but_failures(client: openai.OpenAI) -> None:
    """A batch in which every row fails has no output file, and is completed."""
    batch = until(client, begin(client, [row("a", top_p=7)]))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert list(lines(client, batch.error_file_id)) == ["a"]


def test_metadata(client: openai.OpenAI) -> None:
    """What a client notes on a batch is there again."""
    batch = client.batches.create(
        input_file_id=upload(client, [row("a")]),
        endpoint=CHAT,
        completion_window="24h",
        metadata={"job": "nightly"},
    )
    assert until(client, batch).metadata == {"job": "nightly"}


# Files


def test_long_file(client: openai.OpenAI) -> None:
    """A file of several chunks comes back as it was."""
    content = os.urandom(3_500_000)
    file = client.files.create(file=("noise.bin", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose, file.expires_at) == (len(content), "noise.bin", "batch", None)
    assert client.files.content(file.id).content == content
    assert client.files.retrieve(file.id) == file


def test_file_that_expires(client: openai.OpenAI) -> None:
    """A file says when it will be deleted; so do the files of a batch, where that was asked for."""
    file = client.files.create(
        file=("a", json.dumps(row("a")).encode()),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert file.expires_at == file.created_at + 3600
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    output = client.files.retrieve(str(until(client, batch).output_file_id))
    assert output.expires_at == output.created_at + 7200


def test_lists(client: openai.OpenAI) -> None:
    """Files and batches are listed page by page, the latest first."""
    batches = [begin(client, [row(f"{number}")]) for number in range(3)]
    pages = client.batches.list(limit=2)
    assert [batch.id for batch in pages.data] == [batches[2].id, batches[1].id]
    assert pages.has_more
    assert client.batches.list(limit=1, after=batches[1].id).data[0].id == batches[0].id
    assert {batch.id for batch in batches} <= {batch.id for batch in client.batches.list(limit=2)}
    mine = [batch.input_file_id for batch in batches]
    for batch in batches:
        until(client, batch)
    assert [file.id for file in client.files.list(purpose="batch").data if file.id in mine] == mine[::-1]
    assert [file.id for file in client.files.list(purpose="batch", order="asc") if file.id in mine] == mine
    assert client.files.list(after=mine[1], order="asc", limit=1, purpose="batch").data[0].id == mine[2]
    assert {file.purpose for file in client.files.list(purpose="batch_output")} == {"batch_output"}


def test_deleting(client: openai.OpenAI) -> None:
    """A file that was deleted is gone."""
    file = upload(client, [row("a")])
    assert client.files.delete(file).to_dict() == {"id": file, "deleted": True, "object": "file"}
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")


# What is refused


def test_wrong_file(client: openai.OpenAI) -> None:
    """A file that is wrong ends its batch before anything is asked, and the batch says what is wrong in which line."""
    rows = [row("a"), row("a"), row("b", model="unknown"), row("c") | {"url": "/v1/completions"}]
    batch = until(client, begin(client, rows))
    assert (batch.status, batch.output_file_id, batch.in_progress_at) == ("failed", None, None)
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert [(error.line, error.code, error.param) for error in batch.errors.data or ()] == [
        (2, "duplicate_custom_id", "custom_id"),
        (3, "model_not_found", "body.model"),
        (4, "mismatched_endpoint", "url"),
    ]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_wrong_batch(simulated_endpoint: ServeCommand, changes: dict[str, Any], param: str) -> None:
    """A field that is wrong is named."""
    body = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"}
    response = simulated_endpoint.post("/v1/batches", body | changes)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "fine-tune"}, "purpose"),
        ({}, "purpose"),
        ({"purpose": "batch", "unknown": "1"}, "unknown"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "7"}, "expires_after"),
    ],
)
def test_wrong_upload(simulated_endpoint: ServeCommand, fields: dict[str, str], param: str) -> None:
    """A form that is wrong is refused, and what came of it is no file."""
    before = simulated_endpoint.get("/v1/files").json()
    response = simulated_endpoint.post("/v1/files", data=fields, files={"file": ("name", b"{}")})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert simulated_endpoint.get("/v1/files").json() == before


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files/none"),
        ("GET", "/v1/files/none/content"),
        ("DELETE", "/v1/files/none"),
        ("GET", "/v1/batches/none"),
        ("POST", "/v1/batches/none/cancel"),
        ("GET", "/v1/batches?after=none"),
        ("GET", "/v1/files?after=none"),
        ("GET", "/v1/files/..%2fbatches.db/content"),
    ],
)
def test_unknown(simulated_endpoint: ServeCommand, method: str, path: str) -> None:
    """What is not there is a 404, in OpenAI's words."""
    call = {"GET": simulated_endpoint.get, "POST": simulated_endpoint.post, "DELETE": simulated_endpoint.delete}
    response = call[method](path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == 404


@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches", "/v1/files/x/content"])
def test_key(strict_endpoint: ServeCommand, path: str) -> None:
    """These routes want a key like all others."""
    assert strict_endpoint.get(path).status_code == 401


@pytest.mark.parametrize("size", [200_001, 300_000])
def test_file_too_long(strict: openai.OpenAI, size: int) -> None:
    """A file that is longer than the limit is refused, also where only the file itself tells, and none is left."""
    before = [file.id for file in strict.files.list()]
    with pytest.raises(openai.APIStatusError) as caught:
        strict.files.create(file=("long", b"x" * size), purpose="batch")
    assert caught.value.status_code == 413
    assert [file.id for file in strict.files.list()] == before


def test_file_as_long_as_may_be(strict: openai.OpenAI) -> None:
    """The limit of files is not that of other bodies."""
    assert strict.files.create(file=("long", b"x" * 200_000), purpose="batch").bytes == 200_000


def test_memory_is_flat(simulated_endpoint: ServeCommand, client: openai.OpenAI) -> None:
    """No gateway holds a file, on its way in or out."""

    def most() -> int:
        gateways = simulated_endpoint.processes("ServeReplica:raylm:gateway")
        return max(gateway.memory_full_info().uss for gateway in gateways)

    before = most()
    content = os.urandom(100_000_000)
    file = client.files.create(file=("long", content), purpose="batch")
    assert client.files.content(file.id).content == content
    client.files.delete(file.id)
    assert most() - before < 30_000_000


# Its end before the end


def test_expiry(strict: openai.OpenAI) -> None:
    """A batch that is not done in its time expires: what was answered is in its output, the rest in its error file."""
    rows = [row(f"{number}", model="slow", max_tokens=1) for number in range(60)]  # one a second
    batch = until(strict, begin(strict, rows))
    assert batch.status == "expired"
    assert batch.expires_at == batch.created_at + EXPIRES_AFTER_S
    assert batch.expired_at is not None
    assert batch.expired_at >= batch.expires_at
    answers, failures = lines(strict, batch.output_file_id), lines(strict, batch.error_file_id)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 60, "completed": len(answers), "failed": len(failures)}
    assert {*answers, *failures} == {row["custom_id"] for row in rows}
    assert 1 <= len(answers) < 60
    assert {row["error"]["code"] for row in failures.values()} == {"batch_expired"}


def test_batches_wait_for_each_other(strict: openai.OpenAI) -> None:
    """Where one may run, the next one waits, and may be cancelled as it waits: then none of its rows was answered."""
    first = begin(strict, [row(f"{number}", model="slow", max_tokens=1) for number in range(60)])
    until(strict, first, "in_progress")
    second = begin(strict, [row("a", model="slow")])
    assert strict.batches.cancel(second.id).status in ("cancelling", "cancelled")
    second = until(strict, second)
    assert (second.status, second.output_file_id, second.in_progress_at) == ("cancelled", None, None)
    assert [row["error"]["code"] for row in lines(strict, second.error_file_id).values()] == ["batch_cancelled"]
    assert until(strict, first).status == "expired"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `jobs` keeps its files and batches."""
    return tmp_path_factory.mktemp("batches")


def configuration(folder: Path) -> dict[str, Any]:
    """Return an endpoint's with two gateways and two actors, which answer ten rows of `long_rows` a second.

    What is left of a batch then lasts longer than a busy machine stands still.
    """
    engine = {"kind": "simulated", "tokens_per_s": 25, "capacity": 4, "replicas": 2}
    return {
        "models": [{"name": "sim", "engines": [engine]}],
        "gateway": {"replicas": 2},
        "batches": {"folder": str(folder)},
    }


@pytest.fixture(scope="module")
def jobs(folder: Path) -> Iterator[ServeCommand]:
    """An endpoint whose batches take a while."""
    with serve_command(configuration(folder)) as command:
        yield command


@pytest.fixture(scope="module")
def jobs_client(jobs: ServeCommand) -> Iterator[openai.OpenAI]:
    """A client that retries, as OpenAI's does by itself: gateways are killed meanwhile."""
    with openai.OpenAI(base_url=f"{jobs.url}/v1", api_key="none", max_retries=10) as client:
        yield client


def test_cancel(jobs_client: openai.OpenAI) -> None:
    """A batch that is cancelled has what was answered in its output, and the rest in its error file."""
    rows = long_rows()
    batch = begin(jobs_client, rows)
    until(jobs_client, batch, "in_progress", num_done=20)
    with pytest.raises(openai.ConflictError, match=batch.id):  # the client would try again until the batch has ended
        jobs_client.with_options(max_retries=0).files.delete(batch.input_file_id)
    asked = jobs_client.batches.cancel(batch.id)
    assert asked.status == "cancelling"
    assert asked.cancelling_at is not None
    batch = until(jobs_client, batch)
    assert (batch.status, batch.cancelling_at) == ("cancelled", asked.cancelling_at)
    assert batch.cancelled_at is not None
    answers, failures = lines(jobs_client, batch.output_file_id), lines(jobs_client, batch.error_file_id)
    assert 20 <= len(answers) < NUM_ROWS
    assert texts(answers) == right([row for row in rows if row["custom_id"] in answers])
    assert {*answers, *failures} == {row["custom_id"] for row in rows}
    assert len(answers) + len(failures) == NUM_ROWS
    assert {row["error"]["code"] for row in failures.values()} == {"batch_cancelled"}
    assert jobs_client.batches.cancel(batch.id).status == "cancelled"


def test_completed_is_not_cancelled(client: openai.OpenAI) -> None:
    """A batch that has ended cannot be cancelled."""
    batch = until(client, begin(client, [row("a")]))
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(batch.id)


# What may be killed


def in_ledger(folder: Path, batch: Batch) -> dict[str, str]:
    """Return the rows that a batch's ledger has an answer to, by name, with the id of the request that was answered."""
    text = (folder / "jobs" / batch.id / "output.jsonl.ledger").read_text()
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {str(record["id"]): record["completion"]["request_id"] for record in records if "completion" in record}


def request_ids(answers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the id of the request that each row was answered by."""
    return {name: row["response"]["request_id"] for name, row in answers.items()}


def num_tokens(endpoint: ServeCommand) -> int:
    """Return how many tokens the engines have made since they were started, but for those that this asks for."""
    before = endpoint.state()["num_finished"]  # the batches' own pools have left, and told all of it, before these end
    body = {"messages": [{"role": "user", "content": "tell"}], "max_tokens": 1, "n": 8, "temperature": 1}
    response = endpoint.post(CHAT, body)  # each engine's figures come with its answers
    assert response.status_code == 200, response.text
    assert len({receipt["slot"] for receipt in response.json()["raylm"]}) == 2

    def told() -> list[dict[str, Any]]:
        state = endpoint.state()
        slots: list[dict[str, Any]] = state["slots"]
        is_told = state["num_finished"] >= before + 8  # and by the same gateway what the engines have made until then
        return slots if is_told and all(slot["engine"] and not slot["num_running"] for slot in slots) else []

    return sum(slot["engine"]["num_tokens"] for slot in wait_for(told))


def test_the_actor_is_killed(jobs: ServeCommand, jobs_client: openai.OpenAI, folder: Path) -> None:
    """A batch whose actor is killed goes on in the next one, and no row that was answered is asked again."""
    rows = long_rows()
    before = num_tokens(jobs)
    batch = begin(jobs_client, rows)
    until(jobs_client, batch, "in_progress", num_done=1)
    wait_for(lambda: len(in_ledger(folder, batch)) >= NUM_ROWS // 3)  # those that are counted may be on their way there
    (actor,) = jobs.processes("BatchActor")
    actor.kill()
    actor.wait()
    kept = in_ledger(folder, batch)
    assert NUM_ROWS // 3 <= len(kept) < NUM_ROWS
    shown = jobs_client.batches.retrieve(batch.id)  # asked while there is no actor, and answered by the next one
    assert shown.status == "in_progress"
    batch = until(jobs_client, batch)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": NUM_ROWS, "completed": NUM_ROWS, "failed": 0}
    answers = lines(jobs_client, batch.output_file_id)
    assert texts(answers) == right(rows)
    assert {name: request_ids(answers)[name] for name in kept} == kept
    # Rows that were being answered were lost, and those whose answer was not on disk yet.
    assert NUM_ROWS * NUM_TOKENS <= num_tokens(jobs) - before - 8 <= (NUM_ROWS + 30) * NUM_TOKENS


def test_a_gateway_is_killed(jobs: ServeCommand, jobs_client: openai.OpenAI) -> None:
    """A batch does not notice the death of gateways: no row is asked twice."""
    rows = long_rows()
    before = num_tokens(jobs)
    batch = begin(jobs_client, rows)
    until(jobs_client, batch, "in_progress", num_done=20)
    gateway, *_ = jobs.processes("ServeReplica:raylm:gateway")
    gateway.kill()
    batch = until(jobs_client, batch)
    answers = lines(jobs_client, batch.output_file_id)
    assert texts(answers) == right(rows)
    assert len({request_id.partition("-")[0] for request_id in request_ids(answers).values()}) == 1
    wait_for(lambda: len(jobs.processes("ServeReplica:raylm:gateway")) == 2)
    assert num_tokens(jobs) - before - 8 == NUM_ROWS * NUM_TOKENS


def test_an_upload_survives_the_actor(jobs: ServeCommand, jobs_client: openai.OpenAI) -> None:
    """A file whose actor is killed in the middle of it is whole."""
    content = os.urandom(5_000_000)
    (actor,) = jobs.processes("BatchActor")

    def pieces() -> Iterator[bytes]:
        head = b'--XX\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        head += b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield head + content[:3_000_000]
        actor.kill()
        yield content[3_000_000:] + b"\r\n--XX--\r\n"

    response = jobs.post("/v1/files", data=pieces(), headers={"content-type": "multipart/form-data; boundary=XX"})
    assert response.status_code == 200, response.text
    assert jobs_client.files.content(response.json()["id"]).content == content


def test_a_client_that_leaves(jobs: ServeCommand, folder: Path) -> None:
    """Nothing is left of a file whose client has gone away in the middle of it."""
    before = set((folder / "files").iterdir())
    host, _, port = jobs.url.removeprefix("http://").partition(":")
    head = "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=XX\r\n"
    head += "content-length: 9000000\r\n\r\n"
    head += '--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    with socket.create_connection((host, int(port)), timeout=60) as connected:
        connected.sendall(head.encode() + b"x" * 3_000_000)
        wait_for(lambda: set((folder / "files").iterdir()) != before)
    wait_for(lambda: set((folder / "files").iterdir()) == before)


@pytest.mark.parametrize("killed", [False, True])
def test_the_endpoint_is_started_again(tmp_path: Path, killed: bool) -> None:
    """A batch goes on when the endpoint that was ended, or killed, is started again with the same folder."""
    rows = long_rows()
    with serve_command(configuration(tmp_path)) as first, client_of(first) as client:
        done = until(client, begin(client, [row("a")]))
        batch = begin(client, rows)
        until(client, batch, "in_progress", num_done=NUM_ROWS // 3)
        wait_for(lambda: len(in_ledger(tmp_path, batch)) >= NUM_ROWS // 3)  # the counted ones have got to the disk
        children = psutil.Process(first.process.pid).children(recursive=True)
        if killed:
            first.expect_end()
            for process in [psutil.Process(first.process.pid), *children]:
                process.kill()
            psutil.wait_procs(children)
        else:
            first.stop()
    kept = in_ledger(tmp_path, batch)
    assert NUM_ROWS // 3 <= len(kept) < NUM_ROWS
    with serve_command(configuration(tmp_path)) as second, client_of(second) as client:
        assert client.batches.retrieve(done.id) == done
        batch = until(client, batch)
        assert batch.status == "completed"
        answers = lines(client, batch.output_file_id)
        assert texts(answers) == right(rows)
        assert {name: request_ids(answers)[name] for name in kept} == kept
        assert num_tokens(second) - 8 == (NUM_ROWS - len(kept)) * NUM_TOKENS


def test_metrics(simulated_endpoint: ServeCommand, client: openai.OpenAI) -> None:
    """Prometheus is told how many batches there are."""
    until(client, begin(client, [row("a")]))
    wait_for(lambda: 'raylm_batches{status="completed"}' in simulated_endpoint.get("/metrics").text)
