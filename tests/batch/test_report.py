"""Reports: figures that a ledger's records add up to, and the page that shows them."""

import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from playwright.async_api import Browser, Page

from raylm.batch import ledger_path
from raylm.batch.ledger import Ledger, Record, Run
from raylm.batch.page import to_html
from raylm.batch.report import Histogram, Report, Series, number, printable, read_report, span, write_report
from raylm.errors import ErrorMessage, InvalidRequestError
from raylm.messages import Usage
from tests.batch.samples import COMPLETION, RECEIPT
from tests.chromium import chromium

RESULTS = Path(__file__).parents[2] / "results"
"""Where screenshots are kept."""

EVIL = "<img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"


def record(position: int, at: float = 101.0, **fields: Any) -> Record:
    """Return the record of a row that was answered with 3 tokens, 1 s after its sending, half of it in the queue."""
    usage = Usage(prompt_tokens=2, completion_tokens=fields.pop("tokens", 3))
    receipt = {"usage": usage, "queue_ms": 500.0, **fields.pop("receipt", {})}
    completion = msgspec.structs.replace(
        COMPLETION, usage=usage, receipt=msgspec.structs.replace(RECEIPT, **receipt), text="text"
    )
    defaults = {"key": f"{position}", "id": position + 1, "seconds": 1.0, "greedy": True, "completion": completion}
    return Record(position=position, at=at, **{**defaults, **fields})


def failed(position: int, message: str = "wrong", kind: str = "EngineError", **fields: Any) -> Record:
    """Return the record of a row that failed."""
    return record(position, completion=None, error=ErrorMessage(kind, message), **fields)


@contextmanager
def written(path: Path, *starts: float, job: dict[str, Any] | None = None) -> Iterator[Ledger]:
    """Open the ledger of an output, with a run for each start, for records to be added."""
    ledger = Ledger.open(ledger_path(path))
    try:
        for start in starts:
            run = Run(started_at=start, pid=7, host="here", job=job or {})
            ledger.runs.append(run)
            ledger._push(msgspec.json.encode({"run": run}))
        yield ledger
        ledger.sync()
    finally:
        ledger.close()


def reported(path: Path, *records: Record, starts: tuple[float, ...] = (100.0,), **run: Any) -> Report:
    """Return the report of a ledger with these records."""
    with written(path, *starts, **run) as ledger:
        for one in records:
            ledger.add(one)
    return read_report(ledger_path(path))


def test_rows_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    """Answered, failed, shared, retried, moved and hedged rows, and records that later ones have replaced."""
    report = reported(
        tmp_path / "out",
        record(0),
        record(0, tries=2),
        record(1, hedged=True),
        record(2, same_as=1, hedged=True),
        record(3, receipt={"attempts": 2}),
        failed(4),
    )
    assert (report.rows, report.answered, report.failed, report.shared) == (5, 4, 1, 1)
    assert (report.retried, report.hedged, report.moved, report.replaced) == (1, 1, 1, 1)
    assert (report.output, report.total, report.torn) == ("out", None, 0)


def test_a_shared_answer_was_generated_once(tmp_path: Path) -> None:
    """Tokens, latencies, lengths and slots leave out rows that got another's answer."""
    report = reported(tmp_path / "out", record(0), record(1, same_as=0), record(2, same_as=0))
    assert (report.prompt_tokens, report.completion_tokens) == (2, 3)
    assert report.latency_s.num == report.queue_s.num == report.answer_lengths.num == report.prompt_lengths.num == 1
    assert [(slot.slot, slot.node, slot.rows, slot.tokens, slot.share) for slot in report.slots] == [
        (1, "here", 1, 3, 1.0)
    ]
    assert report.finish_reasons == {"stop": 3}


def test_failures_are_told_by_type(tmp_path: Path) -> None:
    """The most frequent type comes first, with its first few rows."""
    rows = [failed(0, "a", "RequestTimeoutError"), *(failed(place, f"wrong {place}") for place in range(1, 6))]
    report = reported(tmp_path / "out", *rows)
    assert [(failure.type, failure.rows) for failure in report.failures] == [
        ("EngineError", 5),
        ("RequestTimeoutError", 1),
    ]
    assert [(one.id, one.position, one.message) for one in report.failures[0].examples] == [
        (2, 1, "wrong 1"),
        (3, 2, "wrong 2"),
        (4, 3, "wrong 3"),
    ]


def test_time_between_runs_is_left_out(tmp_path: Path) -> None:
    """Time is that of runs at work: from the start of each to the last row that counts."""
    report = reported(
        tmp_path / "out", record(0, 102.0), record(1, 110.0), record(2, 1_005.0), starts=(100.0, 1_000.0, 5_000.0)
    )
    assert [(run.seconds, run.rows, run.tokens) for run in report.runs] == [(10.0, 2, 6), (5.0, 1, 3), (0.0, 0, 0)]
    assert (report.num_runs, report.seconds, report.runs[0].pid, report.runs[0].host) == (3, 15.0, 7, "here")
    assert report.tokens_per_s == 9 / 15
    assert report.throughput.runs_at_s == [0.0, 10.0]


def test_tokens_are_where_they_were_generated(tmp_path: Path) -> None:
    """An answer's tokens are spread over the time after the queue."""
    report = reported(tmp_path / "out", record(0, 110.0, tokens=100, seconds=9.0, receipt={"queue_ms": 4000.0}))
    rates = report.throughput.tokens_per_s
    assert report.throughput.step_s == pytest.approx(0.1)
    assert rates[:50] == [0] * 50
    assert rates[50:] == pytest.approx([20] * 50, rel=0.05)


def test_the_rest_of_the_input_is_told(tmp_path: Path) -> None:
    """Where the input is a file, the report knows how many rows there are, and leaves out those that are gone."""
    source = tmp_path / "in"
    source.write_text('{"prompt": "a"}\n' * 4)
    job = {"source": str(source), "reading": {}}
    report = reported(tmp_path / "out", record(0), record(1), record(7), job=job)
    assert (report.rows, report.total) == (2, 4)
    report = reported(tmp_path / "out.shard-2-of-3", record(1), job=job)
    assert (report.rows, report.total) == (1, 1)
    source.unlink()
    assert read_report(ledger_path(tmp_path / "out")).total is None


def test_a_simulated_answer_is_called_so(tmp_path: Path) -> None:
    """The report and its page say which answers are of the clock, and that it is none of a model."""
    report = reported(tmp_path / "out", record(0), record(1, receipt={"engine": "openvino", "model": "m2"}))
    assert report.simulated == 1
    assert {engine.model: engine.rows for engine in report.engines} == {"m": 1, "m2": 1}
    assert "Simulated engine." in to_html(report).decode()
    other = reported(tmp_path / "other", record(0, receipt={"engine": "openvino"}))
    assert other.simulated == 0
    assert "Simulated engine." not in to_html(other).decode()


def test_a_job_at_work_has_a_report(tmp_path: Path) -> None:
    """A report needs no lock, writes nothing to the ledger, and passes over the line that is being written."""
    path = ledger_path(tmp_path / "out")
    with written(tmp_path / "out", 100.0) as ledger:
        ledger.add(record(0))
        ledger.sync()
        before = path.read_bytes()
        with path.open("ab") as file:
            file.write(b'{"position":1,')
        report = read_report(path)
        assert (report.rows, report.torn) == (1, 0)
        assert path.read_bytes() == before + b'{"position":1,'
        os.truncate(path, len(before))


def test_a_job_that_is_not_finished_says_so(tmp_path: Path) -> None:
    """The state is that of the last run: at work, cut off, ended early for a reason, or finished."""
    path = ledger_path(tmp_path / "out")
    with written(tmp_path / "out", 100.0) as ledger:
        ledger.add(record(0))
        ledger.sync()
        assert read_report(path).state == "at work"
    cut_off = read_report(path)
    assert (cut_off.state, cut_off.why.partition(" and")[0]) == ("ended early", "its process is gone")
    for why, state in ((EVIL, "ended early"), ("", "finished")):
        with written(tmp_path / "out", 200.0) as ledger:
            ledger.end(why)
        report = read_report(path)
        assert (report.state, report.why) == (state, why)
        assert ("Not finished:" in to_html(report).decode()) == (state != "finished")
        assert EVIL not in to_html(report).decode()


def test_a_torn_line_is_told(tmp_path: Path) -> None:
    """What a crash has torn in the middle is counted."""
    path = ledger_path(tmp_path / "out")
    reported(tmp_path / "out", record(0))
    with path.open("ab") as file:
        file.write(b'{"position":1,\n')
    assert read_report(path).torn == 1


def test_no_ledger_is_wrong_use(tmp_path: Path) -> None:
    """Without a ledger there is nothing to tell, and none is made."""
    with pytest.raises(InvalidRequestError, match=r"there is no .*out\.ledger"):
        read_report(ledger_path(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    """The JSON file holds the whole report, and the page is beside it."""
    report = reported(tmp_path / "out.jsonl", record(0), failed(1))
    data, page = write_report(ledger_path(tmp_path / "out.jsonl"), report)
    assert (data.name, page.name) == ("out.jsonl.report.json", "out.jsonl.report.html")
    assert msgspec.json.decode(data.read_bytes(), type=Report) == report
    assert page.read_bytes() == to_html(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl.ledger", page.name, data.name]


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    """Twenty times as many rows take no more than a few megabytes more."""
    code = """
import resource, sys
from pathlib import Path
from raylm.batch.page import to_html
from raylm.batch.report import read_report
for name in sys.argv[1:]:
    to_html(read_report(Path(name)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    paths = []
    for num_rows in (2_000, 40_000):
        with written(tmp_path / f"{num_rows}", 100.0) as ledger:
            for place in range(num_rows):
                ledger.add(record(place, 100.0 + place / 7, seconds=0.01 + place % 977, tokens=1 + place % 3331))
                if ledger.num_pending > 1000:
                    ledger.sync()
        paths.append(str(ledger_path(tmp_path / f"{num_rows}")))
    told = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    small, large = map(int, told.split())
    assert large - small < 12


# Invariants

VALUES = st.one_of(st.floats(0, 1e6), st.floats(0, 10), st.just(0.0), st.floats(1e-3, 2e-3))


@given(values=st.lists(VALUES, min_size=1, max_size=60))
def test_a_histogram_loses_nothing(values: list[float]) -> None:
    """Bars sum up to the number of values, cover all of them, and percentiles are right to half a percent."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    check(histogram, values, lambda exact: max(exact * 0.005, 1e-4))


@given(values=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 10**6)), min_size=1, max_size=60))
def test_a_histogram_of_whole_numbers_is_of_whole_numbers(values: list[int]) -> None:
    """Below 400 percentiles and bars are exact, and limits of bars are whole numbers."""
    histogram = Histogram(whole=True)
    for value in values:
        histogram.add(value)
    check(histogram, values, lambda exact: 0 if exact < 400 else exact * 0.005)
    found = histogram.distribution()
    assert all(edge == int(edge) for edge in found.edges)
    if max(values) < 400:
        ranges = zip(found.edges, found.edges[1:], strict=False)
        assert found.counts == [sum(low <= value < high for value in values) for low, high in ranges]


def check(histogram: Histogram, values: list[Any], allowed: Any) -> None:
    """Hold a histogram to its values."""
    found = histogram.distribution()
    values = [value if value >= 1e-4 else 0 for value in values]
    assert sum(found.counts) == found.num == len(values)
    assert len(found.edges) == len(found.counts) + 1 <= 100
    assert found.edges == sorted(set(found.edges))
    assert found.edges[0] <= min(values)
    assert found.edges[-1] > max(values)
    assert (found.min, found.max, found.mean) == (min(values), max(values), pytest.approx(sum(values) / len(values)))
    for share, told in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        exact = sorted(values)[math.ceil(share * len(values)) - 1]
        assert abs(told - exact) <= allowed(exact)


SPANS = st.tuples(st.floats(0, 1e5), st.floats(0, 1e4), st.integers(0, 10**4))


@given(spans=st.lists(SPANS, max_size=40))
def test_a_series_loses_nothing(spans: list[tuple[float, float, int]]) -> None:
    """What was spread over time is there in all, and up to each moment, also when parts were put together."""
    series = Series()
    for begin, length, amount in spans:
        series.add(begin, begin + length, amount)
    parts = series.parts()
    total = sum(amount for _, _, amount in spans)
    assert len(parts) <= 514
    assert sum(parts) == pytest.approx(total, rel=1e-6, abs=1e-6)
    for place in range(0, len(parts), 50):
        moment = place * series.step_s
        before = sum(
            amount * min(max((moment - begin) / length, 0.0), 1.0) if length else amount * (begin < moment)
            for begin, length, amount in spans
        )
        # A time that lies in one part counts at any place in it.
        assert sum(parts[:place]) == pytest.approx(before, rel=1e-6, abs=1e-6 * total + within(spans, moment, series))


def within(spans: list[tuple[float, float, int]], moment: float, series: Series) -> float:
    """Return the amount that may be on either side of a moment, for it was spread over less than a part around it."""
    near = series.step_s
    return sum(
        amount for begin, length, amount in spans if length <= near and begin - near <= moment <= begin + length + near
    )


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["answered", "shared", "failed"]),
            st.floats(90, 5_000),
            st.integers(1, 900),
            st.floats(0, 50),
        ),
        max_size=25,
    ),
    starts=st.lists(st.floats(100, 5_000), max_size=4),
)
def test_figures_add_up(
    rows: list[tuple[str, float, int, float]], starts: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows, tokens and throughput are the same in all, by run, by slot and over time; and every ledger has a page."""
    records = [
        failed(place, at=at)
        if kind == "failed"
        else record(place, at, tokens=tokens, seconds=seconds, same_as=0 if kind == "shared" else None)
        for place, (kind, at, tokens, seconds) in enumerate(rows)
    ]
    report = reported(tmp_path_factory.mktemp("report") / "out", *records, starts=tuple(starts))
    asked = [tokens for kind, _, tokens, _ in rows if kind == "answered"]
    assert report.rows == len(rows) == report.answered + report.failed
    assert report.completion_tokens == sum(asked) == sum(slot.tokens for slot in report.slots)
    assert (
        report.latency_s.num
        == len(asked)
        == sum(report.answer_lengths.counts)
        == sum(slot.rows for slot in report.slots)
    )
    if starts:
        assert sum(run.rows for run in report.runs) == len(rows)
        assert sum(run.tokens for run in report.runs) == sum(asked)
        assert report.seconds == pytest.approx(sum(run.seconds for run in report.runs))
        lost = sum(run.tokens for run in report.runs if not run.seconds)
        spread = sum(report.throughput.tokens_per_s) * report.throughput.step_s
        assert spread == pytest.approx(sum(asked) - lost, rel=1e-6, abs=1e-3)
    assert to_html(report).startswith(b"<!doctype html>")


@given(text=st.text())
def test_what_is_shown_is_one_line_of_characters(text: str) -> None:
    """Neither a terminal nor a page gets control characters, line ends or halves of characters."""
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.0123, "12.3 ms"),
        (2.345, "2.35 s"),
        (150, "2 min 30 s"),
        (7300, "2 h 01 min"),
    ],
)
def test_times_are_told_in_the_unit_that_fits(seconds: float, said: str) -> None:
    """Three digits, and the unit in which they are readable."""
    assert span(seconds) == said


def test_numbers_are_told_to_three_digits() -> None:
    """Large and whole numbers are whole."""
    assert [number(value) for value in (0, 0.12345, 7, 7.25, 1234.5)] == ["0", "0.123", "7", "7.25", "1,234"]


# The page, in a real browser


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[Browser]:
    """The browser of these tests."""
    async with chromium() as browser:
        yield browser


def hostile(path: Path) -> Path:
    """Write the page of a job of two runs whose every text tries to be markup; return where it is."""
    records = [
        record(
            place,
            100.5 + place / 20 + (900 if place > 60 else 0),
            tokens=5 + place * 7 % 50,
            seconds=0.2 + place % 9 / 10,
            receipt={"slot": place % 3, "node": EVIL, "model": EVIL, "queue_ms": place % 100},
        )
        for place in range(120)
    ]
    records += [failed(120 + place, EVIL, EVIL, id=EVIL) for place in range(4)]
    report = reported(path / "answers.jsonl", *records, starts=(100.0, 1_000.0))
    report.output = EVIL
    return write_report(ledger_path(path / "answers.jsonl"), report)[1]


async def opened(browser: Browser, path: Path, **options: Any) -> tuple[Page, list[str]]:
    """Open a page; return it, and what it complains of and asks for, which grows."""
    page = await (await browser.new_context(**options)).new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: told.append(dialog.message))
    page.on("request", lambda request: told.append(request.url) if request.url != path.as_uri() else None)
    await page.goto(path.as_uri())
    return page, told


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_shows_every_plot(browser: Browser, tmp_path: Path, scheme: Any, width: int) -> None:
    """Each plot is drawn and has its alternative in words and in figures; nothing is wider than the window."""
    page, told = await opened(browser, hostile(tmp_path), color_scheme=scheme, viewport={"width": width, "height": 900})
    for name in ("throughput", "latency", "queue", "prompts", "answers", "slots"):
        plot = page.locator(f"#{name} > svg")
        box = await plot.bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert await plot.get_attribute("role") == "img"
        label = await plot.get_attribute("aria-label")
        assert label == await page.locator(f"#{name} figcaption").text_content()
        assert await page.locator(f"#{name} details tbody tr").count() > 0
    assert await page.locator("#latency rect.bar").count() > 3
    assert await page.locator("#slots rect.bar").count() == 3
    assert "NaN" not in await page.content()
    wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    assert await page.evaluate(wide) == [width, width]
    RESULTS.mkdir(exist_ok=True)
    await page.screenshot(path=RESULTS / f"report-{scheme}-{width}.png", full_page=True)
    assert told == []


async def test_the_page_is_of_both_schemes(browser: Browser, tmp_path: Path) -> None:
    """In the dark the page is dark and its letters are light."""
    path = hostile(tmp_path)
    colours = "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; })()"
    light, _ = await opened(browser, path, color_scheme="light")
    dark, _ = await opened(browser, path, color_scheme="dark")
    assert await light.evaluate(colours) == ["rgb(246, 247, 248)", "rgb(23, 27, 31)"]
    assert await dark.evaluate(colours) == ["rgb(16, 20, 22)", "rgb(228, 232, 234)"]


async def test_texts_are_no_markup(browser: Browser, tmp_path: Path) -> None:
    """What a row, an error, a node or a model says is shown as it is, and makes no element and no request."""
    page, told = await opened(browser, hostile(tmp_path))
    assert await page.locator("img, script, iframe, [onerror]").count() == 0
    assert await page.locator("h1").text_content() == printable(EVIL)
    assert await page.get_by_text("<img src=x onerror=alert(1)>").count() >= 4
    assert told == []


async def test_a_page_of_nothing(browser: Browser, tmp_path: Path) -> None:
    """A job that has only begun has a page that says so."""
    report = reported(tmp_path / "out")
    page, told = await opened(browser, write_report(ledger_path(tmp_path / "out"), report)[1])
    assert "No row has ended yet." in await page.inner_text("main")
    assert told == []
