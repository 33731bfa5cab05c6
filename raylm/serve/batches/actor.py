"""BatchActor: the one owner of an endpoint's files and batches, and the one who runs their jobs.

    write, add_file, file, files, read, delete_file    what is behind /v1/files
    create, retrieve, batches, cancel                  what is behind /v1/batches
    touch()                                            a gateway is there; tells how many batches there are

A batch goes through

    validating -> in_progress -> finalizing -> completed
        |              |   `--------> finalizing -> expired
        |              `------------> cancelling -> cancelled
        `-> failed

and each step is on disk before the next begins. A process that dies is started again by Ray, on the same node, and goes
on with every batch from the step that it was in. Any call may be made twice, for Ray makes those again that were lost.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import ray
import ray.exceptions

from raylm.actors.manager import NAMESPACE
from raylm.batch import Ledger, Reading, Record, Row, Tally, errors_path, ledger_path, run_batch_async
from raylm.batch.outputs import open_output
from raylm.batch.rows import BadRow, read_file
from raylm.chatbot import AsyncServedModel
from raylm.config import BatchesConfig
from raylm.errors import (
    BatchExpiredError,
    BatchStateError,
    BatchStoreError,
    OutputBusyError,
    RaylmError,
    RequestCancelledError,
    RequestTooLargeError,
    first_line,
    to_message,
)
from raylm.serve.batches.checks import check_file
from raylm.serve.batches.store import Outcome, Store, Work
from raylm.serve.schema import Batch, BatchError, BatchErrors, FileDeleted, FileObject, RequestCounts
from raylm.tasks import Tasks

LEASE_S = 120.0
"""An actor that no gateway has called for this long ends. The next one goes on with its batches."""

_TEND_S = 1.0
"""How often the counts of running batches are saved."""

_CLEAN_S = 60.0
"""How often expired files are deleted."""

_RETRY_S = 5.0
"""Pause before a batch whose model or disk has failed goes on."""

_OPEN_TIMEOUT_S = 20.0
"""How long the folder may still be held by the process before this one."""

_END_TIMEOUT_S = 30.0

_ROWS_A_WRITE = 512

_OUTPUT = "output.jsonl"

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_decode_work = msgspec.msgpack.Decoder(Work).decode
_decode_file = msgspec.msgpack.Decoder(FileObject).decode
T = TypeVar("T")


class _Running:
    """A batch that has not ended.

    Attributes:
        work: Its state, as it is on disk.
        tally: How far its job is; None while none is at work.
        lock: Held while `work` changes.
        cancelled: Somebody has asked for its end.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.tally: Tally | None = None
        self.lock = asyncio.Lock()
        self.cancelled = asyncio.Event()
        if work.batch.status == "cancelling":
            self.cancelled.set()

    @property
    def counts(self) -> RequestCounts:
        """How far it is. A job that goes on does not seem to have lost what it has yet to find in its ledger."""
        saved = self.work.batch.request_counts
        if self.tally is None:
            return saved
        completed = self.tally.num_kept + self.tally.num_answered
        return RequestCounts(saved.total, max(saved.completed, completed), max(saved.failed, self.tally.num_failed))

    @property
    def shown(self) -> Batch:
        """What clients see."""
        return msgspec.structs.replace(self.work.batch, request_counts=self.counts)


class BatchActor:
    """Owns a folder, and runs the batches in it.

    Args:
        config: A `BatchesConfig` as JSON.
    """

    def __init__(self, config: str) -> None:
        self._json = config
        self._config = BatchesConfig.model_validate_json(config)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")  # the store's
        self._slots = asyncio.Semaphore(self._config.max_running)
        self._running: dict[str, _Running] = {}
        self._tasks = Tasks("the batches")
        self._touched_at = time.monotonic()
        self._opening = asyncio.get_running_loop().create_task(self._open())

    async def start(self) -> str:
        """Wait until the folder is open; return the settings, as JSON.

        Raises:
            BatchStoreError: it cannot be opened. The next call tries again.
        """
        await self._opened()
        return self._json

    async def touch(self) -> dict[str, int]:
        """Take note that there is a gateway; return how many batches there are of each status."""
        self._touched_at = time.monotonic()
        store = await self._opened()
        return await self._do(store.count_batches)

    async def close(self) -> None:
        """Stop all jobs and let go of the folder. Batches that have not ended go on with the next actor."""
        await self._tasks.aclose()
        if not self._opening.done():
            self._opening.cancel()
        elif not self._opening.cancelled() and self._opening.exception() is None:
            await self._do(self._opening.result().close)

    # Files

    async def write(self, file_id: str, offset: int, data: bytes) -> None:
        """Take a part of a file.

        Raises:
            RequestTooLargeError: the file is too long.
            BatchStoreError: it cannot be written.
        """
        if offset + len(data) > self._config.max_file_bytes:
            raise RequestTooLargeError(f"file: at most {self._config.max_file_bytes} bytes are taken")
        store = await self._opened()
        await self._in_thread(partial(store.write, file_id, offset, data))

    async def add_file(self, file: bytes) -> bytes:
        """Add a file that has been written, given as a `FileObject`; return that."""
        store = await self._opened()
        return _encode(await self._do(store.add_file, _decode_file(file)))

    async def drop(self, file_id: str) -> None:
        """Forget what was written of a file that is not to be."""
        store = await self._opened()
        await self._do(store.drop, file_id)

    async def file(self, file_id: str) -> bytes:
        """Return a `FileObject`."""
        store = await self._opened()
        return _encode(await self._do(store.file, file_id))

    async def files(self, purpose: str | None, after: str | None, limit: int, descending: bool) -> bytes:
        """Return a `FileList`."""
        store = await self._opened()
        return _encode(await self._do(partial(store.files, purpose, after, limit, descending=descending)))

    async def read(self, file_id: str, offset: int, size: int) -> bytes:
        """Return a part of a file that is there."""
        store = await self._opened()
        return await self._in_thread(partial(store.read, file_id, offset, size))

    async def delete_file(self, file_id: str) -> bytes:
        """Delete a file; return a `FileDeleted`."""
        store = await self._opened()
        await self._do(store.delete_file, file_id)
        return _encode(FileDeleted(file_id))

    # Batches

    async def create(self, work: bytes) -> bytes:
        """Begin a batch, given as a `Work`; return the `Batch`."""
        store = await self._opened()
        begun = await self._do(store.add_batch, _decode_work(work))
        batch_id = begun.batch.id
        if not begun.ended and batch_id not in self._running:
            self._begin(begun)
        return _encode(self._running[batch_id].shown if batch_id in self._running else begun.batch)

    async def retrieve(self, batch_id: str) -> bytes:
        """Return a `Batch`."""
        store = await self._opened()
        if (running := self._running.get(batch_id)) is not None:
            return _encode(running.shown)
        return _encode(await self._do(store.batch, batch_id))

    async def batches(self, after: str | None, limit: int) -> bytes:
        """Return a `BatchList`."""
        store = await self._opened()
        found = await self._do(store.batches, after, limit)
        found.data = [self._running[batch.id].shown if batch.id in self._running else batch for batch in found.data]
        return _encode(found)

    async def cancel(self, batch_id: str) -> bytes:
        """Ask for the end of a batch; return the `Batch`.

        Raises:
            ObjectNotFoundError: there is none of that id.
            BatchStateError: it has come to its end already.
        """
        store = await self._opened()
        running = self._running.get(batch_id)
        batch = running.work.batch if running is not None else await self._do(store.batch, batch_id)
        if running is not None:
            async with running.lock:
                if running.work.batch.status in ("validating", "in_progress"):
                    await self._change(running, status="cancelling", cancelling_at=int(time.time()))
                    running.cancelled.set()
            batch = running.shown
        if batch.status not in ("cancelling", "cancelled"):
            raise BatchStateError(f"{batch_id} is {batch.status}, which nothing can cancel")
        return _encode(batch)

    # The life of a batch

    def _begin(self, work: Work) -> None:
        running = self._running[work.batch.id] = _Running(work)
        self._tasks.start(self._run(running))

    async def _run(self, running: _Running) -> None:
        """Take a batch to its end, and try again where something else is the matter than the batch itself."""
        batch_id = running.work.batch.id
        while not running.work.ended:
            try:
                await self._advance(running)
            except (RaylmError, ray.exceptions.RayError, OSError, sqlite3.Error) as error:
                reason = first_line(error)
                _log.warning("%s waits for %.0f s: %s: %s", batch_id, _RETRY_S, type(error).__name__, reason)
                await asyncio.sleep(_RETRY_S)
            except Exception:  # noqa: BLE001 - whatever it is, the other batches go on
                _log.exception("%s met an error of raylm itself", batch_id)
                await self._fail(running)
                await asyncio.sleep(_RETRY_S)
            finally:
                running.tally = None
        del self._running[batch_id]

    async def _advance(self, running: _Running) -> None:
        """Take a batch to its end, from the step that it is in."""
        if running.work.outcome is None and running.work.batch.status in ("validating", "in_progress"):
            answering = asyncio.create_task(self._answer(running))
            cancelled = asyncio.create_task(running.cancelled.wait())
            left_s = max(0.0, running.work.batch.expires_at - time.time())
            try:
                await asyncio.wait({answering, cancelled}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                answering.cancel()
                cancelled.cancel()
                await asyncio.gather(answering, cancelled, return_exceptions=True)
            if not answering.cancelled():
                answering.result()
        if running.work.ended:
            return
        if running.work.outcome is None:
            await self._give_up(running)
        if running.work.outcome is not None:
            await self._collect(running, running.work.outcome)

    async def _answer(self, running: _Running) -> None:
        """Check a batch's file, and have its rows answered."""
        store = await self._opened()
        batch = running.work.batch
        source = store.path(batch.input_file_id)
        if batch.status == "validating":
            checked = await self._in_thread(partial(check_file, source, batch.endpoint, running.work.models))
            if checked.errors:
                await self._refuse(running, checked.errors)
                return
            async with running.lock:
                await self._change(running, model=checked.model, request_counts=RequestCounts(checked.num_rows))
        async with self._slots:
            async with running.lock:
                if running.work.batch.status == "validating":
                    await self._change(running, status="in_progress", in_progress_at=int(time.time()))
            tally = await self._ask(running, source, store.job_folder(batch.id))
        counts = RequestCounts(tally.num_rows, tally.num_kept + tally.num_answered, tally.num_failed)
        async with running.lock:
            if running.work.batch.status == "in_progress":  # and not cancelled meanwhile
                await self._finalize(running, "completed", counts)

    async def _ask(self, running: _Running, source: Path, folder: Path) -> Tally:
        batch = running.work.batch

        def begun(tally: Tally) -> None:
            running.tally = tally

        await self._in_thread(partial(folder.mkdir, exist_ok=True, mode=0o700))
        async with AsyncServedModel(batch.model or "") as chatbot:
            return await run_batch_async(
                chatbot,
                source,
                folder / _OUTPUT,
                settings={"batch": batch.id},
                total=batch.request_counts.total,
                begun=begun,
            )

    async def _fail(self, running: _Running) -> None:
        """End a batch that has met an error of raylm itself. Where that cannot be saved, the batch goes on."""
        try:
            await self._refuse(running, [BatchError("internal_error", "the batch met an error of raylm itself")])
        except BatchStoreError as error:
            _log.warning("%s cannot be ended: %s", running.work.batch.id, error)

    async def _refuse(self, running: _Running, errors: Sequence[BatchError]) -> None:
        """End a batch as failed, unless it is being cancelled, which needs nothing of what is wrong with it."""
        async with running.lock:
            # With an outcome it is that end itself which fails, and would for ever.
            if running.work.batch.status != "cancelling" or running.work.outcome is not None:
                await self._change(
                    running, status="failed", failed_at=int(time.time()), errors=BatchErrors(list(errors))
                )

    async def _give_up(self, running: _Running) -> None:
        """Write down that a batch was cancelled, or has expired, and what is told of the rows that lack an answer."""
        async with running.lock:
            if running.work.batch.status == "cancelling":
                running.work = msgspec.structs.replace(running.work, outcome="cancelled")
            elif time.time() >= running.work.batch.expires_at:
                await self._finalize(running, "expired", running.counts)

    async def _finalize(self, running: _Running, outcome: Outcome, counts: RequestCounts) -> None:
        """Settle how a batch ends. `running.lock` is held."""
        work = msgspec.structs.replace(running.work, outcome=outcome)
        running.work = await self._saved(
            work, status="finalizing", finalizing_at=int(time.time()), request_counts=counts
        )

    async def _collect(self, running: _Running, outcome: Outcome) -> None:
        """Make files of what a batch's job has written, and end the batch."""
        store = await self._opened()
        batch = running.work.batch
        output = store.job_folder(batch.id) / _OUTPUT
        counts = batch.request_counts
        if outcome != "completed":
            error: RaylmError = (
                RequestCancelledError("the batch was cancelled before this row was answered")
                if outcome == "cancelled"
                else BatchExpiredError("the batch expired before this row was answered")
            )
            counts = await self._in_thread(partial(_write_rest, store.path(batch.input_file_id), output, error))
        async with running.lock:  # nobody saves an earlier state behind this one
            work = running.work
            ended = msgspec.structs.replace(
                work.batch, status=outcome, request_counts=counts, **{f"{outcome}_at": int(time.time())}
            )
            outputs = {work.output_id: output, work.errors_id: errors_path(output)}
            running.work = await self._do(store.collect, msgspec.structs.replace(work, batch=ended), outputs)

    async def _change(self, running: _Running, **fields: Any) -> None:
        """Change what clients see of a batch, on disk first. `running.lock` is held."""
        running.work = await self._saved(running.work, **fields)

    async def _saved(self, work: Work, **fields: Any) -> Work:
        store = await self._opened()
        changed = msgspec.structs.replace(work, batch=msgspec.structs.replace(work.batch, **fields))
        await self._do(store.save_batch, changed)
        return changed

    # Inside

    async def _open(self) -> Store:
        deadline = time.monotonic() + _OPEN_TIMEOUT_S
        while True:
            try:
                store = await self._do(Store, Path(self._config.folder))
                break
            except OutputBusyError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.2)
        try:
            unfinished = await self._do(store.unfinished)
        except BaseException:
            await self._do(store.close)
            raise
        for work in unfinished:
            self._begin(work)
        self._tasks.start(self._tend(store))
        return store

    async def _opened(self) -> Store:
        if self._opening.done() and (self._opening.cancelled() or self._opening.exception() is not None):
            self._opening = asyncio.create_task(self._open())
        try:
            return await asyncio.shield(self._opening)
        except OutputBusyError as error:
            raise BatchStoreError(error.message) from None

    async def _tend(self, store: Store) -> None:
        """Save how far batches are, delete what has expired, and end when nobody is there."""
        cleaned_at = 0.0
        while time.monotonic() - self._touched_at < LEASE_S:
            await asyncio.sleep(_TEND_S)
            try:
                for running in tuple(self._running.values()):
                    await self._save_counts(running)
                if time.monotonic() - cleaned_at > _CLEAN_S:
                    cleaned_at = time.monotonic()
                    await self._do(store.clean)
            except (OSError, sqlite3.Error, BatchStoreError) as error:
                _log.warning("the folder of files and batches cannot be written: %s", error)
        _log.warning("no gateway has called for %.0f s: batches stop until one does", LEASE_S)
        ray.actor.exit_actor()

    async def _save_counts(self, running: _Running) -> None:
        async with running.lock:
            if running.work.batch.request_counts != running.counts and not running.work.ended:
                await self._change(running, request_counts=running.counts)

    async def _do(self, call: Callable[..., T], *arguments: Any) -> T:
        """Have the store's own thread do something.

        Raises:
            BatchStoreError: the disk is full, or fails.
        """
        work = asyncio.get_running_loop().run_in_executor(self._thread, partial(call, *arguments))
        return await _stored(work)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """Have any thread read or write a file.

        Raises:
            BatchStoreError: the disk is full, or fails.
        """
        return await _stored(asyncio.get_running_loop().run_in_executor(None, call))


async def _stored(work: asyncio.Future[T]) -> T:
    try:
        return await work
    except (OSError, sqlite3.Error) as error:
        raise BatchStoreError(f"files and batches cannot be kept: {error}") from error


def _write_rest(source: Path, output: Path, error: RaylmError) -> RequestCounts:
    """Write what a job that was stopped has answered, and the error of every other row. Blocks."""
    counts = RequestCounts()
    output.parent.mkdir(exist_ok=True, mode=0o700)
    ledger = Ledger.open(ledger_path(output))
    try:
        with open_output(output, openai=True) as writer:
            records: list[Record] = []
            for position, row in enumerate(read_file(source, Reading())):
                lacks = ledger.find(position) is None
                record = _lacking(position, row, error) if lacks else ledger.read(position)
                counts.total += 1
                counts.completed += record.completion is not None
                counts.failed += record.completion is None
                records.append(record)
                if len(records) == _ROWS_A_WRITE:
                    writer.write(records)
                    records = []
            writer.write(records)
    finally:
        ledger.close()
    return counts


def _lacking(position: int, row: Row | BadRow, error: RaylmError) -> Record:
    wrong = row.error if isinstance(row, BadRow) else error
    return Record(
        position=position, key="", id=row.id, at=time.time(), tries=0, error=to_message(wrong), openai=row.openai
    )


def create(config: BatchesConfig) -> Any:
    """Return the handle of the actor that owns a folder, which is made where there is none.

    It runs on the head node: there it finds the folder again, whichever gateway asks for it first.
    """
    return (
        ray.remote(BatchActor)
        .options(
            name=_name(config),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=10_000,
        )
        .remote(config.model_dump_json())
    )


async def end(config: BatchesConfig) -> None:
    """End the actor that owns a folder. Does nothing when there is none. What is in the folder stays."""
    try:
        actor = await asyncio.to_thread(ray.get_actor, _name(config), namespace=NAMESPACE)
    except ValueError:
        return
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            await actor.close.remote()
    except (TimeoutError, ray.exceptions.RayError) as error:
        _log.warning("the batches did not end in order: %s", str(error).partition("\n")[0] or "no answer")
    ray.kill(actor, no_restart=True)


def _name(config: BatchesConfig) -> str:
    return f"batches:{config.folder}"
