"""Store: a folder with files, the jobs at work, and an SQLite database that says what there is.

    batches.db      files and batches
    files/ID        what is in a file; one that the database does not know is on its way here, or was given up
    jobs/ID/        ledger and output of a batch that has not ended
    lock            held by the one process that uses the folder

Everything here blocks, and belongs to one thread at a time. Reading and writing what is in a file may be done from
others.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from raylm.batch.outputs import sync_folder
from raylm.errors import BatchStateError, ObjectNotFoundError, OutputBusyError
from raylm.serve.schema import Batch, BatchList, FileList, FileObject

Outcome = Literal["completed", "cancelled", "expired"]

_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS file (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, purpose TEXT, expires_at INT, body BLOB
);
CREATE TABLE IF NOT EXISTS batch (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, status TEXT, body BLOB);
CREATE INDEX IF NOT EXISTS batch_status ON batch (status);
"""

_ABANDONED_S = 24 * 3600
"""What is in no database and has not been written to for so long comes from an upload that was given up."""

Item = TypeVar("Item", FileObject, Batch)


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A batch, and what nobody but its job needs to know.

    Attributes:
        batch: What clients see.
        models: The models that the endpoint serves.
        output_id: Id that its output will have.
        errors_id: Id that its error file will have.
        output_expires_s: Time until these two are deleted; None: never.
        outcome: How it has ended, once that is certain. Its output may still have to be put in place.
    """

    batch: Batch
    models: list[str]
    output_id: str
    errors_id: str
    output_expires_s: int | None = None
    outcome: Outcome | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.batch.status in ("failed", "completed", "expired", "cancelled")


_encode = msgspec.json.Encoder().encode
_decode_file = msgspec.json.Decoder(FileObject).decode
_decode_work = msgspec.json.Decoder(Work).decode


class Store:
    """The folder, open for this process alone.

    Args:
        folder: Where it is. It is made where there is none.

    Raises:
        OutputBusyError: another process has it open.
        OSError: it cannot be made, read or written.
        sqlite3.Error: the same of its database.
    """

    def __init__(self, folder: Path) -> None:
        folder = folder.expanduser()
        self._files = folder / "files"
        self._jobs = folder / "jobs"
        folder.parent.mkdir(parents=True, exist_ok=True)
        for part in (folder, self._files, self._jobs):
            part.mkdir(exist_ok=True, mode=0o700)
        with ExitStack() as opened:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            opened.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputBusyError(
                    f"{folder} is used by another endpoint; end that, or give this one another folder (batches.folder)"
                ) from None
            self._database = opened.enter_context(
                closing(sqlite3.connect(folder / "batches.db", check_same_thread=False, isolation_level=None))
            )
            self._database.executescript(_SCHEMA)
            self._clear_jobs()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Let others have it."""
        self._opened.close()

    # What is in files

    def path(self, file_id: str) -> Path:
        """Return where a file's content is."""
        return self._files / file_id

    def job_folder(self, batch_id: str) -> Path:
        """Return where a batch's job may work."""
        return self._jobs / batch_id

    def write(self, file_id: str, offset: int, data: bytes) -> None:
        """Write a part of a file that is not in the database yet.

        Raises:
            OSError: there is no room, or the disk fails.
        """
        descriptor = os.open(self.path(file_id), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            view = memoryview(data)
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)

    def read(self, file_id: str, offset: int, size: int) -> bytes:
        """Return a part of a file.

        Raises:
            ObjectNotFoundError: it has been deleted.
        """
        try:
            descriptor = os.open(self.path(file_id), os.O_RDONLY)
        except FileNotFoundError:
            raise _no("file", file_id) from None
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def drop(self, file_id: str) -> None:
        """Forget what was written of a file that is not to be."""
        if self._file(file_id) is None:
            self.path(file_id).unlink(missing_ok=True)

    # Files

    def add_file(self, file: FileObject) -> FileObject:
        """Add a file whose content has been written. Where it is there already, that one is returned.

        Raises:
            OSError: the disk fails.
        """
        if (known := self._file(file.id)) is not None:
            return known
        descriptor = os.open(self.path(file.id), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, file.bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(self._files)
        self._insert(file)
        return file

    def file(self, file_id: str) -> FileObject:
        """Return a file.

        Raises:
            ObjectNotFoundError: there is none of that id.
        """
        if (found := self._file(file_id)) is None:
            raise _no("file", file_id)
        return found

    def files(self, purpose: str | None, after: str | None, limit: int, *, descending: bool) -> FileList:
        """Return the next files after one, the latest first or last.

        Raises:
            ObjectNotFoundError: there is none of the id `after`.
        """
        comes, order = ("<", "DESC") if descending else (">", "ASC")
        rows = self._database.execute(
            f"SELECT body FROM file WHERE (? IS NULL OR purpose = ?) AND (expires_at IS NULL OR expires_at > ?) "  # noqa: S608
            f"AND (? IS NULL OR seq {comes} ?) ORDER BY seq {order} LIMIT ?",
            (purpose, purpose, time.time(), after, self._place("file", after), limit + 1),
        )
        return FileList(*_page([_decode_file(body) for (body,) in rows], limit))

    def delete_file(self, file_id: str) -> None:
        """Delete a file.

        Raises:
            ObjectNotFoundError: there is none of that id.
            BatchStateError: a batch that has not ended reads it.
        """
        self.file(file_id)
        for work in self.unfinished():
            if work.batch.input_file_id == file_id:
                raise BatchStateError(f"file {file_id} is read by {work.batch.id}; wait for that, or cancel it first")
        self._delete(file_id)

    def clean(self) -> None:
        """Delete the files that have expired, and what is left of uploads that were given up."""
        needed = {file_id for work in self.unfinished() for file_id in _files_of(work)}
        expired = self._database.execute("SELECT id FROM file WHERE expires_at <= ?", (time.time(),)).fetchall()
        for (file_id,) in expired:
            if file_id not in needed:
                self._delete(file_id)
        for path in self._files.iterdir():
            with suppress(FileNotFoundError):
                is_old = time.time() - path.stat().st_mtime > _ABANDONED_S
                if is_old and path.name not in needed and self._row("file", path.name) is None:
                    path.unlink()

    # Batches

    def add_batch(self, work: Work) -> Work:
        """Add a batch. Where it is there already, that one is returned.

        Raises:
            ObjectNotFoundError: there is no file for it.
        """
        if (row := self._row("batch", work.batch.id)) is not None:
            return _decode_work(row)
        self.file(work.batch.input_file_id)
        self._database.execute(
            "INSERT INTO batch (id, status, body) VALUES (?, ?, ?)", (work.batch.id, work.batch.status, _encode(work))
        )
        return work

    def save_batch(self, work: Work) -> None:
        """Put a batch's present state in place of an earlier one."""
        self._database.execute(
            "UPDATE batch SET status = ?, body = ? WHERE id = ?", (work.batch.status, _encode(work), work.batch.id)
        )

    def batch(self, batch_id: str) -> Batch:
        """Return a batch.

        Raises:
            ObjectNotFoundError: there is none of that id.
        """
        if (row := self._row("batch", batch_id)) is None:
            raise _no("batch", batch_id)
        return _decode_work(row).batch

    def batches(self, after: str | None, limit: int) -> BatchList:
        """Return the next batches after one, the latest first.

        Raises:
            ObjectNotFoundError: there is none of the id `after`.
        """
        rows = self._database.execute(
            "SELECT body FROM batch WHERE (? IS NULL OR seq < ?) ORDER BY seq DESC LIMIT ?",
            (after, self._place("batch", after), limit + 1),
        )
        return BatchList(*_page([_decode_work(body).batch for (body,) in rows], limit))

    def unfinished(self) -> list[Work]:
        """Return the batches that have not ended, the oldest first."""
        rows = self._database.execute(
            "SELECT body FROM batch WHERE status NOT IN ('failed', 'completed', 'expired', 'cancelled') ORDER BY seq"
        )
        return [_decode_work(body) for (body,) in rows]

    def count_batches(self) -> dict[str, int]:
        """Return how many batches there are of each status."""
        return dict(self._database.execute("SELECT status, count(*) FROM batch GROUP BY status"))

    def collect(self, work: Work, outputs: dict[str, Path]) -> Work:
        """Make files of what a job has written, and save its batch, which has come to its end.

        Done again after a crash in the middle of it, it comes to the same.

        Args:
            work: The batch as it is from now on, but for the ids of its files.
            outputs: By the id of each file, where its job has written it. What is empty becomes no file.
        """
        now = int(time.time())
        expires_at = None if work.output_expires_s is None else now + work.output_expires_s
        ids: dict[str, str | None] = {}
        files = []
        for file_id, written in outputs.items():
            path = self.path(file_id)
            if written.exists():
                written.replace(path)
            num_bytes = path.stat().st_size if path.exists() else 0
            ids[file_id] = file_id if num_bytes else None
            if num_bytes:
                kind = "output" if file_id == work.output_id else "error"
                files.append(
                    FileObject(
                        id=file_id,
                        bytes=num_bytes,
                        created_at=now,
                        expires_at=expires_at,
                        filename=f"{work.batch.id}_{kind}.jsonl",
                        purpose="batch_output",
                    )
                )
            else:
                path.unlink(missing_ok=True)
        sync_folder(self._files)
        batch = msgspec.structs.replace(
            work.batch, output_file_id=ids[work.output_id], error_file_id=ids[work.errors_id]
        )
        work = msgspec.structs.replace(work, batch=batch)
        self._database.execute("BEGIN")
        try:
            for file in files:
                self._insert(file)
            self.save_batch(work)
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        shutil.rmtree(self.job_folder(work.batch.id), ignore_errors=True)
        return work

    # Inside

    def _clear_jobs(self) -> None:
        """Delete what a batch has left that has ended, where its process died before it could."""
        at_work = {work.batch.id for work in self.unfinished()}
        for folder in self._jobs.iterdir():
            if folder.name not in at_work:
                shutil.rmtree(folder, ignore_errors=True)

    def _file(self, file_id: str) -> FileObject | None:
        row = self._row("file", file_id)
        file = None if row is None else _decode_file(row)
        return None if file is None or (file.expires_at is not None and file.expires_at <= time.time()) else file

    def _row(self, table: str, object_id: str) -> bytes | None:
        found = self._database.execute(f"SELECT body FROM {table} WHERE id = ?", (object_id,)).fetchone()  # noqa: S608
        return None if found is None else found[0]

    def _place(self, table: Literal["file", "batch"], object_id: str | None) -> int | None:
        if object_id is None:
            return None
        found = self._database.execute(f"SELECT seq FROM {table} WHERE id = ?", (object_id,)).fetchone()  # noqa: S608
        if found is None:
            raise _no(table, object_id)
        return int(found[0])

    def _insert(self, file: FileObject) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO file (id, purpose, expires_at, body) VALUES (?, ?, ?, ?)",
            (file.id, file.purpose, file.expires_at, _encode(file)),
        )

    def _delete(self, file_id: str) -> None:
        self._database.execute("DELETE FROM file WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)


def _page(found: list[Item], limit: int) -> tuple[list[Item], bool, str | None, str | None]:
    shown = found[:limit]
    return shown, len(found) > limit, shown[0].id if shown else None, shown[-1].id if shown else None


def _files_of(work: Work) -> tuple[str, str, str]:
    return work.batch.input_file_id, work.output_id, work.errors_id


def _no(kind: str, object_id: str) -> ObjectNotFoundError:
    return ObjectNotFoundError(f"there is no {kind} {object_id}")
