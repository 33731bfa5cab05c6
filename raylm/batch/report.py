"""Report: how a batch job went, told from its ledger alone, at any time and in bounded memory.

The records that count are the last of each position. Rows that share an equal row's answer count as answered and in
nothing else, because nothing was generated for them. A ledger that holds what several runs have answered tells of all
of them: time is the time in which some run was at work, and what lies between runs is left out.

`page.py` shows a report as an HTML page.
"""

from __future__ import annotations

import csv
import math
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Literal

import msgspec
from rich.table import Table
from rich.text import Text

from raylm.batch.ledger import Ledger, Record, Run, check_free
from raylm.batch.rows import Reading, count_rows
from raylm.errors import InvalidRequestError, OutputBusyError

_MOST_RUNS = 100
_MOST_EXAMPLES = 3
_MOST_CHARACTERS = 400
_MOST_BARS, _FEWEST_BARS = 40, 7
_MOST_STEPS = 120
_MIN_STEP_S = 0.1

_KEYS_A_DECADE = 1000
"""Values are told apart to a quarter of a percent; whole numbers up to 400 exactly."""

_MIN_VALUE, _MAX_VALUE = 1e-4, 1e12

_PREFERRED = (1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)
"""Ten steps of about the same ratio in each decade. Source: ISO 3, series R 10, rounded."""


Saying = Callable[[float], str]
"""Puts a value into words."""


class Distribution(msgspec.Struct, kw_only=True):
    """How large something was.

    Attributes:
        num: How many values there are. Without any, all else is 0 or empty.
        mean: Their mean.
        min: The least.
        p50: The median.
        p90: Nine of ten are not above it.
        p99: 99 of 100 are not above it.
        max: The greatest.
        edges: Limits of the histogram's bars, one more than there are bars.
        counts: How many values are from `edges[i]` on, and below `edges[i + 1]`.
    """

    num: int = 0
    mean: float = 0.0
    min: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0
    edges: list[float] = []
    counts: list[int] = []


class Throughput(msgspec.Struct, kw_only=True):
    """How many tokens were generated when. An answer's tokens are spread over the time that its actor had the row.

    Attributes:
        step_s: Seconds between two values.
        tokens_per_s: Mean of each step of the time in which some run was at work.
        runs_at_s: Where in that time the runs began.
    """

    step_s: float
    tokens_per_s: list[float]
    runs_at_s: list[float]


class Failure(msgspec.Struct, kw_only=True):
    """A row that failed.

    Attributes:
        id: Its name.
        position: Its place in the input, counted from 0.
        message: Its error, cut off where it is long.
    """

    id: str | int
    position: int
    message: str


class FailureType(msgspec.Struct, kw_only=True):
    """Rows that failed with the same type of error.

    Attributes:
        type: Class name from `raylm.errors`.
        rows: How many.
        examples: The first few.
    """

    type: str
    rows: int
    examples: list[Failure]


class EngineReport(msgspec.Struct, kw_only=True):
    """Who has answered.

    Attributes:
        engine: The engine's kind.
        version: The version of the library behind it.
        model: The model.
        fingerprint: As in `raylm.messages.EngineInfo`.
        rows: Rows with its answers.
    """

    engine: str
    version: str
    model: str
    fingerprint: str
    rows: int


class RunReport(msgspec.Struct, kw_only=True):
    """What one run has done of what counts. Of runs at the same time, such as shards, the last to begin has it all.

    Attributes:
        started_at: When it began, in seconds since 1970.
        seconds: From then to its last row.
        host: Where it ran.
        pid: Its process.
        rows: Rows that it ended.
        tokens: Tokens generated for them.
    """

    started_at: float
    seconds: float
    host: str
    pid: int
    rows: int
    tokens: int


class SlotReport(msgspec.Struct, kw_only=True):
    """What a slot has answered.

    Attributes:
        slot: Its number.
        node: Host name of its node.
        actors: How many actors were in it, one after the other.
        rows: Rows.
        tokens: Tokens generated.
        share: Its part of all tokens, 0 to 1.
    """

    slot: int
    node: str
    actors: int
    rows: int
    tokens: int
    share: float


class Report(msgspec.Struct, kw_only=True):
    """How a job went, so far.

    Attributes:
        output: Name of the output.
        made_at: When this was told, in seconds since 1970.
        state: `finished`: every row has ended and the output is whole. `at work`: a process has the job. `ended early`:
            none has, and the job is not finished; begun again, it goes on.
        why: Why it ended early.
        total: Rows of the input; None where they cannot be counted.
        rows: Rows that have ended.
        answered: Those that have an answer.
        failed: Those that have none.
        shared: Answered rows that got an equal row's answer.
        retried: Rows that the job sent more than once.
        moved: Answers that took more than one actor.
        hedged: Rows that were sent to a second slot because the first was slow.
        replaced: Records of rows that have a later one: they were asked again, or got another id.
        torn: Lines of the ledger that cannot be read.
        simulated: Answers of the simulated engine, which is a clock and no model.
        engines: Who has answered, the one with the most rows first.
        prompt_tokens: Tokens that were read.
        completion_tokens: Tokens that were generated.
        cached_tokens: Tokens that were read and that a prefix cache held.
        seconds: Time in which some run was at work.
        tokens_per_s: Generated tokens in that time.
        rows_per_s: Rows that ended in that time.
        num_runs: How many runs there were.
        runs: The last hundred of them.
        throughput: Tokens over time.
        latency_s: Of answers: from the first sending to the end, with queue and retries.
        queue_s: Of answers: the time in the pool's queue.
        prompt_lengths: Of answers: tokens of the prompt.
        answer_lengths: Of answers: tokens generated.
        finish_reasons: Why answers ended.
        failures: Errors, the most frequent type first.
        slots: Who has answered how much.
    """

    output: str
    made_at: float
    state: Literal["finished", "at work", "ended early"]
    why: str
    total: int | None
    rows: int
    answered: int
    failed: int
    shared: int
    retried: int
    moved: int
    hedged: int
    replaced: int
    torn: int
    simulated: int
    engines: list[EngineReport]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seconds: float
    tokens_per_s: float
    rows_per_s: float
    num_runs: int
    runs: list[RunReport]
    throughput: Throughput
    latency_s: Distribution
    queue_s: Distribution
    prompt_lengths: Distribution
    answer_lengths: Distribution
    finish_reasons: dict[str, int]
    failures: list[FailureType]
    slots: list[SlotReport]


def read_report(ledger: Path) -> Report:
    """Return the report of a job, also of one that is at work: of what was in its ledger a moment ago.

    Args:
        ledger: The ledger's file (see `raylm.batch.ledger_path`).

    Raises:
        InvalidRequestError: there is none.
        OSError: it cannot be read.
    """
    opened = view_ledger(ledger)
    try:
        total = _count_rows(ledger, opened.runs)
        figures = _Figures(opened.runs)
        for record in opened.records():
            if total is None or record.position < total[0]:  # else the input has become shorter
                figures.add(record)
        report = figures.report(ledger.name.removesuffix(".ledger"), None if total is None else total[1])
        report.replaced, report.torn = opened.num_replaced, opened.num_torn
        report.state, report.why = _state(opened)
    finally:
        opened.close()
    return report


def write_report(ledger: Path, report: Report) -> tuple[Path, Path]:
    """Write `OUT.report.json` and `OUT.report.html` beside a job's `OUT.ledger`; return where they are."""
    from raylm.batch.page import to_html

    paths = []
    for suffix, content in (("json", msgspec.json.format(msgspec.json.encode(report))), ("html", to_html(report))):
        path = ledger.with_name(f"{ledger.name.removesuffix('.ledger')}.report.{suffix}")
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(content)
        partial.replace(path)
        paths.append(path)
    return paths[0], paths[1]


def view_ledger(path: Path) -> Ledger:
    """Open a ledger for reading.

    Raises:
        InvalidRequestError: there is none.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise InvalidRequestError(
            f"there is no {path}; give the output (-o) of a job that has begun, and whose ledger is still beside it"
        )
    return Ledger.view(path)


def source_of(run: Run) -> tuple[Path, Reading] | None:
    """Return the file that a run has read its rows from, and how, if it was a file."""
    source, reading = run.job.get("source"), run.job.get("reading")
    if source is None or reading is None or not Path(source).is_file():
        return None
    return Path(source), Reading(**reading)


def _state(ledger: Ledger) -> tuple[Literal["finished", "at work", "ended early"], str]:
    if ledger.ended is not None:
        return ("ended early", ledger.ended.why) if ledger.ended.why else ("finished", "")
    try:
        check_free(ledger.path)
    except OutputBusyError:
        return "at work", ""
    return "ended early", "its process is gone and has not said why, as one that is killed"


def _count_rows(ledger: Path, runs: list[Run]) -> tuple[int, int] | None:
    """Return how many rows the input has, and how many of them belong to this ledger, where that can be told."""
    found = source_of(runs[-1]) if runs else None
    if found is None:
        return None
    try:
        total = count_rows(*found)
    except (InvalidRequestError, OSError, csv.Error):
        return None  # it is no more what it was when it was read; what was answered can be told all the same
    shard = re.fullmatch(r".*\.shard-(\d+)-of-(\d+)\.ledger", ledger.name)
    return total, total if shard is None else len(range(int(shard[1]) - 1, total, int(shard[2])))


class _Figures:
    """What becomes a report, one record after the other."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = [_RunFigures(run) for run in sorted(runs, key=lambda run: run.started_at)]
        if not self._runs:  # their lines are torn; all that is lost is the time
            self._runs = [_RunFigures(Run(started_at=math.inf, pid=0, host="", job={}))]
        self._starts = [figures.run.started_at for figures in self._runs]
        self._counts: Counter[str] = Counter()
        self._engines: Counter[tuple[str, str, str, str]] = Counter()
        self._reasons: Counter[str] = Counter()
        self._failures: dict[str, FailureType] = {}
        self._slots: dict[tuple[int, str], _SlotFigures] = {}
        self._latency, self._queue = Histogram(), Histogram()
        self._prompts, self._answers = Histogram(whole=True), Histogram(whole=True)

    def add(self, record: Record) -> None:
        counts, completion, error = self._counts, record.completion, record.error
        run = self._runs[max(0, bisect_right(self._starts, record.at) - 1)]
        at_s = max(0.0, record.at - run.run.started_at)
        run.rows += 1
        run.seconds = max(run.seconds, at_s)
        counts["rows"] += 1
        is_shared = record.same_as is not None
        if error is not None:
            counts["failed"] += 1
            self._add_failure(error.type, record, error.message)
        if not is_shared:
            counts["retried"] += record.tries > 1
            counts["hedged"] += record.hedged
        if completion is None:
            return
        counts["answered"] += 1
        receipt, usage = completion.receipt, completion.usage
        counts["simulated"] += receipt.engine == "simulated"
        self._engines[receipt.engine, receipt.engine_version, receipt.model, receipt.fingerprint] += 1
        self._reasons[completion.finish_reason] += 1
        if is_shared:
            counts["shared"] += 1
            return
        counts["moved"] += receipt.attempts > 1
        counts["prompt_tokens"] += usage.prompt_tokens
        counts["completion_tokens"] += usage.completion_tokens
        counts["cached_tokens"] += usage.cached_tokens or 0
        queue_s = receipt.queue_ms / 1000
        self._latency.add(record.seconds)
        self._queue.add(queue_s)
        self._prompts.add(usage.prompt_tokens)
        self._answers.add(usage.completion_tokens)
        run.tokens += usage.completion_tokens
        run.series.add(at_s - max(0.0, record.seconds - queue_s), at_s, usage.completion_tokens)
        slot = self._slots.setdefault((receipt.slot, receipt.node), _SlotFigures())
        slot.rows += 1
        slot.tokens += usage.completion_tokens
        slot.actors.add(receipt.actor)

    def _add_failure(self, kind: str, record: Record, message: str) -> None:
        found = self._failures.setdefault(kind, FailureType(type=kind, rows=0, examples=[]))
        found.rows += 1
        if len(found.examples) < _MOST_EXAMPLES:
            if len(message) > _MOST_CHARACTERS:
                message = message[:_MOST_CHARACTERS] + " ..."
            found.examples.append(Failure(id=record.id, position=record.position, message=message))

    def report(self, output: str, total: int | None) -> Report:
        counts = self._counts
        seconds = sum(figures.seconds for figures in self._runs)
        runs = [figures.report() for figures in self._runs if figures.run.started_at < math.inf]
        slots = [
            SlotReport(
                slot=slot,
                node=node,
                actors=len(figures.actors),
                rows=figures.rows,
                tokens=figures.tokens,
                share=figures.tokens / max(1, counts["completion_tokens"]),
            )
            for (slot, node), figures in sorted(self._slots.items())
        ]
        return Report(
            output=output,
            made_at=time.time(),
            state="at work",
            why="",
            total=total,
            rows=counts["rows"],
            answered=counts["answered"],
            failed=counts["failed"],
            shared=counts["shared"],
            retried=counts["retried"],
            moved=counts["moved"],
            hedged=counts["hedged"],
            replaced=0,
            torn=0,
            simulated=counts["simulated"],
            engines=[
                EngineReport(engine=engine, version=version, model=model, fingerprint=fingerprint, rows=rows)
                for (engine, version, model, fingerprint), rows in self._engines.most_common()
            ],
            prompt_tokens=counts["prompt_tokens"],
            completion_tokens=counts["completion_tokens"],
            cached_tokens=counts["cached_tokens"],
            seconds=seconds,
            tokens_per_s=counts["completion_tokens"] / seconds if seconds else 0.0,
            rows_per_s=counts["rows"] / seconds if seconds else 0.0,
            num_runs=len(runs),
            runs=runs[-_MOST_RUNS:],
            throughput=_throughput(self._runs),
            latency_s=self._latency.distribution(),
            queue_s=self._queue.distribution(),
            prompt_lengths=self._prompts.distribution(),
            answer_lengths=self._answers.distribution(),
            finish_reasons=dict(self._reasons.most_common()),
            failures=sorted(self._failures.values(), key=lambda failure: -failure.rows),
            slots=slots,
        )


class _RunFigures:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.seconds = 0.0
        self.rows = 0
        self.tokens = 0
        self.series = Series()

    def report(self) -> RunReport:
        run = self.run
        return RunReport(
            started_at=run.started_at,
            seconds=self.seconds,
            host=run.host,
            pid=run.pid,
            rows=self.rows,
            tokens=self.tokens,
        )


class _SlotFigures:
    def __init__(self) -> None:
        self.rows = 0
        self.tokens = 0
        self.actors: set[str] = set()


class Histogram:
    """How often which value was there, to a quarter of a percent, in memory that does not grow with their number.

    Args:
        whole: They are whole numbers.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole
        self._counts: Counter[int | None] = Counter()  # by log10 in thousandths; None is 0
        self._sum = 0.0
        self._min, self._max = math.inf, 0.0

    def add(self, value: float) -> None:
        """Add a value, not below 0. One below a ten-thousandth counts as 0."""
        value = value if value >= _MIN_VALUE else 0.0
        key = None if not value else math.floor(math.log10(min(value, _MAX_VALUE)) * _KEYS_A_DECADE)
        self._counts[key] += 1
        self._sum += value
        self._min = min(self._min, value)
        self._max = max(self._max, value)

    def distribution(self) -> Distribution:
        """Return what was added."""
        if not self._counts:
            return Distribution()
        values = sorted((self._value(key), count) for key, count in self._counts.items())
        ends = list(accumulate(count for _, count in values))
        num = ends[-1]
        p50, p90, p99 = (
            values[next(index for index, end in enumerate(ends) if end >= share * num)][0] for share in (0.5, 0.9, 0.99)
        )
        edges = bar_edges(
            self._min, self._max, p50, next((value for value, _ in values if value), 1.0), whole=self._whole
        )
        counts = [0] * (len(edges) - 1)
        for value, count in values:
            counts[min(max(bisect_right(edges, value) - 1, 0), len(counts) - 1)] += count
        return Distribution(
            num=num,
            mean=self._sum / num,
            min=self._min,
            p50=p50,
            p90=p90,
            p99=p99,
            max=self._max,
            edges=edges,
            counts=counts,
        )

    def _value(self, key: int | None) -> float:
        value = 0.0 if key is None else 10 ** ((key + 0.5) / _KEYS_A_DECADE)
        return min(max(round(value) if self._whole else value, self._min), self._max)


def bar_edges(low: float, high: float, median: float, least: float, *, whole: bool) -> list[float]:
    """Return the limits of a histogram's bars, which are round numbers.

    Bars have the same width, or where values have a long tail, the same ratio of their limits.

    Args:
        low: The least value.
        high: The greatest one.
        median: The median.
        least: The least value above 0.
        whole: Values are whole numbers.
    """
    if high <= 20 * median:
        step = _round_up((high - low) / (_MOST_BARS - 2) or (1.0 if whole else high / 10 or _MIN_VALUE))
        step = max(step, 1.0) if whole else step
        first, last = math.floor(low / step), math.floor(high / step) + 1
        while last - first < _FEWEST_BARS:  # so that one value is no wall
            first, last = max(0, first - 1), last + 1
        return [float(f"{place * step:.12g}") for place in range(first, last + 1)]
    first = math.floor(math.log10(least) * 10) - 1
    last = math.floor(math.log10(high) * 10) + 2
    stride = 1 if last - first <= 1.5 * _MOST_BARS else 2
    first -= first % stride
    edges = [0.0] if low < _MIN_VALUE else []
    for place in range(first, last + stride, stride):
        edge = float(f"{_PREFERRED[place % 10] * 10.0 ** (place // 10):.12g}")
        edge = float(math.ceil(edge)) if whole else edge
        if not edges or edge > edges[-1]:
            edges.append(edge)
    while len(edges) > 2 and edges[-2] > high:
        edges.pop()
    while len(edges) > 2 and edges[1] <= low:
        edges.pop(0)
    return edges


def _round_up(value: float) -> float:
    """Return the next of 1, 2 and 5, times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return float(f"{next(power * digit for digit in (1, 2, 5, 10) if power * digit >= value * (1 - 1e-9)):.12g}")


class Series:
    """An amount over time, in memory that does not grow with time.

    Attributes:
        step_s: Seconds of each part. It doubles whenever parts run out.
    """

    _MOST = 512

    def __init__(self) -> None:
        self.step_s = 1 / 64
        # What falls into part i is `_once[i]`, and the sum of `_slopes` up to i: a rate that goes on from there.
        self._once = [0.0]
        self._slopes = [0.0]

    def add(self, begin_s: float, end_s: float, amount: float) -> None:
        """Spread an amount evenly over a time. What is before 0 counts as at 0."""
        begin_s, end_s = max(begin_s, 0.0), max(end_s, 0.0)
        while end_s >= self.step_s * (self._MOST - 1):
            self._halve()
        step_s = self.step_s
        first, last = int(begin_s / step_s), int(end_s / step_s)
        if (missing := last + 2 - len(self._once)) > 0:
            self._once += [0.0] * missing
            self._slopes += [0.0] * missing
        if first == last:
            self._once[first] += amount
            return
        rate = amount / (end_s - begin_s)
        self._once[first] += rate * ((first + 1) * step_s - begin_s)
        self._slopes[first + 1] += rate * step_s
        self._once[last] += rate * (end_s - (last + 1) * step_s)
        self._slopes[last + 1] -= rate * step_s

    def parts(self) -> list[float]:
        """Return the amount of each part."""
        return [max(0.0, once + going) for once, going in zip(self._once, accumulate(self._slopes), strict=True)]

    def _halve(self) -> None:
        once, slopes = self._once, self._slopes
        if len(once) % 2:
            once.append(0.0)
            slopes.append(0.0)
        self.step_s *= 2
        # A rate that begins in the second of two parts is in one of them only, and then goes on for two at a time.
        self._once = [
            first + second - slope for first, second, slope in zip(once[::2], once[1::2], slopes[1::2], strict=True)
        ]
        self._slopes = [2 * (first + second) for first, second in zip(slopes[::2], slopes[1::2], strict=True)]


def _throughput(runs: list[_RunFigures]) -> Throughput:
    """Return the runs' series one after the other, without what lies between them."""
    seconds = sum(figures.seconds for figures in runs)
    num_steps = min(_MOST_STEPS, max(1, int(seconds / _MIN_STEP_S)))
    step_s = seconds / num_steps
    at_s, starts, sums = 0.0, [], [0.0] * num_steps
    for figures in runs:
        if not figures.seconds:
            continue
        starts.append(at_s)
        part_s = figures.series.step_s
        for index, amount in enumerate(figures.series.parts()):
            begin = min(index * part_s, figures.seconds)
            end = min(begin + part_s, figures.seconds)
            _spread(sums, (at_s + begin) / step_s, (at_s + end) / step_s, amount)
        at_s += figures.seconds
    return Throughput(
        step_s=step_s, tokens_per_s=[amount / step_s if step_s else 0.0 for amount in sums], runs_at_s=starts
    )


def _spread(sums: list[float], begin: float, end: float, amount: float) -> None:
    """Add an amount to the parts of a list that a stretch of it covers."""
    first, last = min(int(begin), len(sums) - 1), min(int(end), len(sums) - 1)
    if first == last:
        sums[first] += amount
        return
    for index in range(first, last + 1):
        sums[index] += amount * (min(end, index + 1) - max(begin, index)) / (end - begin)


# In words


def to_table(report: Report) -> Table:
    """Return a report for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify, table.title_style = printable(report.output), "left", "bold"
    for name, value in _facts(report):
        table.add_row(Text(name), Text(value))
    return table


def _facts(report: Report) -> list[tuple[str, str]]:
    of_total = "" if report.total is None or report.total == report.rows else f" of {report.total:,}"
    facts = [("not finished", printable(state_words(report)))] if report.state != "finished" else []
    facts += [("rows", f"{report.rows:,}{of_total}, {report.answered:,} answered, {report.failed:,} failed")]
    told = [f"{report.shared:,} the same as another"] if report.shared else []
    told += aside(report)
    if told:
        facts.append(("of them", ", ".join(told)))
    facts += [
        (failure.type, f"{failure.rows:,}, as {failure.examples[0].id!r}: {printable(failure.examples[0].message)}")
        for failure in report.failures
    ]
    cached = f", {report.cached_tokens:,} of them cached" if report.cached_tokens else ""
    facts += [
        ("tokens", f"{report.completion_tokens:,} generated, {report.prompt_tokens:,} read{cached}"),
        ("time", f"{duration(report.seconds)} in {plural(report.num_runs, 'run')}"),
        ("rate", f"{report.tokens_per_s:,.0f} tokens/s, {report.rows_per_s:,.1f} rows/s"),
    ]
    if report.latency_s.num:
        facts += [
            ("latency", percentiles(report.latency_s, span)),
            ("queue", percentiles(report.queue_s, span)),
            ("prompts", f"{percentiles(report.prompt_lengths, number)} tokens"),
            ("answers", f"{percentiles(report.answer_lengths, number)} tokens"),
        ]
    if report.finish_reasons:
        facts.append(("ended by", shares(report.finish_reasons)))
    facts += [("engine", f"{printable(engine_words(engine))}: {engine.rows:,} rows") for engine in report.engines]
    if report.simulated:
        facts.append(("", "the simulated engine is a clock: its figures are of no model"))
    for slot in report.slots:
        more = f", {slot.actors} actors" if slot.actors > 1 else ""
        facts.append(
            (
                f"slot {slot.slot}",
                f"{printable(slot.node)}: {slot.rows:,} rows, {slot.tokens:,} tokens ({slot.share:.0%}){more}",
            )
        )
    return facts


def state_words(report: Report) -> str:
    """Return what is to be told of a job that is not finished."""
    if report.state == "at work":
        return "a process is at work on it"
    return f"it ended early: {report.why}; begun again, it goes on from there"


def aside(report: Report) -> list[str]:
    """Return what is to be told of rows besides what became of them; nothing where there is nothing."""
    counts = {
        "retried": report.retried,
        "moved to another actor": report.moved,
        "sent to two": report.hedged,
        "with a later record": report.replaced,
        "torn lines": report.torn,
    }
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def engine_words(found: EngineReport) -> str:
    """Return an engine's name in words."""
    return f"{found.model} on {found.engine} {found.version}".strip()


def percentiles(found: Distribution, said: Saying) -> str:
    """Return median, percentiles and the greatest value in words."""
    return f"p50 {said(found.p50)}, p90 {said(found.p90)}, p99 {said(found.p99)}, max {said(found.max)}"


def shares(counts: Mapping[str, int]) -> str:
    """Return counts with their shares in words."""
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name} {count:,} ({count / total:.1%})" for name, count in counts.items())


def number(value: float) -> str:
    """Return a number to three digits, or as it is where it is whole."""
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def span(seconds: float) -> str:
    """Return a time to three digits, in the unit that fits."""
    if seconds >= 100:
        return duration(seconds)
    if seconds >= 1 or not seconds:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms"


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds, or in seconds where it is short."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def moment(at: float) -> str:
    """Return a time of day here."""
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")


def plural(count: int, noun: str) -> str:
    """Return how many of something."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def printable(text: object) -> str:
    """Return a text with what is no character on a page or a terminal spelled out, on one line."""
    found = str(text)
    if found.isprintable():
        return found
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in found)
