"""lm-evaluation-harness as its users run it: a command that puts a task's questions to an endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_TASKS = Path("docs/guides/evaluation")


@dataclass(frozen=True)
class Evaluation:
    """What the harness made of its tasks.

    Attributes:
        scores: By task, each metric by `name,filter`.
        samples: By task, what was asked and answered, in the order of the data.
    """

    scores: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


def evaluate(
    model: str, settings: Mapping[str, object], tasks: Sequence[str], folder: Path, *options: str
) -> Evaluation:
    """Run tasks of the guide on evaluation.

    Args:
        model: The harness's word for a kind of model, such as `local-completions`.
        settings: Its `--model_args`.
        tasks: Names of the files in `docs/guides/evaluation`, without `.yaml`.
        folder: An empty folder for its results and caches.
        options: More of the command line.
    """
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    command += ["--tasks", *(str(_TASKS / f"{task}.yaml") for task in tasks)]
    command += ["--output_path", str(folder), "--log_samples", *options]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=_ROOT, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert "API request failed" not in done.stderr, done.stderr  # it asks three times before it gives up
    (results,) = folder.glob("*/results_*.json")
    samples = {}
    for task in tasks:
        (file,) = folder.glob(f"*/samples_{task}_*.jsonl")
        found = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(found, key=lambda sample: sample["doc_id"])
    return Evaluation(json.loads(results.read_text())["results"], samples)
