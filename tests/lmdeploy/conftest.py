"""What the tests of lmdeploy's engines have in common. They need an environment of their own: make test-lmdeploy."""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from raylm.config import APIServerConfig, LMDeployConfig
from tests.engines.conftest import MODEL


@pytest.fixture(scope="session", autouse=True)
def _installed() -> None:
    """Skip everything where lmdeploy is not installed."""
    if find_spec("lmdeploy") is None:
        pytest.skip("lmdeploy is not installed; make test-lmdeploy installs it, which takes 8 GB")


def on_cpu(path: str = MODEL, **settings: object) -> LMDeployConfig:
    """Return settings of a small engine on CPU. Without prefix caching, what is counted does not depend on the past."""
    defaults = {
        "session_len": 1024,
        "max_batch_size": 8,
        "prefix_caching": False,
        "options": {"num_gpu_blocks": 160},  # 8 sequences of 1,024 tokens in blocks of 64, and some to spare
        "start_attempts": 1,
    }
    return LMDeployConfig(path=path, device="cpu", **{**defaults, **settings})


def server_on_cpu(path: str = MODEL, **settings: object) -> APIServerConfig:
    """Return settings of a small api_server on CPU, on a free port."""
    same = on_cpu(path).model_dump(exclude={"kind"})
    return APIServerConfig(**(same | {"server_port": 0, "start_timeout_s": 240} | settings))


def make_tiny_model(architecture: str, folder: Path) -> str:
    """Make a very small model of random weights and return its folder."""
    subprocess.run([sys.executable, "-m", "tests.lmdeploy.tiny", architecture, folder], check=True)
    return str(folder)


def transformers_answers(folder: str, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens that transformers generates greedily for each prompt, `NUM_TOKENS` at most."""
    command = [sys.executable, "-m", "tests.lmdeploy.reference", folder]
    done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=True)
    answers: list[list[int]] = json.loads(done.stdout)
    return answers


def transformers_scores(folder: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Return the log-probability of each text after its context, and whether each of its tokens is the likeliest."""
    command = [sys.executable, "-m", "tests.lmdeploy.reference", folder, "score"]
    done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, check=True)
    return [(logprob, greedy) for logprob, greedy in json.loads(done.stdout)]


@pytest.fixture(scope="session")
def model_folder() -> str:
    """The built-in model as a folder."""
    module = "raylm.engines.gguf"
    done = subprocess.run([sys.executable, "-m", module, MODEL], capture_output=True, text=True, check=True)
    return done.stdout.strip()
