"""Batch jobs that run on what is being served: on its actors, and over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.command import ServeCommand

NUM_ROWS = 40


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of two parameters each, one of them twice."""
    file = tmp_path / "rows.jsonl"
    lines = [{"id": f"row {number}", "prompt": f"words of row {number // 2 * 2}"} for number in range(NUM_ROWS)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def batch(rows: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    command = [sys.executable, "-c", "from raylm.cli import main; main()", "batch", str(rows)]
    command += [f"--output={rows.parent / 'answers.jsonl'}", "--temperature=0", "--max-new-tokens=12", *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, env={**os.environ, **environment}
    )


def answers(rows: Path) -> list[dict[str, object]]:
    """Return what it has written."""
    return [json.loads(line) for line in (rows.parent / "answers.jsonl").read_text().splitlines()]


def test_on_the_pool(simulated_endpoint: ServeCommand, rows: Path) -> None:
    """`--pool` asks the actors of a model that is served, which go on for others; a second run asks nothing."""
    options = ("--pool=sim", f"--address={simulated_endpoint.cluster}")
    result = batch(rows, *options)
    assert result.returncode == 0, result.stderr
    found = answers(rows)
    assert [answer["id"] for answer in found] == [f"row {number}" for number in range(NUM_ROWS)]
    assert [found[number]["text"] for number in range(0, NUM_ROWS, 2)] == [
        found[number]["text"] for number in range(1, NUM_ROWS, 2)
    ]
    before = simulated_endpoint.state()["num_finished"]
    again = batch(rows, *options)
    assert again.returncode == 0, again.stderr
    assert simulated_endpoint.state()["num_finished"] == before
    body = {"inputs": "words of row 0", "temperature": 0, "max_new_tokens": 12}
    assert simulated_endpoint.post("/generate", body).json()["text"] == found[0]["text"]


def test_over_http(simulated_endpoint: ServeCommand, rows: Path) -> None:
    """`--url` asks a server of OpenAI's protocol, and gets what the actors behind it say."""
    result = batch(rows, f"--url={simulated_endpoint.url}", "--model=sim", "--address=local")
    assert result.returncode == 0, result.stderr
    found = answers(rows)
    assert [answer["id"] for answer in found] == [f"row {number}" for number in range(NUM_ROWS)]
    body = {"inputs": "words of row 0", "temperature": 0, "max_new_tokens": 12}
    assert simulated_endpoint.post("/generate", body).json()["text"] == found[0]["text"]


def test_a_pool_that_is_not_served(simulated_endpoint: ServeCommand, rows: Path) -> None:
    """A wrong name is an error that says which ones there are, and nothing is written."""
    result = batch(rows, "--pool=other", f"--address={simulated_endpoint.cluster}")
    assert result.returncode == 2
    assert "no model 'other' is served on this cluster; served are: sim" in result.stderr
    assert not (rows.parent / "answers.jsonl").exists()
