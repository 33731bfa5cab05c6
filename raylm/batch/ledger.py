"""Ledger: what a job has been told, on disk before it is believed.

A ledger is a file of JSON Lines beside the output, and lines are only ever appended. Each ends with a checksum of
itself, so that one which a crash has torn is known, passed over, and its row asked again. There are three kinds:

    {"run":{...},"crc":"..."}        somebody began to work on the job, with these settings
    {"position":3,...,"crc":"..."}   a row was answered, or failed for good
    {"end":{...},"crc":"..."}        the one who began ended, and says whether the job is finished

A `Record` is in the ledger once `sync` has returned: fsync is called for many of them at a time. A later record of a
position takes the place of an earlier one.

What is where is held in a private SQLite database that is made of the file when it is opened, and spills to disk, so
that memory does not grow with the job.
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import msgspec

from raylm.batch.rows import BadRow, OpenAIForm, Row
from raylm.errors import ErrorMessage, OutputBusyError
from raylm.messages import Completion, EngineInfo, Receipt

_CRC = b',"crc":"%08x"}'
_CRC_BYTES = len(_CRC % 0)

ANSWERED, FAILED = 1, 0


class Run(msgspec.Struct, kw_only=True):
    """Somebody at work on a job.

    Attributes:
        started_at: When, in seconds since 1970.
        pid: Its process.
        host: Where that ran.
        job: The settings, from which a row can be asked again.
        engines: Who may have answered.
    """

    started_at: float
    pid: int
    host: str
    job: dict[str, Any]
    engines: list[EngineInfo] = []


class End(msgspec.Struct, kw_only=True):
    """How somebody's work on a job ended.

    Attributes:
        at: When, in seconds since 1970.
        why: Why the job is not finished; "" when it is.
        num_rows: Rows of the input, those of other shards included; None where it was not read to its end.
        digest: Of that input, where it was a shard's; "" where it was not.
    """

    at: float
    why: str
    num_rows: int | None = None
    digest: str = ""


class Entry(NamedTuple):
    """What a ledger knows of a position without reading its record.

    Attributes:
        key: As in the record.
        answered: It has an answer, and not an error.
        engine: Who gave the answer (see `engine_key`); "" where there is none.
        label: Of its id and form (see `label_of`).
    """

    key: str
    answered: bool
    engine: str
    label: bytes

    def answers(self, key: str, engines: set[str]) -> bool:
        """Tell whether it is the answer to that key, from one of these engines; from any where none is known."""
        return self.answered and self.key == key and (not engines or self.engine in engines)


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What became of one row. It has either `completion` or `error`.

    Attributes:
        position: The row's place in the input, counted from 0.
        key: Digest of what was asked: prompt or messages, and parameters.
        id: The row's name in the output.
        at: When it ended, in seconds since 1970.
        seconds: Time from its first sending to its end.
        tries: How often it was sent.
        greedy: Whether the same would be answered again.
        same_as: The position of the equal row that was asked in its place.
        hedged: It was sent to a second slot, because the first was slow.
        completion: The answer.
        error: Why there is none.
        openai: How it is written, where it is from an OpenAI batch file.
    """

    position: int
    key: str
    id: str | int
    at: float = 0.0
    seconds: float = 0.0
    tries: int = 1
    greedy: bool = False
    same_as: int | None = None
    hedged: bool = False
    completion: Completion | None = None
    error: ErrorMessage | None = None
    openai: OpenAIForm | None = None


_encode = msgspec.json.Encoder().encode
_decode_record = msgspec.json.Decoder(Record).decode
_decode_run = msgspec.json.Decoder(Run).decode
_decode_end = msgspec.json.Decoder(End).decode


class Ledger:
    """The ledger of one job, open for this process alone. Make it with `open`, or `view` it, and close it.

    It belongs to one thread at a time.

    Attributes:
        path: The file.
        runs: Everybody who has worked on the job so far.
        ended: How the last of them ended; None while it is at work, and where it was cut off.
        num_torn: Lines that could not be read.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self.runs: list[Run] = []
        self.ended: End | None = None
        self.num_torn = 0
        self._num_records = 0
        self._file = file
        self._end = 0  # of the file, with what is still to be written
        self._synced = 0
        self._pending: dict[int, bytes] = {}  # lines by where they will be
        self._writing: dict[int, bytes] = {}  # those that are being written
        self._run = 0  # number of the present one
        self._index = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._index.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE place (position INTEGER PRIMARY KEY, key TEXT, state INT, engine TEXT, label BLOB, offset INT,
                                size INT, run INT);
            CREATE TABLE answer (key TEXT, engine TEXT, offset INT, size INT, PRIMARY KEY (key, engine)) WITHOUT ROWID;
            BEGIN;
            """
        )

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a ledger, new or not, and read it.

        Raises:
            OutputBusyError: another process has it open; the text says which.
            OSError: it cannot be read or written.
        """
        file = path.open("a+b", buffering=0)
        try:
            _lock(path, file)
            ledger = cls(path, file)
            ledger._load()
        except BaseException:
            file.close()
            raise
        return ledger

    @classmethod
    def view(cls, path: Path) -> Self:
        """Read a ledger as it is at this moment, without the lock: also while its job goes on. Nothing can be added.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        file = path.open("rb", buffering=0)
        try:
            ledger = cls(path, file)
            ledger._load(viewing=True)
        except BaseException:
            file.close()
            raise
        return ledger

    def close(self) -> None:
        """Give it up. What was not synced is not in it."""
        self._index.close()
        self._file.close()

    def clear(self) -> None:
        """Forget everything."""
        self._file.truncate(0)
        self._index.execute("DELETE FROM place")
        self._index.execute("DELETE FROM answer")
        self._end = self._synced = self.num_torn = self._num_records = 0
        self.runs = []
        self.ended = None

    def begin(self, job: Mapping[str, Any], engines: Iterable[EngineInfo]) -> None:
        """Note that this process works on the job now."""
        run = Run(
            started_at=time.time(), pid=os.getpid(), host=socket.gethostname(), job=dict(job), engines=list(engines)
        )
        self.runs.append(run)
        self.ended = None
        self._run = len(self.runs)
        self._push(_encode({"run": run}))
        self.sync()

    def end(self, why: str = "", num_rows: int | None = None, digest: str = "") -> None:
        """Note that this process works on the job no more. Arguments are as in `End`."""
        self.ended = End(at=time.time(), why=why, num_rows=num_rows, digest=digest)
        self._push(_encode({"end": self.ended}))
        self.sync()

    # What is known

    def find(self, position: int) -> Entry | None:
        """Return what is known of a position, without reading its record; None: nothing."""
        found = self._index.execute(
            "SELECT key, state, engine, label FROM place WHERE position = ?", (position,)
        ).fetchone()
        return None if found is None else Entry(found[0], found[1] == ANSWERED, *found[2:])

    def equal(self, key: str, engines: set[str]) -> Record | None:
        """Return the record of a greedy row with the answer to that key, whatever its position has now.

        It is from one of these engines; from any where none is known.
        """
        if not engines:
            place = self._index.execute("SELECT offset, size FROM answer WHERE key = ? LIMIT 1", (key,)).fetchone()
            return None if place is None else self._read(*place)
        for engine in engines:
            place = self._index.execute(
                "SELECT offset, size FROM answer WHERE key = ? AND engine = ?", (key, engine)
            ).fetchone()
            if place is not None:
                return self._read(*place)
        return None

    def read(self, position: int) -> Record:
        """Return the record of a position that has one."""
        offset, size = self._index.execute("SELECT offset, size FROM place WHERE position = ?", (position,)).fetchone()
        return self._read(offset, size)

    def confirm(self, position: int) -> None:
        """Take over for this run what an earlier one knew of a position."""
        self._index.execute("UPDATE place SET run = ? WHERE position = ?", (self._run, position))

    def done_from(self, position: int, step: int, most: int) -> list[tuple[int, int]]:
        """Return where the records are of the positions `position`, `position + step` and so on, up to the first gap.

        Only those that this run has confirmed or added, and that are on disk.
        """
        found: list[tuple[int, int]] = []
        for place, offset, size, run in self._index.execute(
            "SELECT position, offset, size, run FROM place WHERE position >= ? ORDER BY position LIMIT ?",
            (position, most),
        ):
            if place != position + len(found) * step or run != self._run or offset + size > self._synced:
                break
            found.append((offset, size))
        return found

    def read_at(self, places: Iterable[tuple[int, int]]) -> list[Record]:
        """Return the records at places that `done_from` has told. May be called from any thread."""
        return [self._read(offset, size) for offset, size in places]

    def records(self) -> Iterator[Record]:
        """Yield the last record of every position, in the order of positions."""
        places = self._index.execute("SELECT offset, size FROM place ORDER BY position")
        for offset, size in places:
            yield self._read(offset, size)

    def answers(self) -> Iterator[Record]:
        """Yield the record of every answer, in the order of positions: of equal ones, the first.

        Positions beyond the input that the last run has read to its end are passed over.
        """
        most = math.inf if self.ended is None or self.ended.num_rows is None else self.ended.num_rows
        places = self._index.execute(
            "SELECT MIN(position) AS first, offset, size FROM place WHERE state = ? AND position < ? GROUP BY key "
            "ORDER BY first",
            (ANSWERED, most),
        )
        for _, offset, size in places:
            yield self._read(offset, size)

    @property
    def num_replaced(self) -> int:
        """Records whose position has got a later one."""
        return self._num_records - int(self._index.execute("SELECT COUNT(*) FROM place").fetchone()[0])

    # What is added

    def add(self, record: Record) -> None:
        """Add a record. It counts from the next `sync` on."""
        self._index_record(record, *self._push(_encode(record)))

    @property
    def num_pending(self) -> int:
        """Lines that nobody has begun to write."""
        return len(self._pending)

    def take(self) -> tuple[bytes, int]:
        """Return what is to be written, and where the file will end then."""
        self._writing, self._pending = self._pending, {}
        return b"".join(self._writing.values()), self._end

    def write(self, block: bytes) -> None:
        """Write what `take` has returned, and wait until it is on disk. May be called from any thread, one at a time.

        Raises:
            OSError: there is no room, or the disk fails.
        """
        view = memoryview(block)
        while view:
            view = view[self._file.write(view) :]
        os.fdatasync(self._file.fileno())

    def written(self, end: int) -> None:
        """Take note that the file is on disk up to `end`."""
        self._synced = end
        self._writing = {}

    def sync(self) -> None:
        """Write what was added, and wait until it is on disk."""
        block, end = self.take()
        self.write(block)
        self.written(end)

    def absorb(self, other: Ledger) -> None:
        """Take over the runs and the records of another ledger that are not known yet.

        A record is left out where its position has a later one of the same key.
        """
        for run in other.runs:
            if run not in self.runs:
                self.runs.append(run)
                self.ended = None
                self._push(_encode({"run": run}))
        for record in other.records():
            before = self.find(record.position)
            if before is not None and before.key == record.key:
                known = self.read(record.position)
                if known == record or known.at > record.at:
                    continue
            self.add(record)
            if self.num_pending > 1000:
                self.sync()
        self.sync()

    # Inside

    def _push(self, line: bytes) -> tuple[int, int]:
        whole = line[:-1] + _CRC % zlib.crc32(line[:-1]) + b"\n"
        offset = self._end
        self._pending[offset] = whole
        self._end += len(whole)
        return offset, len(whole)

    def _load(self, *, viewing: bool = False) -> None:
        self._file.seek(0)
        offset, last = 0, b"\n"
        with self.path.open("rb") as lines:
            for line in lines:
                body = checked(line)
                if body is None and viewing and not line.endswith(b"\n"):
                    break  # somebody is writing it
                if body is None:
                    self.num_torn += 1
                elif body.startswith(b'{"run":'):
                    self.runs.append(_decode_run(body[len(b'{"run":') : -1]))
                    self.ended = None
                elif body.startswith(b'{"end":'):
                    self.ended = _decode_end(body[len(b'{"end":') : -1])
                else:
                    self._index_record(_decode_record(body), offset, len(line))
                offset += len(line)
                last = line
        if not viewing and not last.endswith(b"\n"):  # so that the next line is one of its own
            self._file.write(b"\n")
            offset += 1
        self._end = self._synced = offset

    def _index_record(self, record: Record, offset: int, size: int) -> None:
        engine = "" if record.completion is None else engine_key(record.completion.receipt)
        state = FAILED if record.completion is None else ANSWERED
        self._num_records += 1
        self._index.execute(
            "INSERT OR REPLACE INTO place VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (record.position, record.key, state, engine, label_of(record), offset, size, self._run),
        )
        if state == ANSWERED and record.greedy and record.same_as is None:
            self._index.execute("INSERT OR REPLACE INTO answer VALUES (?, ?, ?, ?)", (record.key, engine, offset, size))

    def _read(self, offset: int, size: int) -> Record:
        line = self._pending.get(offset) or self._writing.get(offset)
        body = checked(line or os.pread(self._file.fileno(), size, offset))
        if body is None:
            raise OSError(f"{self.path}: what was written at {offset} cannot be read back")
        return _decode_record(body)


def engine_key(engine: EngineInfo | Receipt) -> str:
    """Return what tells one engine's answers from another's: its kind and version, the model, and its weights."""
    return f"{engine.engine}/{engine.engine_version}/{engine.model}/{engine.fingerprint}"


def label_of(row: Record | Row | BadRow) -> bytes:
    """Return a digest of what is written with an answer that is not asked for: the row's id, and OpenAI's form."""
    return blake2b(_encode((row.id, row.openai)), digest_size=8).digest()


def checked(line: bytes) -> bytes | None:
    """Return the JSON of a ledger's line without its checksum, or None where the line is not whole."""
    line = line.removesuffix(b"\n")  # which may be all that was cut off
    body, tail = line[:-_CRC_BYTES], line[-_CRC_BYTES:]
    return body + b"}" if tail == _CRC % zlib.crc32(body) else None


def check_free(path: Path) -> None:
    """Tell whether a ledger could be opened now.

    Raises:
        OutputBusyError: another process has it open; the text says which.
    """
    if path.exists():
        with path.open("rb") as file:
            _lock(path, file)


def _lock(path: Path, file: BinaryIO | FileIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputBusyError(f"{path} is being written by {_owner(path)}; wait for it, or end it") from None


def _owner(path: Path) -> str:
    owner = "another process"
    with path.open("rb") as lines:
        for line in lines:
            if line.startswith(b'{"run":') and (body := checked(line)) is not None:
                run = _decode_run(body[len(b'{"run":') : -1])
                since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started_at))
                owner = f"process {run.pid} on {run.host} since {since}"
    return owner
