"""What the tests of lmdeploy's engines have in common. They need an environment of their own: make test-lmdeploy."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests

from raylm.config import APIServerConfig, LMDeployConfig
from raylm.models import fingerprint, resolve
from raylm.ports import free_port
from tests.engines.conftest import MODEL
from tests.engines.triton_server import TritonServer, make_repository
from tests.serve.command import wait_for


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


def fingerprint_on_cpu() -> str:
    """Return the digest of the small model as the engines here load it."""
    return fingerprint(resolve(MODEL), "pytorch", "auto", 0, None)


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


def transformers_texts(folder: str, prompts: Sequence[str]) -> list[str]:
    """Return the texts of these tokens."""
    from tokenizers import Tokenizer  # only where lmdeploy is

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    return [tokenizer.decode(token_ids) for token_ids in transformers_answers(folder, prompts)]


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


class Server:
    """An api_server that is nobody's child but this test's, on a free port."""

    def __init__(self, folder: str) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "raylm.engines.lmdeploy_cpu", "serve", "api_server", folder]
        options = {"backend": "pytorch", "device": "cpu", "session-len": 512, "max-batch-size": 4, "num-gpu-blocks": 40}
        options |= {"server-name": "127.0.0.1", "server-port": port, "model-name": MODEL}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._process = subprocess.Popen([*command, *arguments], start_new_session=True)

    def wait(self) -> None:
        """Return when it has loaded its model."""
        wait_for(self._is_healthy, timeout_s=240)

    def _is_healthy(self) -> bool:
        assert self._process.poll() is None, f"the api_server ended with {self._process.returncode}"
        with suppress(requests.ConnectionError, requests.Timeout):  # it loads, and may be slow to answer then
            return requests.get(f"http://{self.address}/health", timeout=10).ok
        return False

    def kill(self) -> None:
        """Kill it, and the engine below it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(model_folder: str) -> Iterator[Server]:
    """An api_server at work."""
    server = Server(model_folder)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def triton(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A Triton server whose models, both the same one, ask the api_server."""
    relay = ("relay", {"127.0.0.1:0": server.address})
    with TritonServer(make_repository(tmp_path_factory.mktemp("models"), {"relay": relay, "vllm": relay})) as triton:
        yield triton
