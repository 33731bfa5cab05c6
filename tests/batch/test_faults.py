"""What a job survives: real processes that are killed, and the same command again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from raylm import AsyncLMDeployPipeline, SimulatedConfig
from raylm.batch import ledger_path, run_batch_async
from raylm.engines.simulated import greedy_text

RAYLM = str(Path(sys.executable).with_name("raylm"))
NUM_ROWS = 300
ROW_TOKENS = 20


def engine(**settings: Any) -> str:
    """Return the option that makes it the simulated engine, which takes four seconds for all rows by default."""
    return "--engine-config=" + json.dumps({"kind": "simulated", "tokens_per_s": 100, "capacity": 16, **settings})


ENDLESS = (engine(faults=[{"match": f"row {NUM_ROWS - 1}", "action": "fail"}]), "--retries=1000000")
"""Options of a job that is at work however late it is looked at: its last row fails, and is tried again for ever."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows that differ."""
    path = tmp_path / "in.jsonl"
    rows = [{"prompt": f"row {number}", "max_new_tokens": ROW_TOKENS} for number in range(NUM_ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def batch(source: Path, *args: str, cluster: str | None = None, **more: str) -> Iterator[subprocess.Popen[str]]:
    """Run `raylm batch`, in a process group of its own."""
    outer = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | more
    env = outer if cluster is None else {**outer, "RAY_ADDRESS": cluster}
    command = [RAYLM, "batch", str(source), f"--output={source.parent / 'out'}", "--temperature=0", *args]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return when `condition` is true. The test's timeout is the limit."""
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)


def num_answers(source: Path) -> int:
    """Return how many whole lines the ledger has."""
    path = ledger_path(source.parent / "out")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_output(source: Path) -> None:
    """Every row is there once, in order, with the text of an undisturbed run."""
    rows = [json.loads(line) for line in (source.parent / "out").read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == [
        (number, greedy_text(f"row {number - 1}", ROW_TOKENS)) for number in range(1, NUM_ROWS + 1)
    ]


def test_a_driver_that_is_killed_three_times(cluster: str, source: Path) -> None:
    """However often the driver is killed, each run asks only what none before it has had an answer to."""
    moments = sorted(random.Random(7).sample(range(20, NUM_ROWS - 40), 3))
    for moment in moments:
        with batch(source, *ENDLESS, cluster=cluster) as process:
            until(lambda moment=moment: num_answers(source) > moment, process)  # type: ignore[misc]
            process.kill()
        assert not (source.parent / "out").exists()
    with batch(source, engine(), cluster=cluster) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"{NUM_ROWS} rows, 0 failed" in said
    assert int(said.split(" answered before")[0].rpartition(", ")[2]) > moments[-1] - len(moments)
    check_output(source)


async def test_an_actor_that_is_killed(cluster: str, source: Path) -> None:
    """An actor's death in mid-job costs no row and no place in the order."""
    config = SimulatedConfig(tokens_per_s=100, capacity=16)
    killed = False
    async with AsyncLMDeployPipeline("simulated", replicas=2, backend_config=config, temperature=0) as pipeline:
        pid = pipeline.statistics().slots[0].pid
        assert pid is not None

        def begun(tally: Any) -> None:
            def strike() -> None:
                nonlocal killed
                if tally.num_answered < 50:
                    pipeline.pool.loop.call_later(0.02, strike)
                else:
                    os.kill(pid, signal.SIGKILL)
                    killed = True

            strike()

        tally = await run_batch_async(pipeline, source, source.parent / "out", begun=begun)
    assert killed
    assert (tally.num_answered, tally.num_failed) == (NUM_ROWS, 0)
    check_output(source)


def test_ray_that_is_killed(source: Path) -> None:
    """When all of Ray dies under it, the driver ends and says so; the same command then does the rest."""
    # Ray ends a driver that has lost its cluster for so long, a minute by itself.
    with batch(source, *ENDLESS, "--address=local", RAY_gcs_rpc_server_reconnect_timeout_s="5") as process:
        until(lambda: num_answers(source) > 60, process)
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has gone with another one
                child.kill()
        process.communicate(timeout=120)
    assert process.returncode != 0
    answered = num_answers(source)
    with batch(source, engine(), "--address=local") as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert int(said.split(" answered before")[0].rpartition(", ")[2]) >= answered - 2
    check_output(source)


def test_two_runs_on_one_output(cluster: str, source: Path) -> None:
    """A second run on the same output is refused before it starts anything, and told who has it; the first goes on."""
    with batch(source, *ENDLESS, cluster=cluster) as first:
        until(lambda: num_answers(source) > 10, first)
        with batch(source, engine(tokens_per_s=10), cluster=cluster) as second:
            _, said = second.communicate(timeout=120)
        assert second.returncode == 3
        assert f"is being written by process {first.pid} on" in said
        assert first.poll() is None
        first.kill()
    with batch(source, engine(), cluster=cluster) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    check_output(source)


def test_a_full_disk(cluster: str, source: Path) -> None:
    """A ledger that cannot grow ends the job with the reason, and the same command goes on when there is room."""
    limited = f"ulimit -f 64; exec {RAYLM} batch {source} --output={source.parent / 'out'} --temperature=0 '{engine()}'"
    result = subprocess.run(
        ["bash", "-c", limited],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "RAY_ADDRESS": cluster},
    )
    assert result.returncode == 3, result.stderr
    assert "File too large" in result.stderr
    with batch(source, engine(), cluster=cluster) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    check_output(source)


def test_a_report_that_cannot_be_written(cluster: str, source: Path) -> None:
    """A job that is complete is so without its report, which it says is missing."""
    (source.parent / "out.report.html.partial").mkdir()
    with batch(source, engine(tokens_per_s=10_000), cluster=cluster) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "there is no report: " in said
    check_output(source)


QUESTIONS = Path(__file__).parents[2] / "docs" / "guides" / "batch" / "questions.csv"


def test_an_evaluation_on_the_real_model(cluster: str, tmp_path: Path) -> None:
    """Questions to a real model, from a driver that was killed, have the answers of an undisturbed run."""
    source = tmp_path / "questions.csv"
    source.write_text("".join(QUESTIONS.read_text().splitlines(keepends=True)[:41]))

    def run(name: str, kill_at: int | None) -> None:
        command = [
            RAYLM,
            "batch",
            str(source),
            f"--output={tmp_path / name}",
            "--message={question} Answer in one sentence.",
            "--temperature=0",
            "--max-new-tokens=8",
            # Batches of any size then give the same numbers.
            '--engine-config={"kind": "openvino", "path": "smollm2-135m-instruct", "deterministic": true}',
        ]
        ledger = ledger_path(tmp_path / name)
        env = {**os.environ, "RAY_ADDRESS": cluster}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True) as process:
            if kill_at is not None:
                until(lambda: ledger.exists() and ledger.read_bytes().count(b"\n") > kill_at, process)
                process.kill()
                return
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said

    run("killed.csv", random.Random(5).randrange(5, 30))
    run("killed.csv", None)
    run("undisturbed.csv", None)
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()
