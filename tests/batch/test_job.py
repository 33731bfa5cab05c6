"""Jobs on real actors of the simulated engine."""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from raylm import AsyncChatbot, AsyncLMDeployClient, AsyncLMDeployPipeline, AsyncServedModel, Fault, SimulatedConfig
from raylm.actors.manager_actor import end, serve
from raylm.batch import (
    BadRow,
    BatchConfig,
    Job,
    Ledger,
    Reading,
    Row,
    Tally,
    ledger_path,
    merge_shards,
    open_ledger,
    run_batch_async,
)
from raylm.batch.job import digest
from raylm.batch.ledger import Record
from raylm.batch.rows import rows_of
from raylm.config import AutoscalingConfig, EngineGroup, ModelConfig, PoolConfig
from raylm.engines.simulated import greedy_text
from raylm.errors import InvalidRequestError, NoActorError, PoolSaturatedError, TooManyFailuresError
from tests.engines.http_server import Toy, answer

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGINE = SimulatedConfig(tokens_per_s=500, capacity=4, max_context=100, faults=(Fault(match="FAIL", action="fail"),))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(cluster: str) -> AsyncIterator[AsyncLMDeployPipeline]:
    """Two simulated replicas."""
    async with AsyncLMDeployPipeline("simulated", replicas=2, backend_config=ENGINE, temperature=0) as pipeline:
        yield pipeline


def row(prompt: str, **fields: Any) -> dict[str, Any]:
    """Return a row of five tokens."""
    return {"prompt": prompt, "max_new_tokens": 5, **fields}


def rows_in(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an output."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_in(folder: Path) -> list[str]:
    """Return the names of a folder's files."""
    return sorted(path.name for path in folder.iterdir())


def num_tokens(pipeline: AsyncLMDeployPipeline) -> int:
    """Return how many tokens the pool has delivered so far."""
    return pipeline.statistics().num_tokens


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` is true. The test's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.005)


async def test_results_keep_the_order_of_the_rows(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Rows of different lengths come out in input order, each with its own answer."""
    rows = [row(f"row {number}", max_new_tokens=1 + number * 7 % 20) for number in range(200)]
    tally = await run_batch_async(pipeline, rows, tmp_path / "out")
    assert [(one["id"], one["text"]) for one in rows_in(tmp_path / "out")] == [
        (number, greedy_text(one["prompt"], one["max_new_tokens"])) for number, one in enumerate(rows, 1)
    ]
    assert (tally.num_rows, tally.num_answered, tally.num_failed) == (200, 200, 0)
    assert tally.rows_by_slot.total() == 200
    assert names_in(tmp_path) == ["out", "out.ledger"]


async def test_a_wrong_row_fails_alone(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Rows that are wrong in any way have an error each that says so and where, and the others are answered."""
    source = tmp_path / "in.jsonl"
    lines = [
        "{",
        json.dumps(row("a", messages=[{"role": "user", "content": "b"}])),
        json.dumps(row("good")),
        json.dumps(row("")),
        json.dumps(row("a", top_p=2)),
        json.dumps(row("word " * 200)),
        json.dumps({"messages": [{"role": "user", "content": 7}]}),
    ]
    source.write_text("\n".join(lines))
    tally = await run_batch_async(pipeline, source, tmp_path / "out")
    found = {one["id"]: one for one in rows_in(tmp_path / "out")}
    assert found.pop(3)["text"] == greedy_text("good", 5)
    assert {number: one["error"]["type"] for number, one in found.items()} == {
        1: "InvalidRequestError",
        2: "InvalidRequestError",
        4: "InvalidRequestError",
        5: "InvalidRequestError",
        6: "ContextLengthError",
        7: "InvalidRequestError",
    }
    for number, one in found.items():
        assert one["error"]["message"].startswith(f"in.jsonl line {number}: ")
    assert (tally.num_answered, tally.num_failed) == (1, 6)


def openai_row(name: str, **changes: Any) -> dict[str, Any]:
    """Return a row of an OpenAI batch file."""
    body = {"model": "m", "messages": [{"role": "user", "content": name}], "max_tokens": 5, "temperature": 0}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}


OPENAI_LINES = [
    "{",
    json.dumps({"custom_id": "no method", "url": "/v1/chat/completions", "body": {}}),
    json.dumps(openai_row("a")),
    json.dumps(row("of another form")),
    json.dumps(openai_row("b")),
]


@pytest.mark.parametrize("begin", [0, 1, 2])
async def test_a_damaged_line_of_openais_fails_alone(
    pipeline: AsyncLMDeployPipeline, tmp_path: Path, begin: int
) -> None:
    """Wherever it is in the file, it goes to the errors; a row of another form does as well. So again in a rerun."""
    lines = OPENAI_LINES[begin:]
    (tmp_path / "in").write_text("\n".join(lines))
    for _ in range(2):
        tally = await run_batch_async(pipeline, tmp_path / "in", tmp_path / "out")
        answers, errors = rows_in(tmp_path / "out"), rows_in(tmp_path / "out.errors")
        assert [answer["custom_id"] for answer in answers] == ["a", "b"]
        assert [error["custom_id"] for error in errors] == ["1", "no method", str(4 - begin)][begin:]
        assert {error["response"]["status_code"] for error in errors} == {400}
        told = [error["response"]["body"]["error"]["message"] for error in errors]
        assert all(message.startswith("in line ") for message in told)
        assert told[-1] == f"in line {4 - begin}: a row of an OpenAI batch file has body, custom_id, method, url"
        assert tally.num_failed == 3 - begin


async def test_a_damaged_line_of_openais_in_shards(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Merged parts have OpenAI's form, whichever rows are damaged."""
    (tmp_path / "in").write_text("\n".join([*OPENAI_LINES, "{"]))
    for number in (1, 2):
        await run_batch_async(pipeline, tmp_path / "in", tmp_path / "out", shard=(number, 2))
    assert merge_shards(tmp_path / "out", 6).num_failed == 4
    assert [answer["custom_id"] for answer in rows_in(tmp_path / "out")] == ["a", "b"]
    assert [error["custom_id"] for error in rows_in(tmp_path / "out.errors")] == ["1", "no method", "4", "6"]


async def test_a_rows_parameter_wins_over_the_default(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Defaults are for rows that do not say it themselves."""
    rows = [{"prompt": "a"}, {"prompt": "a", "seed": 1}]
    await run_batch_async(pipeline, rows, tmp_path / "out", max_new_tokens=5, seed=7, temperature=1.0)
    texts = [one["text"] for one in rows_in(tmp_path / "out")]
    assert texts == [await pipeline.generate("a", max_new_tokens=5, temperature=1.0, seed=seed) for seed in (7, 1)]
    assert texts[0] != texts[1]


async def test_begun_again_it_asks_nothing(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """What was answered is not asked again, sampled rows included, and the output is the same."""
    rows = [row(f"row {number}", temperature=number % 2) for number in range(20)]
    await run_batch_async(pipeline, rows, tmp_path / "out")
    first, before = (tmp_path / "out").read_bytes(), num_tokens(pipeline)
    tally = await run_batch_async(pipeline, rows, tmp_path / "out")
    assert (tally.num_kept, tally.num_answered, num_tokens(pipeline)) == (20, 0, before)
    assert (tmp_path / "out").read_bytes() == first


async def test_what_changed_is_asked_again(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A changed row is noticed and asked, rows that moved keep greedy answers, and other parameters change all."""
    rows = [row(f"row {number}") for number in range(10)]
    await run_batch_async(pipeline, rows, tmp_path / "out")
    rows[3] = row("another")
    tally = await run_batch_async(pipeline, rows, tmp_path / "out")
    assert (tally.num_kept, tally.num_changed, tally.num_answered) == (9, 1, 1)
    before = num_tokens(pipeline)
    rows.insert(0, row("first"))
    tally = await run_batch_async(pipeline, rows, tmp_path / "out")
    assert num_tokens(pipeline) - before == 5
    assert [one["text"] for one in rows_in(tmp_path / "out")] == [greedy_text(one["prompt"], 5) for one in rows]
    tally = await run_batch_async(pipeline, rows, tmp_path / "out", repetition_penalty=1.1)
    assert (tally.num_kept, tally.num_changed, tally.num_answered) == (0, 11, 11)


async def test_a_row_that_got_another_name(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Ids may change, and so may the form of OpenAI's answer: nothing is asked for that, and the output has the new."""
    rows = [row("a", id="x"), row("", id="y"), row("c", id="z")]
    await run_batch_async(pipeline, rows, tmp_path / "out")
    before = num_tokens(pipeline)
    for number, one in enumerate(rows):
        one["id"] = number
    for _ in range(2):
        tally = await run_batch_async(pipeline, rows, tmp_path / "out")
        assert (tally.num_kept, tally.num_failed, tally.num_changed, num_tokens(pipeline)) == (2, 1, 0, before)
        assert [one["id"] for one in rows_in(tmp_path / "out")] == [0, 1, 2]
    (one,) = [openai_row("a")]
    await run_batch_async(pipeline, [one], tmp_path / "openai")
    one["custom_id"], one["body"]["model"] = "b", "renamed"
    assert (await run_batch_async(pipeline, [one], tmp_path / "openai")).num_kept == 1
    (answer,) = rows_in(tmp_path / "openai")
    assert (answer["custom_id"], answer["response"]["body"]["model"]) == ("b", "renamed")


async def test_rows_that_moved_have_not_changed(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """What is counted as changed is asked again; an answer that is found at another place is not."""
    rows = [row(f"row {number}") for number in range(6)]
    await run_batch_async(pipeline, rows, tmp_path / "out")
    tally = await run_batch_async(pipeline, rows[1:], tmp_path / "out")
    assert (tally.num_kept, tally.num_changed, tally.num_answered, tally.num_shared) == (0, 0, 5, 5)


async def test_answers_hold_while_no_engine_is_known(cluster: str, tmp_path: Path) -> None:
    """On a served model that has no actors until there is work, a job that is begun again asks nothing."""
    scaling = AutoscalingConfig(min_replicas=0, max_replicas=1, upscale_delay_s=0, downscale_delay_s=0)
    config = ModelConfig(name="zero", engines=(EngineGroup(engine=ENGINE, autoscaling=scaling),))
    rows = [row("a", temperature=0), row("b", temperature=0), row("c", temperature=1)]
    await serve(config)
    try:
        async with AsyncServedModel("zero") as model:
            assert (await run_batch_async(model, rows, tmp_path / "out")).num_answered == 3
            await until(lambda: not model.pool.slots)
        async with AsyncServedModel("zero") as model:
            assert model.pool.engines() == []
            tally = await run_batch_async(model, [rows[1], rows[0], rows[2]], tmp_path / "out")
            assert (tally.num_kept, tally.num_shared, tally.num_tokens) == (1, 2, 0)
            assert not model.pool.slots
    finally:
        await end("zero")


async def test_rows_are_sent_as_soon_as_there_is_room(cluster: str, tmp_path: Path) -> None:
    """A job that begins before its model has an actor sends what the first one can use, and waits for no row's end."""
    scaling = AutoscalingConfig(min_replicas=0, max_replicas=1, upscale_delay_s=0, downscale_delay_s=0)
    engine = SimulatedConfig(tokens_per_s=10, capacity=4)
    config = ModelConfig(name="growing", engines=(EngineGroup(engine=engine, autoscaling=scaling),))
    rows = [row(f"{number}", max_new_tokens=5000) for number in range(8)]
    tally: list[Tally] = []
    await serve(config)
    try:
        async with AsyncServedModel("growing") as model:
            assert model.pool.engines() == []
            running = asyncio.ensure_future(run_batch_async(model, rows, tmp_path / "out", begun=tally.append))
            await until(lambda: bool(tally) and (tally[0].num_sent == 8 or tally[0].num_done > 0))
            assert tally[0].num_done == 0
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
    finally:
        await end("growing")


async def test_a_model_that_ends(cluster: str, tmp_path: Path) -> None:
    """A job whose model is served no longer stops, and none of its rows has failed for that."""
    engine = SimulatedConfig(tokens_per_s=10, capacity=4, max_context=10**9)
    rows = [row(f"{number}", max_new_tokens=10**8) for number in range(8)]
    tally: list[Tally] = []
    await serve(ModelConfig(name="ending", engines=(EngineGroup(engine=engine),)))
    try:
        async with AsyncServedModel("ending") as model:
            running = asyncio.ensure_future(run_batch_async(model, rows, tmp_path / "out", begun=tally.append))
            await until(lambda: bool(tally) and tally[0].num_sent == 8)
            await end("ending")
            with pytest.raises(NoActorError, match="model 'ending' is served no longer"):
                await running
    finally:
        await end("ending")
    with open_ledger(tmp_path / "out") as ledger:
        assert list(ledger.records()) == []


async def test_a_full_queue(cluster: str, tmp_path: Path) -> None:
    """However often a pool refuses a job's rows, no more than one timer waits to try again."""
    config, output, nums = PoolConfig(max_queued=1), Collected(), []
    rows = [row(f"{number}") for number in range(100)]
    async with AsyncChatbot([ENGINE], temperature=0, address=cluster, pool_config=config) as chatbot:
        with open_ledger(tmp_path / "out") as ledger:
            job = Job(chatbot, ledger)
            running = asyncio.ensure_future(job.run(rows_of(rows), output))

            def ended() -> bool:
                nums.append(len(job._timers))
                return running.done()

            await until(ended)
            assert (await running).num_answered == 100
    assert max(nums) <= 1


@pytest.fixture
def full_server() -> Iterator[Toy]:
    """A server that is full, and does not say for how long."""
    server = Toy()
    server.script = [answer(429, {"message": "come back another day"})] * 10_000
    with server.in_thread():
        yield server


async def test_a_server_that_refuses_for_ever(
    cluster: str, tmp_path: Path, full_server: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose rows are refused all the time ends with the server's words, and goes on when it is begun again."""
    monkeypatch.setattr("raylm.batch.job._REFUSED_S", 0.5)
    monkeypatch.setattr("raylm.batch.job._BACKOFF_S", 0.05)
    rows = [row("a"), row("b")]
    tally: list[Tally] = []
    async with AsyncLMDeployClient(full_server.url, temperature=0) as client:
        with pytest.raises(PoolSaturatedError, match=r"no row was answered for .*come back another day.* goes on"):
            await run_batch_async(client, rows, tmp_path / "out", begun=tally.append)
        assert tally[0].num_failed == 0
        monkeypatch.undo()
        full_server.script = full_server.script[:6]
        again = await run_batch_async(client, rows, tmp_path / "out")
    assert (again.num_answered, again.num_failed) == (2, 0)


async def test_pauses_after_refusals_grow(
    cluster: str, tmp_path: Path, full_server: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that a server refuses is sent again after pauses that become longer."""
    monkeypatch.setattr("raylm.batch.job._BACKOFF_S", 0.001)
    pauses: list[float] = []

    def at_once(self: Job, delay_s: float, call: Callable[[], None]) -> None:
        pauses.append(delay_s)
        self._loop.call_soon(self._guard, call)

    monkeypatch.setattr(Job, "_later", at_once)
    async with AsyncLMDeployClient(full_server.url, temperature=0) as client:
        running = asyncio.ensure_future(run_batch_async(client, [row("a")], tmp_path / "out"))
        await until(lambda: len(pauses) > 8)
        full_server.script.clear()
        await running
    assert all(0.0005 * 2**number <= pause <= 0.0015 * 2**number for number, pause in enumerate(pauses[:9]))


async def test_an_interrupt_waits_for_what_is_being_written(
    pipeline: AsyncLMDeployPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is cancelled while its answers are on their way to the disk ends when they are there."""
    writing, go_on = threading.Event(), threading.Event()
    write = Ledger.write

    def slowly(ledger: Ledger, block: bytes) -> None:
        if b'"completion"' in block:
            writing.set()
            go_on.wait()
        write(ledger, block)

    async def one() -> AsyncIterator[Row]:
        yield Row(place="", id=1, fields=row("a"))

    with open_ledger(tmp_path / "out") as ledger:
        monkeypatch.setattr(Ledger, "write", slowly)
        running = asyncio.ensure_future(Job(pipeline, ledger).run(one(), Collected()))
        await asyncio.to_thread(writing.wait)
        running.cancel()
        for _ in range(100):  # more than a job takes that waits for nothing
            await asyncio.sleep(0)
        ended_before = running.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not ended_before
        monkeypatch.undo()
    with open_ledger(tmp_path / "out") as ledger:
        assert ledger.find(0) is not None


@pytest.mark.parametrize("share_equal", [True, False])
async def test_equal_rows_are_asked_once(pipeline: AsyncLMDeployPipeline, tmp_path: Path, share_equal: bool) -> None:
    """Equal greedy rows are asked once unless that is switched off; sampled ones always each."""
    before = num_tokens(pipeline)
    rows = [row("same")] * 30 + [row("same", temperature=1.0)] * 3
    config = BatchConfig(share_equal=share_equal)
    tally = await run_batch_async(pipeline, rows, tmp_path / "out", config=config)
    assert tally.num_answered == 33
    assert num_tokens(pipeline) - before == 5 * (4 if share_equal else 33)
    found = rows_in(tmp_path / "out")
    assert [one["id"] for one in found] == list(range(1, 34))
    assert {one["text"] for one in found[:30]} == {greedy_text("same", 5)}


async def test_a_failure_is_asked_again(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A row that an engine fails on is tried again, then told as failed, and asked again when the job is."""
    rows = [row("a"), row("FAIL")]
    tally = await run_batch_async(pipeline, rows, tmp_path / "out", config=BatchConfig(retries=1))
    assert (tally.num_answered, tally.num_failed, tally.num_retries) == (1, 1, 1)
    assert rows_in(tmp_path / "out")[1]["error"]["type"] == "EngineError"
    tally = await run_batch_async(pipeline, rows, tmp_path / "out", config=BatchConfig(retries=0))
    assert (tally.num_kept, tally.num_failed, tally.num_retries) == (1, 1, 0)


async def test_too_many_failures_end_the_job(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Beyond the failures that are allowed the job stops; the next run goes on after what was answered."""
    rows = [row("a"), *(row(f"FAIL {number}") for number in range(5)), *(row(f"b {number}") for number in range(9))]
    with pytest.raises(TooManyFailuresError, match="more than the 2 that were allowed"):
        await run_batch_async(pipeline, rows, tmp_path / "out", config=BatchConfig(retries=0, max_failures=2))
    assert not (tmp_path / "out").exists()
    tally = await run_batch_async(pipeline, rows, tmp_path / "out", config=BatchConfig(retries=0))
    assert tally.num_kept + tally.num_answered == 10
    assert tally.num_failed == 5


async def test_a_row_may_take_so_long(pipeline: AsyncLMDeployPipeline, cluster: str, tmp_path: Path) -> None:
    """A row that takes longer than its limit fails, counted from when an actor got it, not in the queue."""
    rows = [row(f"{number}", max_new_tokens=90) for number in range(40)]
    tally = await run_batch_async(pipeline, rows, tmp_path / "out", config=BatchConfig(timeout_s=60))
    assert tally.num_failed == 0
    slow, rows = SimulatedConfig(tokens_per_s=1), [row("slow", max_new_tokens=8000)]
    async with AsyncChatbot([slow], temperature=0, address=cluster) as chatbot:
        tally = await run_batch_async(chatbot, rows, tmp_path / "late", config=BatchConfig(timeout_s=0.05))
    assert tally.num_failed == 1
    assert rows_in(tmp_path / "late")[0]["error"]["type"] == "RequestTimeoutError"


async def test_the_last_rows_may_be_given_up(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """When the share that was asked for is answered, the rest is listed as given up, which is no failure too many."""
    rows = [row(f"{number}") for number in range(19)] + [row("FAIL")]
    config = BatchConfig(retries=1000, finish_at=0.95, max_failures=0)
    tally = await run_batch_async(pipeline, rows, tmp_path / "out", config=config)
    assert (tally.num_answered, tally.num_failed) == (19, 1)
    error = rows_in(tmp_path / "out")[-1]["error"]
    assert (error["type"], error["message"]) == (
        "RequestCancelledError",
        "given up when 0.95 of the rows were answered",
    )


async def test_the_longest_go_first(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Rows with the highest limit are sent first, as far as they have been read."""
    rows = [row(f"{number}", max_new_tokens=1 + number) for number in range(60)]
    await run_batch_async(pipeline, rows, tmp_path / "out")
    with open_ledger(tmp_path / "out") as ledger:
        sent_at = [record.at - record.seconds for record in ledger.records()]
    assert sum(sent_at[40:]) / 20 < sum(sent_at[:20]) / 20


async def test_shards_make_one_output(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Parts that were answered one by one are merged to what one job would have written."""
    rows = [row(f"row {number}") for number in range(11)]
    out = tmp_path / "out"
    for number in (3, 1):
        await run_batch_async(pipeline, rows, out, shard=(number, 3))
    with pytest.raises(InvalidRequestError, match=r"shard 2/3 of .* is missing"):
        merge_shards(out, 11)
    await run_batch_async(pipeline, rows, out, shard=(2, 3))
    assert not out.exists()
    again = "the input has 12 rows, and 11 were answered; answer shard 1/3, 2/3, 3/3 again"
    with pytest.raises(InvalidRequestError, match=again):
        merge_shards(out, 12, overwrite=True)
    tally = merge_shards(out, 11, overwrite=True)
    assert (tally.num_rows, tally.num_failed) == (11, 0)
    assert [one["text"] for one in rows_in(out)] == [greedy_text(one["prompt"], 5) for one in rows]
    tally = await run_batch_async(pipeline, rows, out)
    assert tally.num_kept == 11


async def test_shards_that_are_merged_again(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A merge that finds nothing new makes the same output, and adds nothing to the ledger."""
    rows, out = [row("a"), row("FAIL"), row("c")], tmp_path / "out"
    for number in (1, 2):
        await run_batch_async(pipeline, rows, out, shard=(number, 2), config=BatchConfig(retries=0))
    merge_shards(out)
    merged = out.read_bytes(), ledger_path(out).read_bytes()
    merge_shards(out)
    assert (out.read_bytes(), ledger_path(out).read_bytes()) == merged


async def test_a_shard_that_was_cut_off_is_not_merged(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A row that is missing in the middle is told, with what to do; the whole job then asks that row alone."""
    rows = [row(f"row {number}") for number in range(6)]
    await run_batch_async(pipeline, rows, tmp_path / "out", shard=(1, 2))
    await run_batch_async(pipeline, rows[:4], tmp_path / "out", shard=(2, 2))
    with pytest.raises(InvalidRequestError, match="the input has 6 rows, and 5 were answered; answer shard 2/2 again"):
        merge_shards(tmp_path / "out", 6)
    tally = await run_batch_async(pipeline, rows, tmp_path / "out")
    assert (tally.num_kept, tally.num_answered) == (5, 1)


async def test_a_shard_of_another_input_is_not_merged(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A shard that was answered before a row changed, or with other parameters, is named; answered again it fits."""
    rows, out = [row(f"row {number}") for number in range(6)], tmp_path / "out"
    for number in (1, 2):
        await run_batch_async(pipeline, rows, out, shard=(number, 2))
    rows[1] = row("another")
    await run_batch_async(pipeline, rows, out, shard=(2, 2))
    with pytest.raises(InvalidRequestError, match=r"shard 1/2 was answered for another input.* than shard 2/2"):
        merge_shards(out, 6)
    assert not out.exists()
    assert (await run_batch_async(pipeline, rows, out, shard=(1, 2))).num_kept == 3
    merge_shards(out, 6)
    assert [one["text"] for one in rows_in(out)] == [greedy_text(one["prompt"], 5) for one in rows]
    await run_batch_async(pipeline, rows, out, shard=(1, 2), repetition_penalty=1.1)
    with pytest.raises(InvalidRequestError, match="shard 2/2 was answered for another input, or with other parameters"):
        merge_shards(out, 6)


async def test_a_shard_that_ended_early_is_not_merged(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A shard whose last run has not come to its end is named, though it has a record of every row from before."""
    rows, out = [row("a"), row("b"), row("c"), row("d")], tmp_path / "out"
    for number in (1, 2):
        await run_batch_async(pipeline, rows, out, shard=(number, 2))
    rows[2] = row("FAIL")
    config = BatchConfig(retries=0, max_failures=0)
    with pytest.raises(TooManyFailuresError):
        await run_batch_async(pipeline, rows, out, shard=(1, 2), config=config)
    with pytest.raises(InvalidRequestError, match=r"shard 1/2 did not come to its end .TooManyFailuresError"):
        merge_shards(out, 4)


@pytest.mark.parametrize("total", [4, None])
async def test_shards_of_an_input_that_became_shorter(
    pipeline: AsyncLMDeployPipeline, tmp_path: Path, total: int | None
) -> None:
    """What shards know of rows that are no more there is passed over."""
    rows, out = [row(f"row {number}") for number in range(7)], tmp_path / "out"
    for most in (7, 4):
        for number in (1, 2):
            await run_batch_async(pipeline, rows[:most], out, shard=(number, 2))
    assert merge_shards(out, total).num_rows == 4
    assert [one["text"] for one in rows_in(out)] == [greedy_text(one["prompt"], 5) for one in rows[:4]]


async def test_an_output_of_somebody_else_is_kept(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """An output that no job has made is replaced on request alone."""
    out = tmp_path / "out"
    out.write_text("precious")
    with pytest.raises(InvalidRequestError, match="only on request"):
        await run_batch_async(pipeline, [row("a")], out)
    assert out.read_text() == "precious"
    assert not ledger_path(out).exists()
    await run_batch_async(pipeline, [row("a")], out, overwrite=True)
    assert rows_in(out)[0]["text"] == greedy_text("a", 5)


class Collected:
    """An output that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, records: Any) -> None:
        self.records += records

    def close(self) -> None:
        pass


async def test_no_more_rows_are_read_than_need_be(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Reading keeps a bounded distance to the output, however long the input is."""
    num_read = 0
    output = Collected()

    async def endless() -> AsyncIterator[Row]:
        nonlocal num_read
        while True:
            num_read += 1
            yield Row(place="", id=num_read, fields=row(f"{num_read}", max_new_tokens=1))
            assert num_read <= len(output.records) + 3000

    with open_ledger(tmp_path / "out") as ledger:
        running = asyncio.ensure_future(Job(pipeline, ledger).run(endless(), output))
        await until(lambda: running.done() or num_read > 5000)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    now = pipeline.statistics()
    assert (now.num_running, now.num_waiting) == (0, 0)
    await until(lambda: not any(slot.engine and slot.engine.num_running for slot in pipeline.statistics().slots))


async def test_an_input_that_breaks_is_told(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """An error of reading is raised, and what was answered before it is kept."""
    done = asyncio.Event()

    async def breaking() -> AsyncIterator[Row | BadRow]:
        yield Row(place="", id=1, fields=row("a"))
        await done.wait()
        raise OSError("the disk is gone")

    output = Collected()
    with open_ledger(tmp_path / "out") as ledger:
        running = asyncio.ensure_future(Job(pipeline, ledger).run(breaking(), output))
        await until(lambda: bool(output.records))
        done.set()
        with pytest.raises(OSError, match="the disk is gone"):
            await running
        assert ledger.find(0) is not None


async def test_a_disk_that_fails_is_told(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """When an answer cannot be written, the job ends with the error, and nothing goes on behind it."""

    class Full(Collected):
        def write(self, _records: Any) -> None:
            raise OSError(28, "No space left on device")

    async def one() -> AsyncIterator[Row]:
        yield Row(place="", id=1, fields=row("a"))

    with open_ledger(tmp_path / "out") as ledger, pytest.raises(OSError, match="No space left"):
        await Job(pipeline, ledger).run(one(), Full())


async def test_actors_see_a_shared_prefix_once_before_the_rest(
    pipeline: AsyncLMDeployPipeline, tmp_path: Path, nums_before_the_rest: list[tuple[int, int]]
) -> None:
    """Where prompts begin with the same long text, one row goes to each actor first."""
    prefix = "p" * 2000
    rows = [row(f"{prefix} {number}") for number in range(20)]
    await run_batch_async(pipeline, rows, tmp_path / "out")
    assert max(nums_before_the_rest) == (20, 2)
    assert [one["text"] for one in rows_in(tmp_path / "out")] == [greedy_text(one["prompt"], 5) for one in rows]


async def test_a_shared_prefix_holds_no_row_up_for_long(
    pipeline: AsyncLMDeployPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each actor has seen it, the others come together, also where a row's first token is its last."""
    monkeypatch.setattr("raylm.batch.job._TICK_S", 0.01)
    rows = [row(f"{'p' * 2000} {number}", max_new_tokens=1) for number in range(500)]
    tally: list[Tally] = []
    running = asyncio.ensure_future(run_batch_async(pipeline, rows, tmp_path / "out", begun=tally.append))
    await until(lambda: running.done() or (bool(tally) and tally[0].num_sent > 2))
    assert not running.done()
    assert (await running).num_answered == 500


async def test_a_slow_row_is_sent_to_another_actor(cluster: str, tmp_path: Path) -> None:
    """A last row whose actor hangs is answered by another one, long before anybody would call the actor dead."""
    faults = (Fault(match="HANG", at_token=3, action="hang"),)
    engines = [
        SimulatedConfig(tokens_per_s=500, faults=faults),
        SimulatedConfig(tokens_per_s=500),
    ]
    config = PoolConfig(first_token_timeout_s=3600, token_gap_timeout_s=3600)
    async with AsyncChatbot(engines, temperature=0, address=cluster, pool_config=config) as chatbot:
        for attempt in range(20):  # until the row gets to the actor that hangs
            rows = [row(f"{number}") for number in range(30)] + [row(f"HANG {attempt}", max_new_tokens=50)]
            tally = await run_batch_async(chatbot, rows, tmp_path / f"out{attempt}")
            assert rows_in(tmp_path / f"out{attempt}")[-1]["text"] == greedy_text(f"HANG {attempt}", 50)
            if tally.num_hedged:
                break
        assert tally.num_hedged
        assert chatbot.statistics().num_moved == 0


async def test_a_slow_row_waits_for_room_elsewhere(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody has room for a slow row, that is no end of the job: it is sent again when somebody has."""
    monkeypatch.setattr("raylm.batch.job._MIN_SLOW_S", math.inf)
    refused = asyncio.Event()
    send = Job._send

    def noted(*arguments: Any, **more: Any) -> None:
        try:
            send(*arguments, **more)
        except PoolSaturatedError:
            refused.set()
            raise

    monkeypatch.setattr(Job, "_send", noted)
    healthy = SimulatedConfig(tokens_per_s=500, capacity=2, max_context=10**9)
    engines = [healthy, healthy.model_copy(update={"faults": (Fault(match="HANG", at_token=3, action="hang"),)})]
    config = PoolConfig(  # room for one row in each slot
        max_queued=1, interactive_reserve=0.5, first_token_timeout_s=3600, token_gap_timeout_s=3600
    )
    tally: list[Tally] = []
    async with AsyncChatbot(engines, temperature=0, address=cluster, pool_config=config) as chatbot:
        others = [chatbot.request(prompt="others", max_new_tokens=10**8) for _ in range(2)]
        async with chatbot.pool.stream(others[0], lane="batch", avoid=[1]) as first:
            await until(lambda: first.slot == 0)
            rows = [row("a", max_new_tokens=20), row("HANG", max_new_tokens=10)]
            running = asyncio.ensure_future(run_batch_async(chatbot, rows, tmp_path / "out", begun=tally.append))
            await until(lambda: bool(tally) and tally[0].num_answered == 1 and not chatbot.statistics().num_waiting)
            async with chatbot.pool.stream(others[1], lane="batch"):
                monkeypatch.setattr("raylm.batch.job._MIN_SLOW_S", 0.0)
                await refused.wait()
                assert tally[0].num_hedged == 0
        assert (await running).num_answered == 2
    assert tally[0].num_hedged == 1


async def test_the_digest_is_of_words_and_parameters(pipeline: AsyncLMDeployPipeline) -> None:
    """Each thing that may change the answer changes the digest, and the request's name does not."""
    requests = [
        pipeline.request(prompt="a"),
        pipeline.request(prompt="b"),
        pipeline.request(prompt="a", max_new_tokens=7),
        pipeline.request(prompt="a", stop_words=["x"]),
        pipeline.request(messages=[{"role": "user", "content": "a"}]),
        pipeline.request(messages=[{"role": "system", "content": "a"}]),
    ]
    assert len({digest(request) for request in requests}) == len(requests)
    assert digest(pipeline.request(prompt="a")) == digest(requests[0])


async def test_readings_are_for_programs_too(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Rows that a program has may go through a template."""
    rows = [{"question": "one"}, {"question": "two"}]
    reading = Reading(prompt="Q: {question}")
    await run_batch_async(pipeline, rows, tmp_path / "out", reading=reading, max_new_tokens=5)
    assert [one["text"] for one in rows_in(tmp_path / "out")] == [
        greedy_text(f"Q: {name}", 5) for name in ("one", "two")
    ]
