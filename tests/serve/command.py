"""`raylm serve` as a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import requests
import yaml

from raylm.ports import free_port

_MAIN = """import ctypes, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends with the tests, however these end
signal.signal(signal.SIGINT, signal.default_int_handler)
from raylm.cli import main
sys.exit(main())
"""
HAPROXY_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
"""Without these, two commands that start at the same moment would both find the usual ones free."""

GATEWAY_PORTS = range(30000, 31001)
"""Where Serve has its replicas listen for HTTP. Their other ports are Ray's."""

_T = TypeVar("_T")

_START_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 120.0


class ServeCommand:
    """A running `raylm serve` with a Ray cluster of its own.

    Attributes:
        url: Where it answers.
        process: The command.
    """

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.url = url
        self.process = process
        self.log = log
        self._asked_to_end = False

    @property
    def cluster(self) -> str:
        """Address of its Ray cluster, which it has said."""
        return self.log.read_text().rpartition("Ray cluster ")[2].split()[0]

    def get(self, path: str, **rest: Any) -> requests.Response:
        """Send a GET request."""
        return requests.get(self.url + path, timeout=60, **rest)

    def post(self, path: str, json: Any = None, **rest: Any) -> requests.Response:
        """Send a POST request."""
        return requests.post(self.url + path, json=json, timeout=120, **rest)

    def delete(self, path: str) -> requests.Response:
        """Send a DELETE request."""
        return requests.delete(self.url + path, timeout=60)

    def told(self, path: str) -> requests.Response:
        """Return what a manager says, as soon as it does: where none has answered for long, the status is 503."""
        deadline = time.monotonic() + 120
        while (answer := self.get(path)).status_code == 503:
            assert time.monotonic() < deadline, answer.text
        return answer

    def state(self, model: int = 0) -> dict[str, Any]:
        """Return what `/state` says of one model."""
        state: dict[str, Any] = self.told("/state").json()["models"][model]
        return state

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the living processes of this endpoint's cluster whose title has `title` in it, the oldest first.

        Ray's titles: `ray::EngineActor`, `ray::ManagerActor`, `ray::SessionActor`, `ray::BatchActor`,
        `ray::ServeReplica:raylm:gateway`, `ray::HAProxyManager`, `ray::ProxyActor`; a method that runs comes after the
        class.
        """
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda process: process.create_time())

    @property
    def ended_by_itself(self) -> bool:
        """Whether it is gone though nobody has stopped it."""
        return self.process.poll() is not None and not self._asked_to_end

    def expect_end(self) -> None:
        """Take note that its end, when it comes, is meant."""
        self._asked_to_end = True

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """End it and return its exit code."""
        self.expect_end()
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(_STOP_TIMEOUT_S)


@contextmanager
def serve_command(
    config: dict[str, Any] | None, *, proxy: str = "haproxy", host: str = "127.0.0.1", env: dict[str, str] | None = None
) -> Iterator[ServeCommand]:
    """Run `raylm serve` with a configuration until the block is left.

    Args:
        config: What would be in the YAML file; None: there is none.
        proxy: As `--proxy`.
        host: As `--host`.
        env: More of the environment.
    """
    with tempfile.TemporaryDirectory(prefix="raylm-serve-") as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        log = Path(folder) / "log"
        port = free_port()
        # A shell that started the tests in the background has SIGINT ignored, and children inherit that.
        command = [
            sys.executable,
            "-c",
            _MAIN,
            "serve",
            *([] if config is None else [str(file)]),
            "--host",
            host,
            "--port",
            str(port),
            "--proxy",
            proxy,
            "--address",
            "local",
        ]

        def start() -> subprocess.Popen[bytes]:
            with log.open("wb") as said:
                return subprocess.Popen(
                    command,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    start_new_session=True,  # out of reach of whatever interrupts the tests' own group
                    env={**os.environ, **{name: str(free_port()) for name in HAPROXY_PORTS}, **(env or {})},
                )

        served = ServeCommand(f"http://{host}:{port}", start(), log)
        try:
            _wait_until_up(served, start)
            # Each gateway, in its turn, has seen for itself that the slots are up.
            wait_for(lambda: all(served.get("/health").status_code == 200 for _ in range(4)))
            yield served
            assert not served.ended_by_itself, f"raylm serve ended while tests used it:\n{log.read_text()}"
        finally:
            process = served.process
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            try:
                served.stop()
            finally:
                _, alive = psutil.wait_procs(children, timeout=15)
                for child in alive:  # a test has broken what should have ended them
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                process.kill()


def wait_for(condition: Callable[[], _T], timeout_s: float = 120) -> _T:
    """Return what a condition gives once it holds, which only asking tells."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.05)
    return found


def still_starting(
    process: subprocess.Popen[bytes], log: Path, start: Callable[[], subprocess.Popen[bytes]]
) -> subprocess.Popen[bytes]:
    """Return a process that starts a node of Ray, or the next one where Ray had given it up.

    Ray waits 30 s for a raylet, which on a busy machine may take longer.
    """
    if process.poll() is None:
        return process
    said = log.read_text()
    assert "timed out during startup" in said, f"it did not come up:\n{said}"
    return start()


def _wait_until_up(served: ServeCommand, start: Callable[[], subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while re.search(r"^serving .*\n", served.log.read_text(), re.MULTILINE) is None:
        served.process = still_starting(served.process, served.log, start)
        assert time.monotonic() < deadline, f"raylm serve took too long:\n{served.log.read_text()}"
        time.sleep(0.2)
