"""Ray Data with `Generate`: real datasets, real actors, real kills, simulated engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.data.expressions import col

from raylm.actors.manager_actor import served_models
from raylm.config import EngineGroup, Fault, ModelConfig, ServedPoolConfig, SimulatedConfig
from raylm.data import OUTPUT_COLUMNS, Generate, serving
from raylm.engines.simulated import greedy_text
from raylm.errors import InvalidRequestError, ModelNotFoundError
from raylm.served import ServedPool
from raylm.statistics import ModelState

# Ray Data reads its own deprecated settings when it copies them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

NUM_TOKENS = 20
FAULTS = (Fault(match="FAIL", at_token=3, action="fail"),)


def config(name: str, *, replicas: int = 2, max_queued: int | None = 10_000, **engine: Any) -> ModelConfig:
    """Return a model of simulated engines."""
    group = EngineGroup(engine=SimulatedConfig(faults=FAULTS, **engine), replicas=replicas)
    return ModelConfig(name=name, engines=(group,), pool=ServedPoolConfig(max_queued=max_queued))


@pytest.fixture(scope="module")
def model(cluster: str) -> Iterator[str]:
    """A model on two actors; a row takes 0.4 s, and 16 of them are answered at a time."""
    with serving(config("sim", capacity=8, tokens_per_s=50)) as name:
        yield name


def answered(prompts: Dataset, model: str, *, batch_size: int | None = 8, calls: int = 2, **arguments: Any) -> Dataset:
    """Return a dataset with its greedy answers."""
    arguments = {"prompt_column": "prompt", "max_new_tokens": NUM_TOKENS, "temperature": 0} | arguments
    return prompts.map_batches(
        Generate,
        fn_constructor_kwargs={"model": model} | arguments,
        batch_format="pyarrow",
        batch_size=batch_size,
        num_cpus=0,
        compute=ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=calls),
        udf_modifying_row_count=False,
    )


def prompts(num: int, num_blocks: int) -> Dataset:
    """Return rows of `id` and `prompt`."""
    items = [{"id": row, "prompt": f"row {row}"} for row in range(num)]
    return ray.data.from_items(items, override_num_blocks=num_blocks)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the rows in a folder of Parquet files, by their ids."""
    rows: list[dict[str, Any]] = pq.read_table(folder).to_pylist()
    return sorted(rows, key=lambda row: row["id"])


def greedy(num: int) -> list[tuple[int, str]]:
    """Return id and text of `prompts`, answered."""
    return [(row, greedy_text(f"row {row}", NUM_TOKENS)) for row in range(num)]


async def until(fact: Callable[[], Awaitable[bool] | bool]) -> None:
    """Wait for something that tells nobody when it happens."""
    while not (await seen if isinstance(seen := fact(), Awaitable) else seen):
        await asyncio.sleep(0.05)


def stage_workers() -> list[psutil.Process]:
    """Return the processes of this run's cluster that run the stage."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("MapWorker(MapBatches(Generate))" in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_file_to_file(model: str, tmp_path: Path) -> None:
    """Rows of a JSON Lines file become rows of Parquet files, each with all it had and with its answer."""
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"id": row, "prompt": f"row {row}"}) + "\n" for row in range(30)))
    answered(ray.data.read_json(str(source)), model).write_parquet(str(tmp_path / "out"))
    rows = read(tmp_path / "out")
    assert [(row["id"], row["text"]) for row in rows] == greedy(30)
    assert [row["prompt"] for row in rows] == [f"row {row}" for row in range(30)]
    assert {(row["finish_reason"], row["prompt_tokens"], row["completion_tokens"]) for row in rows} == {
        ("length", 2, NUM_TOKENS)
    }
    assert {row["slot"] for row in rows} == {0, 1}
    assert {(row["error_type"], row["error"]) for row in rows} == {(None, None)}


def test_conversations_with_their_own_parameters(model: str, tmp_path: Path) -> None:
    """Conversations are answered, each with the parameters of its row, and with the defaults where those are null."""
    conversations = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two", "name": "Ann"}]]
    table = pa.table(
        {"id": [0, 1], "messages": conversations, "max_new_tokens": [4, None], "stop_words": [None, ["x"]]}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    answered(
        ray.data.read_parquet(str(tmp_path / "in.parquet")),
        model,
        prompt_column=None,
        messages_column="messages",
        parameter_columns=["max_new_tokens", "stop_words"],
        prefix="answer_",
    ).write_parquet(str(tmp_path / "out"))
    rows = read(tmp_path / "out")
    assert [row["answer_text"] for row in rows] == [
        greedy_text("user: one\n", 4),
        greedy_text("user: two\n", NUM_TOKENS),
    ]
    assert rows[0].keys() == {*table.column_names, *(f"answer_{name}" for name in OUTPUT_COLUMNS)}


def test_bad_rows(model: str) -> None:
    """A row that is wrong or fails has its error and no text; all others are answered."""
    items = [
        {"id": 0, "prompt": None, "temperature": None},
        {"id": 1, "prompt": "", "temperature": None},
        {"id": 2, "prompt": "x", "temperature": -1.0},
        {"id": 3, "prompt": "word " * 9000, "temperature": None},
        {"id": 4, "prompt": "FAIL", "temperature": None},
        {"id": 5, "prompt": "row 5", "temperature": 0.0},
    ]
    dataset = ray.data.from_items(items, override_num_blocks=1)
    rows = sorted(answered(dataset, model, parameter_columns=["temperature"]).take_all(), key=lambda row: row["id"])
    assert [row["error_type"] for row in rows] == [
        "InvalidRequestError",
        "InvalidRequestError",
        "InvalidRequestError",
        "ContextLengthError",
        "EngineError",
        None,
    ]
    assert [row["text"] for row in rows] == [None] * 5 + [greedy_text("row 5", NUM_TOKENS)]
    assert "null" in rows[0]["error"]
    assert "temperature" in rows[2]["error"]
    assert rows[5]["error"] is None


async def test_kill_of_a_stage_worker(model: str, tmp_path: Path) -> None:
    """Kill -9 of the stage's worker in mid-job: every row is there once, and answered."""
    job = asyncio.create_task(asyncio.to_thread(answered(prompts(240, 12), model).write_parquet, str(tmp_path)))
    await until(lambda: bool(list(tmp_path.glob("*.parquet"))))
    workers = stage_workers()
    assert workers
    for worker in workers:  # also those of earlier tests that are about to end
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            worker.kill()
    assert not job.done()
    await job
    assert [(row["id"], row["text"]) for row in read(tmp_path)] == greedy(240)


async def test_kill_of_an_engine_actor(model: str, tmp_path: Path) -> None:
    """Kill -9 of one of two engine actors in mid-job: every row is answered."""
    async with await ServedPool.open(model) as served:
        await served.ready()
        pid = served.pool.statistics().slots[0].pid
        assert pid is not None
        job = asyncio.create_task(asyncio.to_thread(answered(prompts(240, 12), model).write_parquet, str(tmp_path)))
        await until(lambda: bool(list(tmp_path.glob("*.parquet"))))
        os.kill(pid, signal.SIGKILL)
        await job
    rows = read(tmp_path)
    assert {row["error"] for row in rows} == {None}
    assert [(row["id"], row["text"]) for row in rows] == greedy(240)


@pytest.mark.parametrize(
    ("batch_size", "calls", "block"), [(10, 1, 100), (None, 4, 10)], ids=["of one task", "of several tasks"]
)
async def test_batches_overlap(cluster: str, batch_size: int | None, calls: int, block: int) -> None:
    """A worker answers several batches of 10 rows at a time, and never more than four.

    What comes first is there while most rows have not been read, and leaving then ends the job.
    """
    num_rows = 4000

    def begin(dataset: Dataset) -> Iterator[pa.Table]:
        batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
        assert next(batches).num_rows
        return batches

    with serving(config("wide", tokens_per_s=20)) as model:
        async with await ServedPool.open(model) as served:
            batches = await asyncio.to_thread(
                begin, answered(prompts(num_rows, num_rows // block), model, batch_size=batch_size, calls=calls)
            )
            states: list[ModelState] = []

            async def overlapping() -> bool:
                states.append(await served.state())
                return states[-1].num_running > 10

            await until(overlapping)
            assert max(state.num_running + state.num_waiting for state in states) <= 4 * 10
            assert states[-1].num_finished < num_rows / 2
            del batches

            async def idle() -> bool:
                return not (await served.state()).num_running

            await until(idle)
            assert (await served.state()).num_finished < num_rows


async def test_workers_leave(model: str) -> None:
    """When a dataset is done with, the worker's process ends, though the model is served on."""
    dataset = answered(prompts(4, 1), model)
    assert len(await asyncio.to_thread(dataset.take_all)) == 4
    workers = stage_workers()
    del dataset
    await until(lambda: not any(worker.is_running() for worker in workers))


def test_a_shuffle_leaves_empty_blocks(model: str) -> None:
    """Blocks without rows, and maybe without columns, pass."""
    few = prompts(8, 4).filter(expr=col("id") == 3).repartition(4, shuffle=True)
    assert [row["text"] for row in answered(few, model).take_all()] == [greedy_text("row 3", NUM_TOKENS)]


async def test_more_rows_than_the_queue_takes(cluster: str) -> None:
    """A batch with more rows than the pool's queue takes waits for room in it."""
    with serving(config("narrow", replicas=1, max_queued=4, capacity=2, tokens_per_s=200)) as model:
        stage = Generate(model, prompt_column="prompt", max_new_tokens=2)
        batches = [pa.table({"prompt": [f"{batch} {row}" for row in range(40)]}) for batch in range(2)]
        tables = await asyncio.gather(*map(stage, batches))
        assert [table["error"].null_count for table in tables] == [40, 40]
        stage.__del__()


async def test_a_worker_comes_back(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that had nothing to do for a while has left the model, and joins it again for the next batch."""
    monkeypatch.setattr("raylm.data._IDLE_S", 0.1)
    with serving(config("seldom", replicas=1, tokens_per_s=200)) as model:
        async with await ServedPool.open(model) as served:
            stage = Generate(model, prompt_column="prompt", max_new_tokens=2)
            for _ in range(3):
                assert (await stage(pa.table({"prompt": ["x"]})))["error"].null_count == 1

                async def left() -> bool:
                    return (await served.state()).num_clients == 2  # the one of `serving`, and ours

                await until(left)
            stage.__del__()


async def test_a_model_that_is_served_again(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy worker whose model is ended, and served again, answers with the new one."""
    monkeypatch.setattr("raylm.data._IDLE_S", 3600.0)  # so busy that it never leaves
    settings = config("twice", replicas=1, tokens_per_s=200)
    stage = Generate("twice", prompt_column="prompt", max_new_tokens=2)
    for _ in range(2):
        with serving(settings):
            table = await stage(pa.table({"prompt": ["x"]}))
            assert table["error"].to_pylist() == [None]
            served = stage._served
        assert served is not None
        await until(lambda served=served: not served.pool.can_work)  # type: ignore[misc]
    stage.__del__()


def test_serving_leaves_what_it_did_not_begin(model: str) -> None:
    """A model that is served already is used, and goes on after the block."""
    with serving(config("sim", capacity=8, tokens_per_s=50)) as name:
        assert name == model
    assert model in served_models()


def test_serving_ends_what_it_began(cluster: str) -> None:
    """A model that is begun ends with the block, also when that ends by an error."""

    def fail() -> None:
        with serving(config("short", replicas=1)):
            assert "short" in served_models()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert "short" not in served_models()


def test_serving_what_is_served_otherwise(model: str) -> None:
    """Another model's name is refused, and that model goes on."""
    with pytest.raises(InvalidRequestError, match="other settings"), serving(config("sim", replicas=1)):
        pass
    assert model in served_models()


async def test_a_model_that_nobody_serves(cluster: str) -> None:
    """It ends the job, and says what is served."""
    stage = Generate("nobody", prompt_column="prompt")
    with pytest.raises(ModelNotFoundError, match="no model 'nobody' is served"):
        await stage(pa.table({"prompt": ["x"]}))
    stage.__del__()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "prompt_column or messages_column"),
        ({"prompt_column": "prompt", "heat": 1}, "unknown parameter heat"),
        ({"prompt_column": "prompt", "temperature": -1}, "temperature: expected"),
        ({"prompt_column": "prompt", "parameter_columns": ["heat"]}, "unknown parameter heat"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], says: str) -> None:
    """An argument that is wrong for all rows is refused before there are any."""
    with pytest.raises(InvalidRequestError, match=says):
        Generate("sim", **arguments)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (pa.table({"question": ["x"]}), "no column prompt; it has question"),
        (pa.table({"prompt": ["x"], "text": ["y"]}), "has a column text already; rename it, or give a prefix"),
        ({"prompt": ["x"]}, "batch_format='pyarrow'"),
    ],
)
async def test_wrong_batches(batch: Any, says: str) -> None:
    """A dataset that does not fit the stage is refused as a whole."""
    stage = Generate("sim", prompt_column="prompt")
    with pytest.raises(InvalidRequestError, match=says):
        await stage(batch)
    stage.__del__()
