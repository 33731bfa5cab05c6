"""Batch jobs: reading, running and writing rows."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from raylm import AsyncLMDeployPipeline, SimulatedConfig
from raylm.batch import BadRow, Row, Tally, encode_row, output_file, parse_row, read_rows, run_batch
from raylm.engines.simulated import greedy_text
from raylm.errors import ContextLengthError, InvalidRequestError
from raylm.messages import Completion, Receipt, Usage

USAGE = Usage(prompt_tokens=2, completion_tokens=3)
RECEIPT = Receipt(
    slot=1,
    actor="a",
    node="here",
    why="least-loaded",
    queue_ms=0.5,
    attempts=1,
    usage=USAGE,
    engine="simulated",
    engine_version="1",
    model="m",
)
COMPLETION = Completion(request_id="r", text="h\u00e9 \u2713", finish_reason="stop", usage=USAGE, receipt=RECEIPT)


def row(number: int, prompt: str, **fields: object) -> Row:
    """Return a greedy row of five tokens."""
    return Row(number=number, id=number, fields={"prompt": prompt, "temperature": 0, "max_new_tokens": 5, **fields})


async def each(*rows: Row | BadRow) -> AsyncIterator[Row | BadRow]:
    """Yield rows."""
    for one in rows:
        yield one


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` is true. The test's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.005)


# Reading


async def read(path: Path) -> list[Row | BadRow]:
    """Return the rows of a file."""
    with path.open("rb") as file:
        return [one async for one in read_rows(file)]


async def test_a_row_is_named_by_its_line(tmp_path: Path) -> None:
    """A row without an id gets the number of its line; empty lines are passed over and counted."""
    path = tmp_path / "rows"
    path.write_text('\n{"prompt": "a"}\n  \n{"prompt": "b", "id": "x"}')
    assert await read(path) == [
        Row(number=2, id=2, fields={"prompt": "a"}),
        Row(number=4, id="x", fields={"prompt": "b"}),
    ]


async def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    """A file of nothing has no rows."""
    path = tmp_path / "rows"
    path.touch()
    assert await read(path) == []


async def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    """The mark with which some editors begin a file is not part of the first row."""
    path = tmp_path / "rows"
    path.write_text('{"prompt": "a"}', encoding="utf-8-sig")
    assert await read(path) == [Row(number=1, id=1, fields={"prompt": "a"})]


async def test_a_line_may_be_longer_than_a_block(tmp_path: Path) -> None:
    """A row of three megabytes is one row."""
    path = tmp_path / "rows"
    path.write_bytes(msgspec.json.encode({"prompt": "x" * 3_000_000}) + b'\n{"prompt": "b"}\n')
    assert [len(one.fields["prompt"]) for one in await read(path) if isinstance(one, Row)] == [3_000_000, 1]


async def test_a_pipe_yields_rows_as_they_come() -> None:
    """A row is there before the writer has closed the pipe, and waiting for the next one blocks nothing."""
    receiving, sending = os.pipe()
    with os.fdopen(receiving, "rb") as file:
        rows = read_rows(file)
        waiting = asyncio.ensure_future(anext(rows))
        await asyncio.sleep(0)
        assert not waiting.done()
        os.write(sending, b'{"prompt": "a"}\n{"prompt"')
        assert await waiting == Row(number=1, id=1, fields={"prompt": "a"})
        os.write(sending, b': "b"}')
        os.close(sending)
        assert [one async for one in rows] == [Row(number=2, id=2, fields={"prompt": "b"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt":' * 100_000, "not valid JSON"),
        (b'["prompt"]', "a row is a JSON object"),
        (b'{"promt": "a"}', "unknown key promt; a row has prompt or messages"),
        (b'{"prompt": "a", "request_id": "x"}', "unknown key request_id"),
        (b'{"prompt": "a", "id": 1.5}', "id: expected a string or an integer"),
        (b'{"prompt": "a", "id": true}', "id: expected a string or an integer"),
        (b'{"prompt": "a", "id": 18446744073709551616}', "id: expected a string or an integer"),
    ],
)
def test_a_row_that_cannot_be_read(line: bytes, reason: str) -> None:
    """A wrong line becomes a bad row that names the line and the reason."""
    bad = parse_row(line, 3)
    assert isinstance(bad, BadRow)
    assert bad.id == bad.number == 3
    assert str(bad.error).startswith(f"line 3: {reason}")


def test_a_bad_row_keeps_its_id() -> None:
    """A bad row whose id can be read is known by it."""
    assert parse_row('{"id": "x", "promt": "a"}', 3).id == "x"


# Writing


def test_an_answered_row() -> None:
    """An output row has the id, the text and how it came about, on one line."""
    line = encode_row("x", COMPLETION)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line) == {
        "id": "x",
        "text": "h\u00e9 \u2713",
        "finish_reason": "stop",
        "usage": msgspec.to_builtins(USAGE),
        "receipt": msgspec.to_builtins(RECEIPT),
    }


def test_logprobs_come_with_their_tokens() -> None:
    """A row that asked for log-probabilities has them, and the tokens they belong to."""
    told = msgspec.structs.replace(COMPLETION, token_ids=[5], logprobs=[-0.5])
    answer = msgspec.json.decode(encode_row(1, told))
    assert (answer["token_ids"], answer["logprobs"]) == ([5], [-0.5])


def test_a_failed_row_has_no_text() -> None:
    """A failed row has its id and its error, and nothing that could pass for an answer."""
    assert msgspec.json.decode(encode_row(1, ContextLengthError("too long"))) == {
        "id": 1,
        "error": {"type": "ContextLengthError", "message": "too long"},
    }


def test_output_appears_complete(tmp_path: Path) -> None:
    """The file is there under its name only once the block has ended; until then it is readable as partial."""
    path = tmp_path / "out"
    with output_file(path) as file:
        file.write(b"a\n")
        file.flush()
        assert not path.exists()
        assert (tmp_path / "out.partial").read_bytes() == b"a\n"
    assert [found.name for found in tmp_path.iterdir()] == ["out"]
    assert path.read_bytes() == b"a\n"


def test_an_interrupted_output_stays_partial(tmp_path: Path) -> None:
    """What was written before an exception is kept, under the partial name."""
    with suppress(KeyboardInterrupt), output_file(tmp_path / "out") as file:
        file.write(b"a\n")
        raise KeyboardInterrupt
    assert [found.name for found in tmp_path.iterdir()] == ["out.partial"]


def test_an_interrupted_output_of_nothing_is_removed(tmp_path: Path) -> None:
    """A job that wrote nothing leaves nothing that the next one would stumble over."""
    with pytest.raises(KeyboardInterrupt), output_file(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["out", "out.partial"])
def test_output_is_not_overwritten(tmp_path: Path, taken: str) -> None:
    """Neither a finished output nor what is left of an interrupted one is replaced unasked."""
    (tmp_path / taken).write_text("precious")
    with pytest.raises(FileExistsError, match=taken), output_file(tmp_path / "out"):
        pass
    assert (tmp_path / taken).read_text() == "precious"


def test_output_is_overwritten_on_request(tmp_path: Path) -> None:
    """With `overwrite` the new output takes the place of the old one at its end."""
    path = tmp_path / "out"
    path.write_text("old")
    with output_file(path, overwrite=True) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_output_to_a_device() -> None:
    """A device is written to as it is: there is nothing to rename."""
    with output_file(Path(os.devnull)) as file:
        file.write(b"a\n")
    assert not Path(f"{os.devnull}.partial").exists()


def test_a_tally_knows_who_did_what() -> None:
    """Rows, failures and tokens are counted, and the share of each slot."""
    tally = Tally()
    tally.add(COMPLETION)
    tally.add(COMPLETION)
    tally.add(ContextLengthError("too long"))
    assert (tally.num_rows, tally.num_failed, tally.num_tokens) == (3, 1, 6)
    assert tally.rows_by_slot == {(1, "here"): 2}
    assert tally.tokens_by_slot == {(1, "here"): 6}


# Running


on_the_pipelines_loop = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(cluster: str) -> AsyncIterator[AsyncLMDeployPipeline]:
    """Two simulated replicas."""
    engine = SimulatedConfig(tokens_per_s=500, capacity=4, max_context=100)
    async with AsyncLMDeployPipeline("simulated", replicas=2, backend_config=engine) as pipeline:
        yield pipeline


@on_the_pipelines_loop
async def test_results_keep_the_order_of_the_rows(pipeline: AsyncLMDeployPipeline) -> None:
    """Rows of different lengths come out in input order, each with its own answer."""
    rows = [row(number, f"row {number}", max_new_tokens=1 + number * 7 % 20) for number in range(1, 201)]
    found = [(one, result) async for one, result in run_batch(pipeline, each(*rows))]
    assert [one for one, _ in found] == rows
    assert [result.text for _, result in found if isinstance(result, Completion)] == [
        greedy_text(one.fields["prompt"], one.fields["max_new_tokens"]) for one in rows
    ]


@on_the_pipelines_loop
async def test_a_wrong_row_fails_alone(pipeline: AsyncLMDeployPipeline) -> None:
    """Rows that are wrong in any way have an error each that says so, and the others are answered."""
    bad = BadRow(number=1, id=1, error=InvalidRequestError("line 1: not valid JSON"))
    both = Row(number=2, id=2, fields={"prompt": "a", "messages": [{"role": "user", "content": "b"}]})
    rows = each(
        bad,
        both,
        row(3, "good"),
        row(4, ""),
        row(5, "a", top_p=2),
        row(6, "word " * 200),
        Row(number=7, id=7, fields={"messages": [{"role": "user", "content": 7}]}),
    )
    found = {one.number: result async for one, result in run_batch(pipeline, rows)}
    good = found.pop(3)
    assert isinstance(good, Completion)
    assert good.text == greedy_text("good", 5)
    assert {number: type(result) for number, result in found.items()} == {
        1: InvalidRequestError,
        2: InvalidRequestError,
        4: InvalidRequestError,
        5: InvalidRequestError,
        6: ContextLengthError,
        7: InvalidRequestError,
    }
    for number in (1, 2, 4, 5, 7):
        assert str(found[number]).startswith(f"line {number}: ")


@on_the_pipelines_loop
async def test_a_rows_parameter_wins_over_the_default(pipeline: AsyncLMDeployPipeline) -> None:
    """Defaults are for rows that do not say it themselves."""
    rows = each(Row(number=1, id=1, fields={"prompt": "a"}), Row(number=2, id=2, fields={"prompt": "a", "seed": 1}))
    results = [result async for _, result in run_batch(pipeline, rows, defaults={"max_new_tokens": 5, "seed": 7})]
    texts = [result.text for result in results if isinstance(result, Completion)]
    assert texts == [await pipeline.generate("a", max_new_tokens=5, seed=seed) for seed in (7, 1)]
    assert texts[0] != texts[1]


@on_the_pipelines_loop
async def test_no_more_rows_are_read_than_the_window_holds(pipeline: AsyncLMDeployPipeline) -> None:
    """While nobody takes results, reading stops at the window, and goes on as they are taken."""
    num_read = 0

    async def endless() -> AsyncIterator[Row]:
        nonlocal num_read
        while True:
            num_read += 1
            yield row(num_read, "a")

    async with aclosing(run_batch(pipeline, endless(), window=10)) as results:
        for num_taken in range(1, 31):
            await anext(results)
            assert num_read <= num_taken + 10 + 1  # the one is read and waits for room
    assert num_read > 30


@on_the_pipelines_loop
async def test_leaving_early_aborts_what_runs(pipeline: AsyncLMDeployPipeline) -> None:
    """A caller that stops taking results leaves no request behind, here or in the engines."""
    rows = each(row(1, "short"), *(row(number, "long", max_new_tokens=90) for number in range(2, 30)))
    async with aclosing(run_batch(pipeline, rows)) as results:
        await anext(results)
    now = pipeline.statistics()
    assert (now.num_running, now.num_waiting) == (0, 0)
    await until(lambda: not any(slot.engine and slot.engine.num_running for slot in pipeline.statistics().slots))


@on_the_pipelines_loop
async def test_an_input_that_breaks_is_told(pipeline: AsyncLMDeployPipeline) -> None:
    """An error of reading is raised, after the results of the rows before it."""

    async def breaking() -> AsyncIterator[Row]:
        yield row(1, "a")
        raise OSError("the disk is gone")

    results = run_batch(pipeline, breaking())
    first, _ = await anext(results)
    assert first.number == 1
    with pytest.raises(OSError, match="the disk is gone"):
        await anext(results)
