"""What a batch job writes: rows in the order of the input, in the format that the output's name tells.

JSON Lines: a row has the `id` and either `text`, `finish_reason`, `usage` and `receipt` (and where the row asked for
`logprobs`, those and `token_ids`), or an `error` with `type` and `message`. CSV and Parquet have the columns of
`COLUMNS`. Answers to OpenAI's batch files are written as OpenAI does: answers to the output, failures to a second file.

Every input row has one output row, and a failed one has no text.
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec

from raylm.batch.ledger import Record
from raylm.batch.rows import Format, format_of, import_parquet
from raylm.errors import BatchExpiredError, InvalidRequestError, RaylmError, RequestCancelledError, from_message
from raylm.messages import Completion, FinishReason, Receipt, Usage

COLUMNS = (
    "id",
    "text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "slot",
    "model",
    "error_type",
    "error",
)
"""Of CSV and Parquet. Where a row failed, all but `id` and the last two are empty."""

Result = Completion | RaylmError

_PARQUET_ROWS = 4096


class Writer(Protocol):
    """Writes results to a file that somebody else opens and closes."""

    def write(self, records: Sequence[Record]) -> None:
        """Write the next records."""
        ...

    def close(self) -> None:
        """Write what comes after the last one."""
        ...


@contextmanager
def open_output(path: Path | None, file: BinaryIO | None = None, *, openai: bool = False) -> Iterator[Writer]:
    """Open `<path>.partial` for writing, and rename it to `path` when the block ends without an exception.

    So `path` is either what it was before, or complete. After an exception the partial file stays, unless it is empty.
    A `path` that is a device or a pipe is written to as it is.

    Args:
        path: The file; None writes to `file`.
        file: Where to write, JSON Lines.
        openai: The rows are from an OpenAI batch file.

    Raises:
        InvalidRequestError: the format cannot be written here.
        OSError: it cannot be written.
    """
    if path is None:
        if file is None:
            raise AssertionError("unreachable: there is a path or a file")
        yield _writer("jsonl", file, file if openai else None)
        return
    kind = format_of(path.name)
    with ExitStack() as stack:
        errors = stack.enter_context(_replacing(errors_path(path))) if openai else None
        target = stack.enter_context(_replacing(path))
        writer = _writer(kind, target, errors)
        yield writer
        writer.close()


def errors_path(output: Path) -> Path:
    """Return where failures go that are told apart from answers: `answers.errors.jsonl` beside `answers.jsonl`."""
    stem, dot, suffixes = output.name.partition(".")
    return output.with_name(f"{stem}.errors{dot}{suffixes}")


def partial_path(output: Path) -> Path:
    """Return where the output is until it is complete."""
    return output.with_name(output.name + ".partial")


def encode_row(row_id: str | int, result: Result) -> bytes:
    """Return an output row, as one line of JSON."""
    if isinstance(result, RaylmError):
        return _encode(_Failed(id=row_id, error=_Error(type(result).__name__, result.message))) + b"\n"
    return _encode(_answered(row_id, result)) + b"\n"


def encode_openai(record: Record) -> bytes:
    """Return a line of OpenAI's output or error file."""
    from raylm.serve.schema import ChatWire, CompletionWire, error_body

    form, completion = record.openai, record.completion
    answer_id = f"batch_req_{record.key[:24]}_{record.position}"
    line: dict[str, Any] = {"id": answer_id, "custom_id": str(record.id), "response": None, "error": None}
    if completion is not None:
        if form is None:
            raise AssertionError("unreachable: who answers a row of an OpenAI batch file knows its form")
        wire: ChatWire | CompletionWire
        answered_by = form.model or completion.receipt.model
        if form.kind == "chat":
            wire = ChatWire(answer_id, answered_by, include_usage=False, logprobs=form.logprobs)
        else:
            wire = CompletionWire(
                answer_id, answered_by, [form.prompt], include_usage=False, logprobs=form.logprobs, echo=form.echo
            )
        body = wire.whole([completion])
        line["response"] = {"status_code": 200, "request_id": completion.request_id, "body": body}
    elif record.error is not None:
        error = from_message(record.error)
        if isinstance(error, RequestCancelledError | BatchExpiredError):  # nothing has answered
            code = "batch_cancelled" if isinstance(error, RequestCancelledError) else "batch_expired"
            line["error"] = {"code": code, "message": error.message}
        else:
            body = error_body(error)
            line["response"] = {"status_code": error.status_code, "request_id": answer_id, "body": body}
    return _encode(line) + b"\n"


class _JSONLines:
    def __init__(self, file: BinaryIO, errors: BinaryIO | None) -> None:
        self._file = file
        self._errors = errors

    def write(self, records: Sequence[Record]) -> None:
        if self._errors is not None:
            answers = [encode_openai(record) for record in records if record.completion is not None]
            failures = [encode_openai(record) for record in records if record.completion is None]
            self._errors.write(b"".join(failures))
            self._errors.flush()
        else:
            answers = [_plain(record) for record in records]
        self._file.write(b"".join(answers))
        self._file.flush()

    def close(self) -> None:
        pass


class _CSV:
    def __init__(self, file: BinaryIO) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        self._lines = csv.writer(self._text)
        self._lines.writerow(COLUMNS)

    def write(self, records: Sequence[Record]) -> None:
        for record in records:
            row = _columns(record)
            self._lines.writerow(["" if row[name] is None else row[name] for name in COLUMNS])
        self._text.flush()

    def close(self) -> None:
        self._text.detach()


class _Parquet:
    def __init__(self, file: BinaryIO) -> None:
        pa, pq = import_parquet()
        numbers = {"prompt_tokens", "completion_tokens", "slot"}
        schema = pa.schema([(name, pa.int64() if name in numbers else pa.string()) for name in COLUMNS])
        self._make = partial(pa.Table.from_pylist, schema=schema)
        self._writer = pq.ParquetWriter(file, schema)
        self._rows: list[Mapping[str, Any]] = []

    def write(self, records: Sequence[Record]) -> None:
        self._rows += [{**row, "id": str(row["id"])} for row in map(_columns, records)]
        if len(self._rows) >= _PARQUET_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(self._make(self._rows))
        self._rows = []


def _writer(kind: Format, file: BinaryIO, errors: BinaryIO | None) -> Writer:
    if kind == "jsonl":
        return _JSONLines(file, errors)
    if errors is not None:
        raise InvalidRequestError("output: answers to an OpenAI batch file are JSON Lines")
    return _CSV(file) if kind == "csv" else _Parquet(file)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            if path.name.endswith(".gz"):
                with gzip.GzipFile(path.name.removesuffix(".gz"), "wb", fileobj=file, mtime=0) as packed:
                    yield packed  # type: ignore[misc]
            else:
                yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        if not partial.stat().st_size:
            partial.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Have a new name in a folder outlast a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Error(msgspec.Struct):
    type: str
    message: str


class _Failed(msgspec.Struct, kw_only=True):
    id: str | int
    error: _Error


class _Answered(msgspec.Struct, kw_only=True, omit_defaults=True):
    id: str | int
    text: str
    finish_reason: FinishReason
    usage: Usage
    receipt: Receipt
    token_ids: list[int] = []
    logprobs: list[float] = []


_encode = msgspec.json.Encoder().encode


def _plain(record: Record) -> bytes:
    if record.completion is not None:
        return _encode(_answered(record.id, record.completion)) + b"\n"
    error = record.error
    if error is None:
        raise AssertionError("unreachable: a record has a completion or an error")
    return _encode(_Failed(id=record.id, error=_Error(error.type, error.message))) + b"\n"


def _answered(row_id: str | int, completion: Completion) -> _Answered:
    return _Answered(
        id=row_id,
        text=completion.text,
        finish_reason=completion.finish_reason,
        usage=completion.usage,
        receipt=completion.receipt,
        token_ids=completion.token_ids if completion.logprobs else [],
        logprobs=completion.logprobs,
    )


def _columns(record: Record) -> dict[str, Any]:
    completion, error = record.completion, record.error
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row["id"] = record.id
    if completion is not None:
        row |= {
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.usage.prompt_tokens,
            "completion_tokens": completion.usage.completion_tokens,
            "slot": completion.receipt.slot,
            "model": completion.receipt.model,
        }
    elif error is not None:
        row |= {"error_type": error.type, "error": error.message}
    return row


__all__ = ["COLUMNS", "Writer", "encode_openai", "encode_row", "errors_path", "open_output", "partial_path"]
