"""Batch jobs: rows in, rows out, each answered once, in the same order, whatever dies on the way.

`run_batch` is the whole of it for a program, and `raylm batch` for a person:

    rows.py     reads files
    ledger.py   keeps what was answered, on disk
    job.py      asks, retries, gives up
    outputs.py  writes files
    report.py   tells how it went; page.py as a page
    verify.py   asks a sample again
"""

from __future__ import annotations

import dataclasses
import glob
import re
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from raylm.batch.job import Job, Tally
from raylm.batch.ledger import End, Ledger, Record, Run, check_free, engine_key
from raylm.batch.outputs import Writer, errors_path, open_output, partial_path
from raylm.batch.rows import BadRow, Reading, Row, as_openai, read_rows, rows_of
from raylm.chatbot import AsyncChatbot, Chatbot
from raylm.config import BatchConfig
from raylm.errors import InvalidRequestError, first_line

_MOST_BAD = 1000
"""Rows at the begin of a file that may be too damaged to tell its form. They are in memory together."""

Source = Path | str | Iterable[Mapping[str, Any]] | None


def run_batch(
    chatbot: Chatbot,
    source: Source,
    output: Path | str,
    *,
    config: BatchConfig | None = None,
    reading: Reading | None = None,
    overwrite: bool = False,
    **defaults: Any,
) -> Tally:
    """Answer every row of a file or of a list. Begun again after anything, it goes on where it was.

    Args:
        chatbot: Any of the classes of `raylm`, or what `raylm.connect` returns.
        source: A file, or rows as dicts. See `raylm.batch.rows`.
        output: The file for the answers; its name tells the format. `<output>.ledger` beside it keeps what was
            answered so far. See `raylm.batch.outputs`.
        config: When to retry and when to give up.
        reading: How rows become requests.
        overwrite: Forget what earlier runs have answered.
        defaults: Generation parameters of rows that do not give their own.

    Returns:
        What it came to. Rows that failed are in the output, with their errors.

    Raises:
        InvalidRequestError: the input as a whole cannot be read, a parameter is wrong, or there is an output that is
            not from such a job.
        OutputBusyError: another process works on it.
        TooManyFailuresError: more rows failed than `max_failures`.
        OSError: a file cannot be read or written.
    """
    work = run_batch_async(
        chatbot._chatbot, source, output, config=config, reading=reading, overwrite=overwrite, **defaults
    )
    return chatbot._run(work)


async def run_batch_async(
    chatbot: AsyncChatbot,
    source: Source,
    output: Path | str | BinaryIO,
    *,
    config: BatchConfig | None = None,
    reading: Reading | None = None,
    overwrite: bool = False,
    shard: tuple[int, int] = (1, 1),
    settings: Mapping[str, Any] | None = None,
    total: int | None = None,
    begun: Callable[[Tally], None] | None = None,
    **defaults: Any,
) -> Tally:
    """Do as `run_batch` does.

    Args:
        chatbot: Who answers.
        source: As in `run_batch`; None is stdin.
        output: As in `run_batch`; or an open file, which gets each answer as soon as those before it are there.
        config: As in `run_batch`.
        reading: As in `run_batch`.
        overwrite: As in `run_batch`.
        shard: `(number, count)`: answer one of `count` parts of the rows into a ledger of its own, and write no output.
            `merge_shards` puts the parts together.
        settings: What to note in the ledger of how this job was begun, besides what it takes to ask rows again.
        total: How many rows there are, where that is known.
        begun: Called with the `Tally` as the job begins; it changes as the job goes on.
        defaults: As in `run_batch`.
    """
    reading = reading or Reading()
    chatbot.request(prompt="x", **defaults)  # wrong parameters are told before anything is touched
    rows = (
        read_rows(None if source is None else Path(source), reading)
        if source is None or isinstance(source, Path | str)
        else rows_of(source, reading)
    )
    first = await _first(rows)
    is_openai = bool(first) and first[-1].openai is not None
    with ExitStack() as stack:
        if isinstance(output, Path | str):
            path: Path | None = Path(output)
            ledger = stack.enter_context(open_ledger(Path(output), shard, overwrite=overwrite))
            file = None
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raylm-batch-"))
            path, file = None, output
            ledger = Ledger.open(Path(folder) / "ledger")
            stack.callback(ledger.close)
        ending = stack.enter_context(_noting_the_end(ledger))
        job = Job(
            chatbot,
            ledger,
            config,
            defaults=defaults,
            shard=shard,
            settings={**_noted(chatbot, source, path, reading, defaults), **(settings or {})},
            total=total,
            in_order=path is None or (path.exists() and not path.is_file()),
        )
        if begun is not None:
            begun(job.tally)
        writer: Writer = _Nowhere() if shard[1] > 1 else stack.enter_context(open_output(path, file, openai=is_openai))
        rows = _chained(first, rows)
        try:
            return await job.run(_all_openai(rows) if is_openai else rows, writer)
        finally:
            ending.num_rows, ending.digest = job.num_rows, job.digest


def ledger_path(output: Path, shard: tuple[int, int] = (1, 1)) -> Path:
    """Return where a job's answers are kept."""
    number, count = shard
    part = "" if count == 1 else f".shard-{number}-of-{count}"
    return output.with_name(f"{output.name}{part}.ledger")


@contextmanager
def open_ledger(output: Path, shard: tuple[int, int] = (1, 1), *, overwrite: bool = False) -> Iterator[Ledger]:
    """Open the ledger of an output, for as long as the block lasts.

    Args:
        output: The output.
        shard: Which part of the job.
        overwrite: Forget what it holds.

    Raises:
        InvalidRequestError: there is an output, or a part of one, without a ledger.
        OutputBusyError: another process works on it.
    """
    check_output(output, shard, overwrite=overwrite)
    path = ledger_path(output, shard)
    ledger = Ledger.open(path)
    try:
        if overwrite:
            ledger.clear()
        yield ledger
    finally:
        ledger.close()
        if not path.stat().st_size:
            path.unlink()


def check_output(output: Path, shard: tuple[int, int] = (1, 1), *, overwrite: bool = False) -> None:
    """Tell before anything is started whether an output can be written. Arguments are those of `open_ledger`.

    Raises:
        InvalidRequestError: there is an output, or a part of one, without a ledger; or no folder for it.
        OutputBusyError: another process works on it.
    """
    path = ledger_path(output, shard)
    if not output.parent.is_dir():
        raise InvalidRequestError(f"{output}: there is no folder {output.parent}")
    check_free(path)
    if path.exists() or overwrite or shard[1] > 1:
        return
    for taken in (output, partial_path(output)):
        if taken.is_file():
            raise InvalidRequestError(
                f"{taken} is there already, and from no job that could go on ({path.name} is missing); "
                "it is replaced only on request (--overwrite)"
            )


def merge_shards(output: Path, total: int | None = None, *, overwrite: bool = False) -> Tally:
    """Put the parts of a job that were answered as shards together, and write the output. Nothing is asked.

    Args:
        output: The output of the whole.
        total: How many rows the input has, where that is known; else as many as the shards have read.
        overwrite: Forget what an earlier merging has made.

    Returns:
        How many rows there are, and how many of them failed.

    Raises:
        InvalidRequestError: a shard, or a row of one, is missing; or one did not come to its end, or was answered for
            another input, or with other parameters, than the others. The text names it.
        OutputBusyError: another process works on the job or on a shard.
    """
    shards = sorted(output.parent.glob(f"{glob.escape(output.name)}.shard-*-of-*.ledger"))
    names = [re.fullmatch(r".*\.shard-(\d+)-of-(\d+)\.ledger", shard.name) for shard in shards]
    parts = {(int(name[1]), int(name[2])) for name in names if name}
    counts = {count for _, count in parts}
    if len(counts) != 1:
        found = ", ".join(shard.name for shard in shards) or "none"
        raise InvalidRequestError(
            f"merge: expected the ledgers of all shards of one job beside {output}, found {found}"
        )
    count = counts.pop()
    if missing := {(number, count) for number in range(1, count + 1)} - parts:
        text = ", ".join(f"{number}/{count}" for number, _ in sorted(missing))
        raise InvalidRequestError(f"merge: shard {text} of {output} is missing; answer it first (--shard)")
    tally = Tally()
    with open_ledger(output, overwrite=overwrite) as ledger:
        ends: list[tuple[str, Run | None, End | None]] = []
        for number in range(1, count + 1):
            with open_ledger(output, (number, count)) as part:
                ledger.absorb(part)  # also one that is refused then: the whole job asks what is missing
                ends.append((f"{number}/{count}", part.runs[-1] if part.runs else None, part.ended))
        merged = [_ended_part(*one) for one in ends]
        latest = max(merged, key=lambda part: part.run.started_at)
        total = latest.end.num_rows if total is None else total
        is_openai = False
        for place, record in enumerate(_first_records(ledger, total)):
            if record.position != place:
                raise InvalidRequestError(
                    f"merge: row {place + 1} is missing; answer shard {place % count + 1}/{count} to its end, or the "
                    "whole job without --shard, which asks what is missing"
                )
            is_openai |= record.openai is not None
            tally.num_rows += 1
            tally.num_failed += record.completion is None
            tally.num_kept += record.completion is not None
        tally.total = tally.num_rows if total is None else total
        if tally.num_rows != tally.total:
            others = [part.name for part in merged if part.end.num_rows != tally.total]
            others = others or [f"{tally.num_rows % count + 1}/{count}"]
            raise InvalidRequestError(
                f"merge: the input has {tally.total} rows, and {tally.num_rows} were answered; answer shard "
                f"{', '.join(others)} again (--shard), or the whole job without it, which asks what is missing"
            )
        if others := [part.name for part in merged if part.asked != latest.asked]:
            raise InvalidRequestError(
                f"merge: shard {', '.join(others)} was answered for another input, or with other parameters, than "
                f"shard {latest.name}, the latest; answer it again (--shard), which asks what has changed"
            )
        with open_output(output, openai=is_openai) as writer:
            records = _first_records(ledger, total)
            while some := list(islice(records, 512)):
                writer.write(some)
        if ledger.ended is None or ledger.ended.why or ledger.ended.num_rows != tally.total:
            ledger.end(num_rows=tally.total)
    return tally


class _Part(NamedTuple):
    """A shard that came to its end: its name, its last run, and how that ended."""

    name: str
    run: Run
    end: End

    @property
    def asked(self) -> tuple[Any, ...]:
        """What is the same in all shards of a job."""
        return self.run.job.get("defaults"), self.end.num_rows, self.end.digest


def _ended_part(name: str, run: Run | None, end: End | None) -> _Part:
    if run is None or end is None or end.why:
        why = "its process was killed" if end is None else end.why
        raise InvalidRequestError(
            f"merge: shard {name} did not come to its end ({why}); answer it to its end (--shard), or the whole job "
            "without --shard, which asks what is missing"
        )
    return _Part(name, run, end)


def _first_records(ledger: Ledger, total: int | None) -> Iterator[Record]:
    """Yield the records of the input's rows: an earlier and longer one may have left more."""
    return takewhile(lambda record: total is None or record.position < total, ledger.records())


def _noted(
    chatbot: AsyncChatbot, source: Source, output: Path | None, reading: Reading, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the ledger says of who is asked, and for what, so that rows can be asked again."""
    return {
        "target": chatbot.recipe(),
        "defaults": msgspec.to_builtins(chatbot.defaults.updated(defaults)),
        "source": str(Path(source).absolute()) if isinstance(source, Path | str) else None,
        "output": None if output is None else str(output.absolute()),
        "reading": dataclasses.asdict(reading),
    }


@contextmanager
def _noting_the_end(ledger: Ledger) -> Iterator[End]:
    """Have the ledger say how the run ends that begins in the block. It is finished when its output is in its place."""
    num_before = len(ledger.runs)
    ending = End(at=0.0, why="it was interrupted")
    try:
        yield ending
        ending.why = ""
    except Exception as error:
        ending.why = f"{type(error).__name__}: {first_line(error)}"
        raise
    finally:
        if len(ledger.runs) > num_before:
            ledger.end(ending.why, ending.num_rows, ending.digest)


class _Nowhere:
    """The output of a part of a job."""

    def write(self, records: object) -> None:
        pass

    def close(self) -> None:
        pass


async def _first(rows: AsyncIterator[Row | BadRow]) -> list[Row | BadRow]:
    """Return the first rows, up to the one whose form is told to be the file's."""
    first: list[Row | BadRow] = []
    async for row in rows:
        first.append(row)
        if isinstance(row, Row) or row.openai is not None or len(first) == _MOST_BAD:
            break
    return first


async def _chained(first: list[Row | BadRow], rest: AsyncIterator[Row | BadRow]) -> AsyncIterator[Row | BadRow]:
    for row in first:
        yield row
    async for row in rest:
        yield row


async def _all_openai(rows: AsyncIterator[Row | BadRow]) -> AsyncIterator[Row | BadRow]:
    async for row in rows:
        yield as_openai(row)


__all__ = [
    "BadRow",
    "BatchConfig",
    "Job",
    "Ledger",
    "Reading",
    "Record",
    "Row",
    "Tally",
    "check_output",
    "engine_key",
    "errors_path",
    "ledger_path",
    "merge_shards",
    "open_ledger",
    "run_batch",
    "run_batch_async",
]
