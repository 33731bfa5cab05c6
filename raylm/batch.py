"""Batch jobs: rows of JSON in, rows of JSON out, in the same order and in bounded memory.

An input row is a JSON object on a line of its own. It has either of

    {"prompt": "raw text, to which no template is applied"}
    {"messages": [{"role": "user", "content": "a conversation"}]}

and, if need be, an `id` (a string or an integer; the line's number, counted from 1, where there is none) and any
parameter of `raylm.messages.GenerationConfig`. Empty lines are passed over, and counted.

An output row has the `id` and either `text`, `finish_reason`, `usage` and `receipt` (and where the row asks for
`logprobs`, those and `token_ids`), or an `error` with `type` and `message`. Every input row has one output row, and a
failed one has no text.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from raylm.api import AsyncLMDeployPipeline
from raylm.errors import InvalidRequestError, RaylmError
from raylm.messages import Completion, FinishReason, GenerationConfig, Receipt, Usage
from raylm.stream import Stream

_MIN_WINDOW = 1000
"""Rows in work at least, so that one slow row does not idle the actors behind it."""

_WINDOW_FACTOR = 4
"""Rows in work for each request that the actors take at a time."""

_BLOCK_BYTES = 1 << 20

_INPUT = ("prompt", "messages")
_PARAMETERS = GenerationConfig.__struct_fields__


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row that can be read. Whether its values make a request shows when it is run.

    Attributes:
        number: Its line, counted from 1.
        id: Its name in the output.
        fields: `prompt` or `messages`, and generation parameters.
    """

    number: int
    id: str | int
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """One row that cannot be read.

    Attributes:
        number: Its line, counted from 1.
        id: Its name in the output.
        error: What is wrong with it; the text names the line.
    """

    number: int
    id: str | int
    error: InvalidRequestError


Result = Completion | RaylmError


@dataclass
class Tally:
    """What has come out of a batch so far.

    Attributes:
        num_rows: Rows with a result.
        num_failed: Those of them that failed.
        num_tokens: Tokens generated.
        rows_by_slot: Rows answered, by `(slot, node)`.
        tokens_by_slot: Tokens generated, by `(slot, node)`.
    """

    num_rows: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    rows_by_slot: Counter[tuple[int, str]] = field(default_factory=Counter)
    tokens_by_slot: Counter[tuple[int, str]] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        """Count one more result."""
        self.num_rows += 1
        if isinstance(result, RaylmError):
            self.num_failed += 1
            return
        slot = result.receipt.slot, result.receipt.node
        self.num_tokens += result.usage.completion_tokens
        self.rows_by_slot[slot] += 1
        self.tokens_by_slot[slot] += result.usage.completion_tokens


async def read_rows(file: BinaryIO) -> AsyncIterator[Row | BadRow]:
    """Yield the rows of a file, or of a pipe as they come.

    Args:
        file: What to read, from where its descriptor stands. It is not read through Python's buffer.
    """
    number = 0
    async for line in _read_lines(file.fileno()):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the mark with which Windows begins UTF-8
        if line.strip():
            yield parse_row(line, number)


def parse_row(line: bytes | str, number: int) -> Row | BadRow:
    """Read one line.

    Args:
        line: A JSON object.
        number: The line's number; also the row's `id` where it has none.
    """
    row_id: str | int = number
    try:
        fields = _decode(line)
        row_id = _id(fields.pop("id", None), number)
        _check_names(fields)
    except InvalidRequestError as error:
        return BadRow(number=number, id=row_id, error=_at_line(number, error))
    return Row(number=number, id=row_id, fields=fields)


async def run_batch(
    pipeline: AsyncLMDeployPipeline,
    rows: AsyncIterable[Row | BadRow],
    *,
    defaults: Mapping[str, Any] | None = None,
    window: int | None = None,
) -> AsyncGenerator[tuple[Row | BadRow, Result], None]:
    """Run rows in the pool's batch lane and yield each with its result, in input order.

    Leaving early aborts what is running; close the generator for that, as `contextlib.aclosing` does.

    Args:
        pipeline: Answers the rows; it has been started.
        rows: What to run. Rows are read when there is room for them in the window.
        defaults: Generation parameters of rows that do not give their own.
        window: Rows in work at most, those with a result that the caller has not taken included. None: four for each
            request that the actors take at a time, and at least 1,000.

    Yields:
        Each row, and its completion or the error that it ended with. A row that is wrong fails alone, and its error
        names the line.
    """
    if window is None:
        capacity = sum(slot.capacity for slot in pipeline.statistics().slots)
        window = max(_MIN_WINDOW, _WINDOW_FACTOR * capacity)
    room = asyncio.Semaphore(window)
    started: asyncio.Queue[tuple[Row | BadRow, Stream | RaylmError] | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async for row in rows:
                await room.acquire()
                started.put_nowait((row, _start(pipeline, row, defaults or {})))
        finally:
            started.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (head := await started.get()) is not None:
            row, work = head
            yield row, await _result(work) if isinstance(work, Stream) else work
            room.release()
        await reader  # raises what ended it early
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        while not started.empty():
            if (head := started.get_nowait()) is not None and isinstance(head[1], Stream):
                head[1].abort()


def encode_row(row_id: str | int, result: Result) -> bytes:
    """Return an output row, as one line of JSON."""
    if isinstance(result, RaylmError):
        failed = _Failed(id=row_id, error=_Error(type=type(result).__name__, message=result.message))
        return _encode(failed) + b"\n"
    answered = _Answered(
        id=row_id,
        text=result.text,
        finish_reason=result.finish_reason,
        usage=result.usage,
        receipt=result.receipt,
        token_ids=result.token_ids if result.logprobs else [],
        logprobs=result.logprobs,
    )
    return _encode(answered) + b"\n"


@contextmanager
def output_file(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open `<path>.partial` for writing, and rename it to `path` when the block ends without an exception.

    So `path` is either absent or complete. After an exception the partial file stays, unless it is empty. A `path` that
    is a device or a pipe is opened as it is.

    Args:
        path: The file.
        overwrite: Replace what is there.

    Raises:
        FileExistsError: `path` or its partial file is there, and `overwrite` is False.
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    partial = path.with_name(path.name + ".partial")
    for taken in (path, partial):
        if taken.exists() and not overwrite:
            raise FileExistsError(f"{taken} is there already, and is replaced only on request")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        if not partial.stat().st_size:
            partial.unlink()
        raise


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


def _decode(line: bytes | str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = msgspec.json.decode(line, type=dict)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"a row is a JSON object: {error}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(f"not valid JSON: {error}") from None
    return fields


def _id(given: object, number: int) -> str | int:
    if given is None:
        return number
    # bool is an int to isinstance, and JSON written by msgspec holds integers of 64 bits.
    if type(given) is str or (type(given) is int and -(1 << 63) <= given < 1 << 64):
        return given
    raise InvalidRequestError(f"id: expected a string or an integer of 64 bits, got {given!r}")


def _check_names(fields: Mapping[str, Any]) -> None:
    if unknown := fields.keys() - {*_INPUT, *_PARAMETERS}:
        raise InvalidRequestError(
            f"unknown key {', '.join(sorted(unknown))}; a row has prompt or messages, and may have id, "
            f"{', '.join(_PARAMETERS)}"
        )


def _at_line(number: int, error: InvalidRequestError) -> InvalidRequestError:
    return InvalidRequestError(f"line {number}: {error}")


def _start(pipeline: AsyncLMDeployPipeline, row: Row | BadRow, defaults: Mapping[str, Any]) -> Stream | RaylmError:
    if isinstance(row, BadRow):
        return row.error
    try:
        request = pipeline.request(**{**defaults, **row.fields})
    except InvalidRequestError as error:
        return _at_line(row.number, error)
    request.stream = False
    try:
        return pipeline.pool.stream(request, lane="batch")
    except RaylmError as error:
        return error


async def _result(stream: Stream) -> Result:
    async with stream:
        try:
            return await stream.completion()
        except RaylmError as error:
            return error


async def _read_lines(descriptor: int) -> AsyncIterator[bytes]:
    rest = b""
    while True:
        await _readable(descriptor)
        block = os.read(descriptor, _BLOCK_BYTES)
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:
        return  # epoll does not take a regular file, which is always readable
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


__all__ = ["BadRow", "Result", "Row", "Tally", "encode_row", "output_file", "parse_row", "read_rows", "run_batch"]
