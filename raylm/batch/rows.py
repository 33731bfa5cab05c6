"""What a batch job reads: rows from JSON Lines, CSV, Parquet, and OpenAI's batch files.

A row of JSON Lines has either of

    {"prompt": "raw text, to which no template is applied"}
    {"messages": [{"role": "user", "content": "a conversation"}]}

and, if need be, an `id` (a string or an integer; the row's number, counted from 1, where there is none) and any
parameter of `raylm.messages.GenerationConfig`. CSV and Parquet have the same names as columns. A `Reading` says how to
make prompts of other columns. An OpenAI batch file has `custom_id`, `method`, `url` and `body`, and is recognized by
them. Any of the files but Parquet may be gzipped. Empty lines are passed over, and counted.

A row that is wrong does not end the job: it becomes a `BadRow`, whose error names file and line.
"""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import itertools
import os
import string
import sys
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, AnyStr, BinaryIO, Literal

import msgspec
from pydantic import ValidationError

from raylm.errors import InvalidRequestError
from raylm.messages import GenerationConfig

Format = Literal["jsonl", "csv", "parquet"]

_BLOCK_BYTES = 1 << 20
_ROWS_A_STEP = 64
"""Rows that a thread reads at a time, so that no disk holds up the event loop."""

_INPUT = ("prompt", "messages")
_PARAMETERS = GenerationConfig.__struct_fields__
_OPENAI = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row that can be read. Whether its values make a request shows when it is run.

    Attributes:
        place: Where it is, for people: file and line, or row, counted from 1.
        id: Its name in the output.
        fields: `prompt`, `prompt_token_ids` or `messages`, and generation parameters.
        openai: How its answer is written, where it is from an OpenAI batch file.
    """

    place: str
    id: str | int
    fields: Mapping[str, Any]
    openai: OpenAIForm | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """One row that cannot be read.

    Attributes:
        place: Where it is, for people: file and line, or row, counted from 1.
        id: Its name in the output.
        error: What is wrong with it; the text names the line.
        openai: As in `Row`; None also where so much is wrong that it cannot be told.
    """

    place: str
    id: str | int
    error: InvalidRequestError
    openai: OpenAIForm | None = None


class OpenAIForm(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the answer to a row of an OpenAI batch file repeats of the request.

    Attributes:
        kind: Which of OpenAI's answers it is.
        model: The model that was asked for.
        prompt: The prompt, where it is to be echoed and was text.
        logprobs: Whether log-probabilities are told.
        echo: Whether the answer begins with the prompt.
    """

    kind: Literal["chat", "text"]
    model: str
    prompt: str | None = None
    logprobs: bool = False
    echo: bool = False


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become requests.

    Attributes:
        format: Of the file; None: by its name, and JSON Lines where that does not tell.
        columns: Which column is the `prompt`, `messages` or `id`, where one is called otherwise.
        prompt: Text with columns in braces, such as `Q: {question}`, which makes a raw prompt.
        message: The same, for a conversation of one message.

    With any of the last three, other columns are passed over. Without, each has to be known.
    """

    format: Format | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.message is not None:
            raise InvalidRequestError("prompt, message: give one of them")
        if unknown := self.columns.keys() - {*_INPUT, "id"}:
            raise InvalidRequestError(f"columns: {', '.join(sorted(unknown))} is none of prompt, messages, id")
        for text in (self.prompt, self.message):
            if text is not None:
                _parse_template(text)

    @property
    def chooses(self) -> bool:
        """Whether it says which columns count."""
        return bool(self.columns) or self.prompt is not None or self.message is not None

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a row comes to: `id` if it has one, `prompt` or `messages`, and parameters.

        Raises:
            InvalidRequestError: a column is missing or unknown.
        """
        if not self.chooses:
            _check_names(row)
            return dict(row)
        found = {name: row[column] for name, column in self.columns.items() if column in row}
        if missing := self.columns.keys() - found.keys():
            raise InvalidRequestError(f"it has no column {', '.join(self.columns[name] for name in sorted(missing))}")
        if "id" in row:
            found.setdefault("id", row["id"])
        template = self.prompt if self.prompt is not None else self.message
        if template is None:
            return found
        try:
            text = template.format_map({name: "" if value is None else value for name, value in row.items()})
        except KeyError as error:
            raise InvalidRequestError(f"it has no column {error.args[0]}, which the template names") from None
        found.pop("prompt", None)
        found.pop("messages", None)
        if self.message is None:
            return {**found, "prompt": text}
        return {**found, "messages": [{"role": "user", "content": text}]}


def format_of(name: str, chosen: Format | None = None) -> Format:
    """Return the format of a file by its name, or the one that was chosen."""
    if chosen is not None:
        return chosen
    suffixes = Path(name.removesuffix(".gz")).suffix.lower()
    return {".csv": "csv", ".parquet": "parquet"}.get(suffixes, "jsonl")  # type: ignore[return-value]


def read_rows(source: Path | None, reading: Reading | None = None) -> AsyncIterator[Row | BadRow]:
    """Yield the rows of a file, or those of a pipe as they come.

    Args:
        source: The file; None is stdin. What is no regular file is JSON Lines.
        reading: How rows become requests.

    Raises:
        InvalidRequestError: the file as a whole cannot be read; the text says why.
        OSError: likewise.
    """
    reading = reading or Reading()
    if source is None:
        return _read_pipe(sys.stdin.buffer, "stdin", reading)
    if not source.is_file():
        return _read_pipe(source.open("rb"), str(source), reading)
    return _in_thread(read_file(source, reading))


async def _in_thread(rows: Iterator[Row | BadRow]) -> AsyncIterator[Row | BadRow]:
    while step := await asyncio.to_thread(lambda: list(itertools.islice(rows, _ROWS_A_STEP))):
        for row in step:
            yield row


async def _read_pipe(file: BinaryIO, name: str, reading: Reading) -> AsyncIterator[Row | BadRow]:
    number = 0
    async for line in _read_lines(file.fileno()):
        number += 1
        if line.strip():
            yield parse_row(_unmarked(line, number), number, reading, name)


async def rows_of(objects: Iterable[Mapping[str, Any]], reading: Reading | None = None) -> AsyncIterator[Row | BadRow]:
    """Yield rows that a program has, in place of a file's."""
    reading = reading or Reading()
    for number, row in enumerate(objects, 1):
        yield _make_row(dict(row), number, reading, f"row {number}")
        if not number % _ROWS_A_STEP:
            await asyncio.sleep(0)


def count_rows(source: Path, reading: Reading) -> int:
    """Return how many rows a file has. It is read to its end, which takes a second for each gigabyte or so.

    Raises:
        InvalidRequestError: it is damaged.
        OSError: it cannot be read.
    """
    kind = format_of(source.name, reading.format)
    if kind == "parquet":
        return int(_parquet(source).metadata.num_rows)
    with _open(source) as file:
        if kind == "csv":
            csv.field_size_limit(sys.maxsize)
            with io.TextIOWrapper(file, errors="replace", newline="") as text:
                return max(0, sum(1 for row in csv.reader(_lines(text, source)) if row) - 1)
        return sum(1 for line in _lines(file, source) if line.strip())


def read_file(source: Path, reading: Reading) -> Iterator[Row | BadRow]:
    """Yield the rows of a file."""
    kind = format_of(source.name, reading.format)
    if kind == "parquet":
        yield from _read_parquet(source, reading)
        return
    with _open(source) as file:
        if kind == "csv":
            with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
                yield from _read_csv(_lines(text, source), reading, source.name)
            return
        for number, line in enumerate(_lines(file, source), 1):
            if line.strip():
                yield parse_row(_unmarked(line, number), number, reading, source.name)


def parse_row(line: bytes | str, number: int, reading: Reading | None = None, source: str = "") -> Row | BadRow:
    """Read one line of JSON.

    Args:
        line: A JSON object.
        number: The line's number; also the row's `id` where it has none.
        reading: How it becomes a request.
        source: Name of the file, for errors.
    """
    place = f"{source} line {number}".lstrip()
    try:
        fields = _decode(line)
    except InvalidRequestError as error:
        return BadRow(place=place, id=number, error=located(place, error))
    return _make_row(fields, number, reading or Reading(), place)


def as_openai(row: Row | BadRow) -> Row | BadRow:
    """Return a row of an OpenAI batch file: one of any other form is wrong there, for its answer would have no form."""
    if isinstance(row, BadRow) or row.openai is not None:
        return row
    wrong = InvalidRequestError(f"a row of an OpenAI batch file has {', '.join(sorted(_OPENAI))}")
    return BadRow(place=row.place, id=row.id, error=located(row.place, wrong))


def located(place: str, error: InvalidRequestError) -> InvalidRequestError:
    """Return an error that says where its row is."""
    return type(error)(f"{place}: {error}")


def _make_row(fields: dict[str, Any], number: int, reading: Reading, place: str) -> Row | BadRow:
    if fields.keys() >= _OPENAI and not reading.chooses:
        return _openai_row(fields, number, place)
    row_id: str | int = number
    if not reading.chooses and isinstance(custom_id := fields.get("custom_id"), str):
        row_id = custom_id  # a row of OpenAI's that lacks something else
    try:
        row_id = _id(fields.get(reading.columns.get("id", "id")), row_id)
        found = reading.fields(fields)
        found.pop("id", None)
    except InvalidRequestError as error:
        return BadRow(place=place, id=row_id, error=located(place, error))
    return Row(place=place, id=row_id, fields=found)


def _openai_row(line: dict[str, Any], number: int, place: str) -> Row | BadRow:
    url, given = line["url"], line["body"]
    model = given.get("model", "") if isinstance(given, dict) else ""
    form = OpenAIForm("text" if url == "/v1/completions" else "chat", model if isinstance(model, str) else "")
    custom_id = line["custom_id"]
    row_id = custom_id if isinstance(custom_id, str) else number
    try:
        fields, form = _parse_openai(line, form)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        wrong = InvalidRequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        return BadRow(place=place, id=row_id, error=located(place, wrong), openai=form)
    except InvalidRequestError as error:
        return BadRow(place=place, id=row_id, error=located(place, error), openai=form)
    return Row(place=place, id=row_id, fields=fields, openai=form)


def _parse_openai(line: dict[str, Any], form: OpenAIForm) -> tuple[dict[str, Any], OpenAIForm]:
    from raylm.serve.schema import ChatCompletionBody, CompletionBody

    if not isinstance(line["custom_id"], str):
        raise InvalidRequestError(f"custom_id: expected a string, got {line['custom_id']!r}")
    if line["method"] != "POST":
        raise InvalidRequestError(f"method: expected POST, got {line['method']!r}")
    if unknown := line.keys() - _OPENAI:
        raise InvalidRequestError(f"unknown key {', '.join(sorted(unknown))}")
    body: ChatCompletionBody | CompletionBody
    fields: dict[str, Any]
    if line["url"] == "/v1/chat/completions":
        body = ChatCompletionBody.model_validate(line["body"])
        fields = {"messages": [message.to_message() for message in body.messages]}
        form = OpenAIForm("chat", form.model, logprobs=bool(body.logprobs))
    elif line["url"] == "/v1/completions":
        body = CompletionBody.model_validate(line["body"])
        prompts = body.to_prompts()
        if len(prompts) != 1:
            raise InvalidRequestError("prompt: one for each row")
        is_text = isinstance(prompts[0], str)
        fields = {"prompt" if is_text else "prompt_token_ids": prompts[0]}
        echoed = prompts[0] if body.echo and isinstance(prompts[0], str) else None
        form = OpenAIForm("text", form.model, echoed, body.logprobs is not None, bool(body.echo))
    else:
        raise InvalidRequestError(f"url: expected /v1/chat/completions or /v1/completions, got {line['url']!r}")
    for name in ("stream", "session_id", "sequence_start", "sequence_end", "stream_options"):
        if getattr(body, name):
            raise InvalidRequestError(f"{name}: not in a batch")
    if (body.n or 1) != 1:
        raise InvalidRequestError("n: one answer for each row; repeat the row for more")
    config = body.to_config()
    return {**fields, **{name: getattr(config, name) for name in _PARAMETERS}}, form


def _parse_template(text: str) -> None:
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise InvalidRequestError(f"template: {error}; a brace that is meant as one is written twice") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name or spec or conversion or "." in name or "[" in name):
            raise InvalidRequestError(
                f"template: {{{name}}} is not the name of a column alone; a brace that is meant as one is written twice"
            )


def _open(source: Path) -> BinaryIO:
    return gzip.open(source, "rb") if source.name.endswith(".gz") else source.open("rb")  # type: ignore[return-value]


def _lines(file: Iterable[AnyStr], source: Path) -> Iterator[AnyStr]:
    """Yield the lines of a file that may be gzipped.

    Raises:
        InvalidRequestError: what was gzipped cannot be read.
    """
    number = 0
    try:
        for line in file:
            number += 1
            yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidRequestError(f"{source} is damaged or was cut off after line {number}: {error}") from None


def _unmarked(line: bytes, number: int) -> bytes:
    """Take off the mark with which Windows begins UTF-8."""
    return line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _read_csv(file: Iterable[str], reading: Reading, source: str) -> Iterator[Row | BadRow]:
    csv.field_size_limit(sys.maxsize)
    lines = csv.reader(file, strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise InvalidRequestError(f"{source}: two columns have the same name among {', '.join(names)}")
        for cells in lines:
            number = lines.line_num
            place = f"{source} line {number}"
            if not cells:
                continue
            if len(cells) != len(names):
                wrong = InvalidRequestError(f"it has {len(cells)} cells, and there are {len(names)} columns")
                yield BadRow(place=place, id=number, error=located(place, wrong))
                continue
            row: dict[str, Any] = dict(zip(names, cells, strict=True))
            if not reading.chooses:
                try:
                    row = {name: _cell(name, value) for name, value in row.items() if value or name == "prompt"}
                except InvalidRequestError as error:
                    yield BadRow(place=place, id=row.get("id") or number, error=located(place, error))
                    continue
            yield _make_row(row, number, reading, place)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{source} after line {lines.line_num}: {error}") from None


def _cell(name: str, text: str) -> Any:
    """Return what a cell stands for: JSON, except where any text is meant."""
    if name in ("id", "prompt"):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        raise InvalidRequestError(f"{name}: expected JSON, got {text!r}") from None


def import_parquet() -> tuple[Any, Any]:
    """Return `pyarrow` and `pyarrow.parquet`.

    Raises:
        InvalidRequestError: they are not installed; the text says what brings them.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InvalidRequestError("Parquet needs pyarrow; pip install 'raylm[data]' brings it") from None
    return pa, pq


def _parquet(source: Path) -> Any:
    pa, pq = import_parquet()
    try:
        return pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise InvalidRequestError(f"{source} is no Parquet file: {error}") from None


def _read_parquet(source: Path, reading: Reading) -> Iterator[Row | BadRow]:
    file = _parquet(source)
    wanted = file.schema_arrow.names
    if reading.chooses:
        template = reading.prompt if reading.prompt is not None else reading.message
        named = {name for _, name, _, _ in string.Formatter().parse(template or "") if name}
        wanted = [name for name in wanted if name in {"id", *reading.columns.values(), *named}]
    numbers = itertools.count(1)
    for block in file.iter_batches(batch_size=1024, columns=wanted):
        for row in block.to_pylist():
            if not reading.chooses:
                row = {name: _without_nulls(value) for name, value in row.items() if value is not None}
            number = next(numbers)
            yield _make_row(row, number, reading, f"{source.name} row {number}")


def _without_nulls(value: Any) -> Any:
    """Return the messages of a Parquet file without the fields that only other messages have."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [{name: part for name, part in item.items() if part is not None} for item in value]
    return value


def _decode(line: bytes | str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = msgspec.json.decode(line, type=dict)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"a row is a JSON object: {error}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(f"not valid JSON: {error}") from None
    return fields


def _id(given: object, default: str | int) -> str | int:
    if given is None:
        return default
    # bool is an int to isinstance, and JSON written by msgspec holds integers of 64 bits.
    if type(given) is str or (type(given) is int and -(1 << 63) <= given < 1 << 64):
        return given
    raise InvalidRequestError(f"id: expected a string or an integer of 64 bits, got {given!r}")


def _check_names(fields: Mapping[str, Any]) -> None:
    if unknown := fields.keys() - {"id", *_INPUT, *_PARAMETERS}:
        raise InvalidRequestError(
            f"unknown key {', '.join(sorted(unknown))}; a row has prompt or messages, and may have id, "
            f"{', '.join(_PARAMETERS)}. To make prompts of other columns, say how (--prompt, --message, --column)"
        )


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
