"""What is behind the routes of files and batches, piece by piece."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.batch import Tally
from raylm.config import BatchesConfig
from raylm.errors import BatchStateError, BatchStoreError, InvalidRequestError, ObjectNotFoundError, OutputBusyError
from raylm.serve.batches import checks
from raylm.serve.batches.actor import BatchActor
from raylm.serve.batches.checks import check_file
from raylm.serve.batches.store import Store, Work
from raylm.serve.batches.upload import Upload
from raylm.serve.schema import Batch, Endpoint, FileObject

CHAT: Endpoint = "/v1/chat/completions"


def line(name: str, **changes: Any) -> str:
    """Return a line of a batch's file."""
    body = {"model": "sim", "messages": [{"role": "user", "content": name}], "max_tokens": 5, "temperature": 0}
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body, **changes})


# The form


def form(*parts: tuple[str, bytes, str | None]) -> bytes:
    """Return the body of a form."""
    body = b""
    for name, value, filename in parts:
        named = "" if filename is None else f'; filename="{filename}"'
        body += f'--XX\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + value + b"\r\n"
    return body + b"--XX--\r\n"


async def taken(body: bytes, *cuts: int) -> tuple[Upload, bytes]:
    """Return a form that has come in pieces, and its file."""

    async def pieces() -> AsyncIterator[bytes]:
        places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
        for start, end in pairwise(places):
            yield body[start:end]

    upload = Upload("multipart/form-data; boundary=XX")
    return upload, b"".join([chunk async for chunk in upload.chunks(pieces())])


@given(
    content=st.binary(min_size=1, max_size=200) | st.just(b"\r\n--XX\r\n-" * 3 + b"\r\n--X"),
    cuts=st.lists(st.integers(0, 1000), max_size=20),
    file_first=st.booleans(),
)
async def test_form_in_any_pieces(content: bytes, cuts: list[int], file_first: bool) -> None:
    """However a form is cut on its way, and whatever comes first in it, its file and its fields are the same."""
    if b"\r\n--XX" in content:
        content = content.replace(b"\r\n--XX", b"\r\n--YY")
    parts: list[tuple[str, bytes, str | None]] = [("purpose", b"batch", None), ("file", content, "a.jsonl")]
    upload, file = await taken(form(*(reversed(parts) if file_first else parts)), *cuts)
    assert (file, upload.fields, upload.filename) == (content, {"purpose": "batch"}, "a.jsonl")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (form(("purpose", b"batch", None)), "file: it is missing"),
        (form(("file", b"", "a")), "file: it is empty"),
        (form(("file", b"x", None)), "file: send a file"),
        (form(("file", b"x", "a"), ("file", b"y", "b")), "file: send one"),
        (form(("purpose", b"x" * 2000, None), ("file", b"x", "a")), "purpose is too long"),
        (form(("purpose", b"x", None), ("purpose", b"x", None), ("file", b"x", "a")), "purpose more than once"),
        (form(("file", b"x" * 100, "a"))[:100], "it has no end"),
        (b"what is this?", "no valid form"),
        (b"", "it has no end"),
    ],
)
async def test_wrong_form(body: bytes, said: str) -> None:
    """A form that is wrong is refused, and the text says why."""
    with pytest.raises(InvalidRequestError, match=said):
        await taken(body)


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary="])
def test_no_form(kind: str) -> None:
    """What says that it is no form, or lacks a boundary, is refused."""
    with pytest.raises(InvalidRequestError, match="multipart/form-data"):
        Upload(kind)


# What is wrong with a file


def checked(path: Path, *lines: str, models: tuple[str, ...] = ("sim", "other")) -> checks.Checked:
    """Return what is said of a file."""
    path.write_text("\n".join(lines))
    return check_file(path, CHAT, models)


def test_right_file(tmp_path: Path) -> None:
    """Rows are counted, empty lines are not, and the model is what they name."""
    found = checked(tmp_path / "in", line("a"), "", line("b"))
    assert found == checks.Checked(2, "sim", [])


def test_model_left_out(tmp_path: Path) -> None:
    """Where one model is served, rows need not name it; where two are, they must."""
    body = {"messages": [{"role": "user", "content": "a"}]}
    assert checked(tmp_path / "in", line("a", body=body), models=("sim",)).model == "sim"
    errors = checked(tmp_path / "in", line("a", body=body)).errors
    assert [(error.code, error.param, error.line) for error in errors] == [
        ("missing_required_parameter", "body.model", 1)
    ]


@pytest.mark.parametrize(
    ("wrong", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ("[]", "invalid_json_line", None),
        ('{"a": "\\ud800"}', "invalid_json_line", None),
        ('{"custom_id": "x"}', "missing_required_parameter", "method"),
        (line("x", custom_id=7), "invalid_custom_id", "custom_id"),
        (line("x", custom_id=""), "invalid_custom_id", "custom_id"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line("x", method="GET"), "invalid_method", "method"),
        (line("x", url="/v1/completions"), "mismatched_endpoint", "url"),
        (line("x", body=[]), "invalid_body", "body"),
        (line("x", body={"model": "unknown"}), "model_not_found", "body.model"),
        (line("x", body={"model": ["sim"]}), "model_not_found", "body.model"),
        (line("x", body={"model": "other"}), "mismatched_model", "body.model"),
    ],
)
def test_wrong_line(tmp_path: Path, wrong: str, code: str, param: str | None) -> None:
    """A line that is wrong is told with its number."""
    errors = checked(tmp_path / "in", line("first"), "", wrong, line("last")).errors
    assert [(error.code, error.param, error.line) for error in errors] == [(code, param, 3)]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    """A file without rows is refused."""
    assert [error.code for error in checked(tmp_path / "in", text).errors] == ["empty_file"]


def test_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is too long is told, and not read in one piece; those after it have their own numbers."""
    monkeypatch.setattr(checks, "MAX_LINE_BYTES", 200)
    errors = checked(tmp_path / "in", line("a"), line("b" * 100), "{").errors
    assert [(error.code, error.line) for error in errors] == [("line_too_long", 2), ("invalid_json_line", 3)]


def test_many_errors(tmp_path: Path) -> None:
    """A file with nothing right in it is read up to the hundredth error."""
    assert len(checked(tmp_path / "in", *["{"] * 1000).errors) == 100


# The folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty folder."""
    store = Store(tmp_path / "store")
    yield store
    store.close()


def add_file(store: Store, name: str, content: bytes = b"abc", expires_at: int | None = None) -> FileObject:
    """Add a file."""
    store.write(name, 0, content)
    return store.add_file(
        FileObject(
            id=name, bytes=len(content), created_at=0, expires_at=expires_at, filename="in.jsonl", purpose="batch"
        )
    )


def add_batch(store: Store, name: str, file: str, **state: Any) -> Work:
    """Add a batch."""
    batch = Batch(**{"id": name, "endpoint": CHAT, "input_file_id": file, "created_at": 0, "expires_at": 9} | state)
    return store.add_batch(Work(batch=batch, models=["sim"], output_id=f"{name}-out", errors_id=f"{name}-err"))


def ended(store: Store, work: Work) -> Work:
    """Write what a job writes, and end its batch."""
    folder = store.job_folder(work.batch.id)
    folder.mkdir()
    (folder / "out").write_text("answers\n")
    (folder / "err").write_text("")
    done = Work(
        batch=Batch(**{name: getattr(work.batch, name) for name in Batch.__struct_fields__} | {"status": "completed"}),
        models=work.models,
        output_id=work.output_id,
        errors_id=work.errors_id,
        outcome="completed",
    )
    return store.collect(done, {work.output_id: folder / "out", work.errors_id: folder / "err"})


def test_one_owner(store: Store, tmp_path: Path) -> None:
    """A folder that is in use is nobody else's, until it is let go of."""
    with pytest.raises(OutputBusyError, match=r"batches\.folder"):
        Store(tmp_path / "store")


def test_a_folder_that_could_not_be_opened(tmp_path: Path) -> None:
    """Who has met a broken database holds the folder no longer."""
    database = tmp_path / "batches.db"
    database.write_text("no database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Store(tmp_path)
    database.unlink()
    Store(tmp_path).close()


def test_it_is_there_again(tmp_path: Path) -> None:
    """What was added is there when the folder is opened again; calls that come twice change nothing."""
    store = Store(tmp_path)
    file = add_file(store, "file-a")
    assert add_file(store, "file-a", b"abc") == file
    work = add_batch(store, "batch-a", "file-a")
    assert add_batch(store, "batch-a", "file-a") == work
    store.close()
    store = Store(tmp_path)
    assert store.file("file-a") == file
    assert store.unfinished() == [work]
    assert (store.read("file-a", 1, 2), store.count_batches()) == (b"bc", {"validating": 1})
    store.close()


def test_collected_twice(store: Store) -> None:
    """An end that was begun before a crash, and is begun again after it, has the same files; none for what is empty."""
    add_file(store, "file-a")
    work = add_batch(store, "batch-a", "file-a")
    once = ended(store, work)
    again = store.collect(once, {work.output_id: Path("/gone"), work.errors_id: Path("/gone")})
    assert once.batch == again.batch == store.batch("batch-a")
    assert (once.batch.output_file_id, once.batch.error_file_id) == ("batch-a-out", None)
    assert store.read("batch-a-out", 0, 100) == b"answers\n"
    assert store.file("batch-a-out").filename == "batch-a_output.jsonl"
    assert not store.job_folder("batch-a").exists()
    assert store.unfinished() == []


def test_file_of_an_unfinished_batch(store: Store) -> None:
    """A file cannot be deleted, by anybody or by its age, while a batch reads it."""
    now = int(time.time())
    add_file(store, "file-a", expires_at=now + 3600)
    work = add_batch(store, "batch-a", "file-a")
    with pytest.raises(BatchStateError, match="batch-a"):
        store.delete_file("file-a")
    ended(store, work)
    store.delete_file("file-a")
    with pytest.raises(ObjectNotFoundError):
        store.file("file-a")
    assert not store.path("file-a").exists()


def test_cleaning(store: Store) -> None:
    """Expired files go, and so does what is left of an upload that nobody goes on with; nothing else does."""
    add_file(store, "kept")
    add_file(store, "expired", expires_at=int(time.time()) - 1)
    store.write("on-its-way", 0, b"x")
    store.write("given-up", 0, b"x")
    long_ago = time.time() - 2 * 24 * 3600
    for name in ("given-up", "kept"):
        os.utime(store.path(name), (long_ago, long_ago))
    with pytest.raises(ObjectNotFoundError):
        store.file("expired")
    store.clean()
    assert sorted(path.name for path in store.path("kept").parent.iterdir()) == ["kept", "on-its-way"]


def test_pages(store: Store) -> None:
    """Pages follow each other without a gap, in either order."""
    for number in range(5):
        add_file(store, f"file-{number}")
    pages, after = [], None
    while True:
        page = store.files(None, after, 2, descending=True)
        pages.append([file.id for file in page.data])
        assert (page.first_id, page.last_id) == (pages[-1][0], pages[-1][-1])
        if not page.has_more:
            break
        after = page.last_id
    assert pages == [["file-4", "file-3"], ["file-2", "file-1"], ["file-0"]]
    assert [file.id for file in store.files("batch", "file-1", 9, descending=False).data] == [
        "file-2",
        "file-3",
        "file-4",
    ]
    assert store.files("batch_output", None, 9, descending=True).data == []
    with pytest.raises(ObjectNotFoundError):
        store.files(None, "unknown", 9, descending=True)


def test_a_job_whose_batch_has_ended(tmp_path: Path) -> None:
    """What is left of a job, because its process died as it was deleting it, is deleted when the folder is opened."""
    store = Store(tmp_path)
    add_file(store, "file-a")
    ended(store, add_batch(store, "batch-a", "file-a"))
    add_batch(store, "batch-b", "file-a")
    for name in ("batch-a", "batch-b"):
        store.job_folder(name).mkdir()
        (store.job_folder(name) / "output.jsonl.ledger").write_text("answers")
    store.close()
    store = Store(tmp_path)
    assert not store.job_folder("batch-a").exists()
    assert (store.job_folder("batch-b") / "output.jsonl.ledger").read_text() == "answers"
    store.close()


# The actor, as it is without Ray


@asynccontextmanager
async def at_work(folder: Path) -> AsyncIterator[BatchActor]:
    """Have an actor own a folder, whose unfinished batches it goes on with."""
    actor = BatchActor(BatchesConfig(folder=str(folder)).model_dump_json())
    await actor.start()
    try:
        yield actor
    finally:
        await actor.close()


async def outcome(actor: BatchActor, batch_id: str) -> dict[str, Any]:
    """Return a batch once it has ended. The test's timeout is the limit."""
    while True:
        batch: dict[str, Any] = json.loads(await actor.retrieve(batch_id))
        if batch["status"] in ("failed", "completed", "expired", "cancelled"):
            return batch
        await asyncio.sleep(0.01)


async def test_cancelled_before_it_was_checked(tmp_path: Path) -> None:
    """A file that is wrong is no reason why its batch could not be cancelled: each line is in the error file."""
    store = Store(tmp_path)
    add_file(store, "file-a", "\n".join(["{", line("a"), '{"prompt": "b"}']).encode())
    add_batch(store, "batch-a", "file-a", status="cancelling")
    store.close()
    async with at_work(tmp_path) as actor:
        batch = await outcome(actor, "batch-a")
        failures = (await actor.read("batch-a-err", 0, 10_000)).splitlines()
    assert (batch["status"], batch["request_counts"]) == ("cancelled", {"total": 3, "completed": 0, "failed": 3})
    assert [json.loads(failure)["custom_id"] for failure in failures] == ["1", "a", "3"]


async def test_a_disk_that_fails_as_the_folder_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call opens the folder, and does not wait for the one before, which has let go of it."""
    monkeypatch.setattr("raylm.serve.batches.actor._OPEN_TIMEOUT_S", 0.0)
    calls = iter([None, OSError(5, "Input/output error")])
    unfinished = Store.unfinished

    def failing(store: Store) -> list[Work]:
        if (error := next(calls, None)) is not None:
            raise error
        return unfinished(store)

    monkeypatch.setattr(Store, "unfinished", failing)
    actor = BatchActor(BatchesConfig(folder=str(tmp_path)).model_dump_json())
    with pytest.raises(BatchStoreError, match="Input/output error"):
        await actor.start()
    await actor.start()
    await actor.close()


async def test_counts_that_are_saved_while_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose counts are to be saved just as its end is being saved has ended, on disk as well."""
    store = Store(tmp_path)
    add_file(store, "file-a", line("a").encode())
    add_batch(store, "batch-a", "file-a", status="cancelling")
    store.close()
    collecting, go_on = threading.Event(), threading.Event()
    collect = Store.collect

    def slowly(*arguments: Any) -> Work:
        collecting.set()
        go_on.wait()
        return collect(*arguments)

    monkeypatch.setattr(Store, "collect", slowly)
    async with at_work(tmp_path) as actor:
        await asyncio.to_thread(collecting.wait)
        running = actor._running["batch-a"]
        running.tally = Tally(num_answered=1)
        saving = asyncio.create_task(actor._save_counts(running))
        await asyncio.sleep(0)  # it is under way
        go_on.set()
        await saving
        assert (await outcome(actor, "batch-a"))["status"] == "cancelled"
    store = Store(tmp_path)
    assert store.unfinished() == []
    store.close()


async def test_an_error_that_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that raylm itself fails on ends as failed, also where the disk is full when that is to be written."""
    store = Store(tmp_path)
    add_file(store, "file-a", line("a").encode())
    add_batch(store, "batch-a", "file-a", expires_at=int(time.time()) + 3600)
    store.close()
    saves = iter([OSError(28, "No space left on device")])
    save = Store.save_batch

    def save_or_fail(*arguments: Any) -> None:
        if (error := next(saves, None)) is not None:
            raise error
        save(*arguments)

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(Store, "save_batch", save_or_fail)
    monkeypatch.setattr("raylm.serve.batches.actor.check_file", broken)
    monkeypatch.setattr("raylm.serve.batches.actor._RETRY_S", 0.01)
    async with at_work(tmp_path) as actor:
        batch = await outcome(actor, "batch-a")
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "internal_error")


async def test_a_broken_end_is_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that raylm itself fails on as it is being cancelled has failed, and is not tried again for ever."""
    store = Store(tmp_path)
    add_file(store, "file-a", line("a").encode())
    add_batch(store, "batch-a", "file-a", status="cancelling")
    store.close()

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr("raylm.serve.batches.actor._write_rest", broken)
    monkeypatch.setattr("raylm.serve.batches.actor._RETRY_S", 0.01)
    async with at_work(tmp_path) as actor:
        assert (await outcome(actor, "batch-a"))["status"] == "failed"
