"""What an operator does on a cluster that runs: `raylm up`, `status`, `top`, `logs`, `scale`, `drain`, `down`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from raylm.ports import free_port, holder
from tests.serve.command import HAPROXY_PORTS, still_starting, wait_for

ENGINE = {"kind": "simulated", "tokens_per_s": 200, "model_name": "first"}

# A shell that started the tests in the background has SIGINT ignored, and children inherit that.
_RAYLM = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from raylm.cli import main; main()",
]
_MAIN = """import ctypes, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it ends with the tests, however these end
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

_SERVE_FILE = Path(__file__).parents[2] / "cluster" / "serve.yaml"

_OTHERS = """import sys, ray
from ray import serve
ray.init(sys.argv[1], log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
"""
"""Somebody's own Serve, which lasts."""

_TIMEOUT_S = 180.0

wait = partial(wait_for, timeout_s=_TIMEOUT_S)


class Cluster:
    """A Ray cluster that lasts, as `ray start` makes one, and the command line on it."""

    def __init__(self, folder: Path, proxy: str, environment: Mapping[str, str]) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {**os.environ, **{name: str(free_port()) for name in HAPROXY_PORTS}}
        self.environment |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # of the 30 s that each end would take
            "RAY_SERVE_ENABLE_HA_PROXY": str(int(proxy == "haproxy")),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).parent / "raylm-haproxy"),
            **environment,
        }
        self._config = folder / "serve.yaml"
        self.dashboard_port = free_port()
        command = ["ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=8"]
        command += [f"--port={self.address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1"]
        command += [
            f"--temp-dir={folder}",
            f"--object-store-memory={100 * 2**20}",
            f"--dashboard-port={self.dashboard_port}",
        ]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--dashboard-agent-grpc-port={free_port()}"]
        command += ["--disable-usage-stats"]
        log = folder / "start.log"

        def start() -> subprocess.Popen[bytes]:
            with log.open("wb") as said:
                return subprocess.Popen(
                    [sys.executable, "-c", _MAIN, *command], stdout=said, stderr=said, env=self.environment
                )

        def is_there() -> bool:
            self.process = still_starting(self.process, log, start)
            return "Ray runtime started" in log.read_text()

        self.process = start()
        wait(is_there)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        return subprocess.run(
            [*_RAYLM, *arguments, f"--address={self.address}"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=self.environment,
        )

    def told(self, *arguments: str) -> str:
        """Run a verb that is to succeed; return what it prints."""
        result = self.run(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def up(self, *engines: dict[str, Any], max_queued: int = 1000) -> None:
        """Have a model consist of these engines."""
        model = {"name": "sim", "engines": list(engines), "pool": {"max_queued": max_queued}}
        self._config.write_text(yaml.safe_dump({"models": [model]}))
        self.told("up", str(self._config), f"--port={self.port}")

    def begin_up(self, engine: dict[str, Any], **settings: Any) -> subprocess.Popen[str]:
        """Begin to have a model consist of this engine; nobody waits for that."""
        with tempfile.NamedTemporaryFile("w", dir=self._config.parent, suffix=".yaml", delete=False) as config:
            yaml.safe_dump({"models": [{"name": "sim", "engines": [engine], **settings}]}, config)
        return subprocess.Popen(
            [*_RAYLM, "up", config.name, f"--port={self.port}", f"--address={self.address}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    @contextmanager
    def serve(self, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """Run `raylm serve` until the block is left; yield it and what it says when it is up, or of why it is not."""
        self._config.write_text(yaml.safe_dump({"models": [{"name": "sim", "engines": [ENGINE]}]}))
        with subprocess.Popen(
            [*_RAYLM, "serve", str(self._config), f"--port={port}", f"--address={self.address}"],
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        ) as process:
            assert process.stderr is not None
            said = ""
            while not said.endswith("Ctrl-C ends it\n") and (line := process.stderr.readline()):
                said += line
            try:
                yield process, said
            finally:
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=_TIMEOUT_S)

    def deploy(self, *engines: dict[str, Any]) -> None:
        """Have a model consist of these engines, or of what the file in `cluster/` has, as `serve deploy` does it."""
        settings = yaml.safe_load(_SERVE_FILE.read_text())
        settings["http_options"] = {"host": "127.0.0.1", "port": self.port}
        if engines:
            settings["applications"][0]["args"]["models"] = [{"name": "sim", "engines": list(engines)}]
        self._config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(self._config)]
        command += ["--address", f"http://127.0.0.1:{self.dashboard_port}"]

        def deployed() -> bool:  # its dashboard comes up some seconds after the cluster
            result = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False, env=self.environment)
            return result.returncode == 0

        wait(deployed)

    def slots(self) -> list[dict[str, Any]]:
        """Return the model's slots, as its endpoint tells them: a process that asks takes seconds."""
        while (told := requests.get(f"http://127.0.0.1:{self.port}/state", timeout=60)).status_code == 503:
            pass  # the manager has not answered for long
        (model,) = told.json()["models"]
        slots: list[dict[str, Any]] = model["slots"]
        return slots

    def slots_up(self) -> list[dict[str, Any]]:
        """Return the model's slots when all of them are up: a gateway that is new sees that later than `up` does."""

        def slots_up() -> list[dict[str, Any]]:
            slots = self.slots()
            return slots if all(slot["state"] == "up" for slot in slots) else []

        return wait(slots_up)

    def are_up(self, *numbers: int) -> None:
        """Wait until the model has these slots, all of them up."""
        wait(lambda: [(slot["slot"], slot["state"]) for slot in self.slots()] == [(n, "up") for n in numbers])

    def numbers(self) -> list[int]:
        """Return the numbers of the model's slots."""
        return [slot["slot"] for slot in self.slots()]

    def is_healthy(self) -> bool:
        """Return whether the endpoint answers."""
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).status_code == 200
        except (requests.ConnectionError, requests.Timeout):  # Serve keeps who asks while its first replica starts
            return False

    def generate(self, words: str, num_tokens: int = 40) -> dict[str, Any]:
        """Ask the model over HTTP."""
        body = {"inputs": words, "temperature": 0, "max_new_tokens": num_tokens}
        response = requests.post(f"http://127.0.0.1:{self.port}/generate", json=body, timeout=120)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def close(self) -> None:
        """End all of it."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@contextmanager
def a_cluster(proxy: str = "python", **environment: str) -> Iterator[Cluster]:
    """A cluster on which nothing of raylm runs, and where Serve is going to have this proxy.

    Args:
        proxy: `haproxy` or `python`.
        environment: More of its nodes' environment.
    """
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # sockets take short names
        cluster = Cluster(Path(folder), proxy, environment)
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Cluster]:
    """A cluster that serves a model with two actors."""
    with a_cluster() as cluster:
        cluster.up({**ENGINE, "replicas": 2})
        yield cluster


@pytest.fixture(scope="module")
def lasting() -> Iterator[Cluster]:
    """A cluster that lasts as long as this file."""
    with a_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(lasting: Cluster) -> Iterator[Cluster]:
    """A cluster on which nothing of raylm runs."""
    lasting.port = free_port()  # the last one may not be free yet, or somebody else's by now
    yield lasting
    lasting.told("down")


def test_what_is_up_stays(served: Cluster) -> None:
    """The model goes on when `up` has ended, and answers over HTTP."""
    assert served.generate("one two three")["text"] != ""


def test_status(served: Cluster) -> None:
    """It has a line for each slot, with what it is and does."""
    text = wait(lambda: "sim  2 of 2 up" in (text := served.told("status")) and text)
    assert text.count("simulated, pid") == 2
    (model,) = json.loads(served.told("status", "--json"))
    assert [slot["pid"] for slot in model["slots"]] == [slot["pid"] for slot in served.slots_up()]


def test_scale_and_drain(served: Cluster) -> None:
    """More actors get new slots, a drained one is replaced by a new one, and fewer are fewer."""
    one, two = served.numbers()
    served.told("scale", "sim", "3")
    three = max(two, one) + 1
    served.are_up(one, two, three)
    served.told("drain", "sim", str(two))
    served.are_up(one, three, three + 1)
    served.told("scale", "sim", "2")
    wait(lambda: len(served.slots()) == 2)
    assert served.generate("still there")["text"] != ""


def test_update_over_http(served: Cluster) -> None:
    """`up` with other settings replaces actors and gateways, and no request is lost, however long it takes."""
    over = threading.Event()

    def ask(worker: int) -> list[str]:
        answers = []
        while not over.is_set():
            answers.append(served.generate(f"worker {worker} request {len(answers)}")["receipt"]["model"])
        return answers

    with ThreadPoolExecutor(9) as pool:
        long = pool.submit(served.generate, "a long one", 6000)
        asking = [pool.submit(ask, worker) for worker in range(8)]
        try:
            served.up({**ENGINE, "model_name": "second", "replicas": 2}, max_queued=123)
        finally:
            over.set()
        answers = [each.result() for each in asking]
        assert long.result()["usage"]["completion_tokens"] == 6000
    assert "first" in {model for each in answers for model in each}
    assert served.generate("after")["receipt"]["model"] == "second"
    assert {slot["model"] for slot in served.slots_up()} == {"second"}


def test_logs(served: Cluster) -> None:
    """The log of an actor's process can be read, and a slot that is not there is named."""
    number = str(served.numbers()[0])
    wait(lambda: served.run("logs", "sim", number).returncode == 0)  # the dashboard hears of an actor after a while
    result = served.run("logs", "sim", "99")
    assert result.returncode == 2
    assert "sim has no slot 99" in result.stderr


def test_top(served: Cluster) -> None:
    """It shows rates, again and again, until Ctrl-C."""
    with subprocess.Popen(
        [*_RAYLM, "top", "--interval=0.2", f"--address={served.address}"],
        stdout=subprocess.PIPE,
        text=True,
        env=served.environment,
    ) as process:
        assert process.stdout is not None
        shown = ""
        while shown.count("tok/s") < 3 or "simulated" not in shown or "2 of 2 up" not in shown:
            line = process.stdout.readline()
            assert line, shown
            shown += line
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert "2 of 2 up" in shown


@pytest.mark.parametrize("arguments", [("scale", "other", "1"), ("drain", "other", "0"), ("logs", "other", "0")])
def test_a_model_that_is_not_served(served: Cluster, arguments: tuple[str, ...]) -> None:
    """Each verb says which ones there are."""
    result = served.run(*arguments)
    assert result.returncode == 2
    assert "no model 'other' is served on this cluster; served are: sim" in result.stderr


def test_a_command_that_is_killed_holds_nobody_up(served: Cluster) -> None:
    """While `up` waits for room, `up` and `down` are refused, and say who is at it; once it is killed, they are not."""
    engine = {**ENGINE, "model_name": "after", "replicas": 2}
    first = served.begin_up({**engine, "num_gpus": 1})  # there are none
    try:
        wait(lambda: "waiting" in [slot["state"] for slot in served.slots()])
        second = served.begin_up(engine)
        refusals = [second.communicate(timeout=_TIMEOUT_S)[1], served.run("down").stderr]
        assert second.returncode == 3
        for refusal in refusals:
            assert re.search(rf"process {first.pid} on \S+ is changing what this cluster serves", refusal)
    finally:
        first.kill()
        first.communicate()
    served.up(engine)
    assert served.generate("still there")["receipt"]["model"] == "after"


def test_two_at_once(cluster: Cluster) -> None:
    """Of two that start at the same moment one is refused, or waits until the other is done: never do both work."""
    names = ["left", "right"]
    with ThreadPoolExecutor() as threads:
        commands = [cluster.begin_up({**ENGINE, "model_name": name}) for name in names]
        outputs = list(threads.map(lambda command: command.communicate(timeout=_TIMEOUT_S)[1], commands))
    codes = [command.returncode for command in commands]
    assert sorted(codes) in ([0, 0], [0, 3]), outputs
    (slot,) = cluster.slots_up()
    if 3 in codes:
        refused = codes.index(3)
        other = commands[1 - refused].pid
        assert re.search(rf"process {other} on \S+ is changing what this cluster serves", outputs[refused])
        assert slot["model"] == names[1 - refused]
    assert slot["state"] == "up"
    assert cluster.generate("hello")["receipt"]["model"] == slot["model"]


def test_a_first_start_that_fails_is_corrected(cluster: Cluster) -> None:
    """The mended file is enough: nothing has to be ended first."""
    first = cluster.begin_up({**ENGINE, "num_gpus": 1}, pool={"placement_timeout_s": 0})  # there are none
    assert "does not fit" in first.communicate(timeout=_TIMEOUT_S)[1]
    assert first.returncode == 3
    wait(lambda: "does not fit" in cluster.told("status"))  # said by a manager that is not waited for
    cluster.up(ENGINE)
    assert cluster.generate("hello")["text"] != ""


_END = """
import asyncio, sys
from raylm.actors.cluster import connect
from raylm.actors.manager_actor import end
connect(sys.argv[1], start=False)
asyncio.run(end("sim"))
"""
_ASK_LATER = """
import sys, raylm
with raylm.connect("sim", address=sys.argv[1]) as chatbot:
    print(chatbot.generate("hello"), flush=True)
    sys.stdin.readline()
    try:
        chatbot.generate("hello again")
    except raylm.errors.ModelNotFoundError as error:
        print(error)
"""


def test_a_model_that_is_ended(cluster: Cluster) -> None:
    """Gateways and programs that have used it refuse requests, and say why; `up` serves it again."""
    cluster.up(ENGINE)
    subprocess.run([sys.executable, "-c", _END, cluster.address], check=True, env=cluster.environment)
    url = f"http://127.0.0.1:{cluster.port}"
    response = requests.post(f"{url}/generate", json={"inputs": "hello"}, timeout=60)
    assert (response.status_code, response.json()["error"]["type"]) == (404, "ModelNotFoundError")
    assert "model 'sim' is served no longer" in response.json()["error"]["message"]
    assert requests.get(f"{url}/v1/models", timeout=60).json()["data"] == []
    assert requests.get(f"{url}/state", timeout=60).json()["models"] == []
    assert not cluster.is_healthy()
    cluster.up(ENGINE)
    assert cluster.generate("hello")["text"] != ""
    program = subprocess.Popen(
        [sys.executable, "-c", _ASK_LATER, cluster.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=cluster.environment,
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline().strip()
        cluster.told("down")
        assert "model 'sim' is served no longer" in program.communicate("\n", timeout=_TIMEOUT_S)[0]
    finally:
        program.kill()
        program.wait()


def test_serve_deploy(cluster: Cluster) -> None:
    """The file in `cluster/` can be deployed, a changed one updates what runs, and `down` ends it."""
    cluster.deploy(ENGINE)
    wait(lambda: "sim  1 of 1 up" in cluster.told("status"))
    wait(cluster.is_healthy)
    assert cluster.generate("hello")["receipt"]["model"] == "first"
    cluster.deploy({**ENGINE, "model_name": "second"})
    wait(lambda: cluster.generate("hello")["receipt"]["model"] == "second")
    cluster.told("down")
    assert "nothing is served" in cluster.told("status")


def test_the_file_that_is_deployed() -> None:
    """It answers as it is, on nodes that have the environment which `cluster/` names, and the nodes ask for a token."""
    with a_cluster("haproxy", **_environment_of_nodes()) as cluster:
        cluster.deploy()
        wait(cluster.is_healthy)
        asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12}
        url = f"http://127.0.0.1:{cluster.port}/v1/chat/completions"
        answer = requests.post(url, json={**asked, "temperature": 0}, timeout=120)
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]
        refused = requests.post(url, data=b"{}", headers={"x-session-id": "\x80"}, timeout=60)
        assert refused.status_code == 400  # by what RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names
        dashboard = f"http://127.0.0.1:{cluster.dashboard_port}/api/serve/applications/"
        assert requests.get(dashboard, timeout=60).status_code == 401


def _environment_of_nodes() -> dict[str, str]:
    """Return what the README in `cluster/` has nodes export, and a token."""
    text = (_SERVE_FILE.parent / "README.md").read_text()
    exports = re.findall(
        r"^export RAY_.*$", text.partition("## `serve.yaml`")[2].partition("ray start")[0], re.MULTILINE
    )
    assert len(exports) == 4
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = ["bash", "-c", "\n".join([*exports, "exec env -0"])]
    told = subprocess.run(shell, env={"PATH": path}, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = dict(line.split("=", 1) for line in told.split("\0") if line.startswith("RAY_"))
    return {**found, "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}


def test_down_leaves_nothing(cluster: Cluster) -> None:
    """No actor of raylm or Serve, and no port, is left; the cluster is."""
    cluster.up(ENGINE)
    before = [slot["pid"] for slot in cluster.slots_up()]
    assert "sim" in cluster.run("down").stderr
    wait(lambda: not any(map(psutil.pid_exists, before)))
    wait(lambda: holder(cluster.port) == "")
    check_nothing_serves(cluster)
    assert "nothing is served on this cluster" in cluster.told("status")
    assert "nothing was served" in cluster.run("down").stderr


def check_nothing_serves(cluster: Cluster) -> None:
    """See that neither actors nor HAProxy are left."""

    def left() -> list[str]:
        titles = []
        for process in psutil.Process(cluster.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                titles.append(" ".join(process.cmdline()))
        return re.findall(r"ray::(?:Engine|Manager|Session|Batch|Proxy)Actor|ray::Serve\w+|haproxy", " ".join(titles))

    wait(lambda: left() == [])


@pytest.mark.parametrize(("proxy", "same_port"), [("haproxy", True), ("python", False)])
def test_serve_after_one_that_was_killed(proxy: str, same_port: bool) -> None:
    """`raylm serve` on a cluster that lasts ends what one that was killed has left there, and then leaves nothing."""
    with a_cluster(proxy) as cluster:
        first_port = cluster.port
        with cluster.serve(first_port) as (first, _):
            assert cluster.generate("hello")["text"] != ""
            first.kill()
            first.wait()
        if not same_port:
            cluster.port = free_port()
        with cluster.serve(cluster.port) as (_, said):
            assert f"at http://127.0.0.1:{cluster.port} " in said
            assert cluster.generate("hello")["text"] != ""
            wait(lambda: same_port or holder(first_port) == "")
        wait(lambda: holder(cluster.port) == "")
        check_nothing_serves(cluster)


def test_serve_beside_others(cluster: Cluster) -> None:
    """`raylm serve` takes no place of a living one, or of what lasts. Where others have Serve listen, it says where."""
    with cluster.serve(cluster.port) as (first, _), cluster.serve(free_port()) as (second, said):
        assert second.wait(_TIMEOUT_S) == 3
        assert re.search(rf"process {first.pid} on \S+ serves on this cluster already", said)
        assert cluster.generate("still there")["text"] != ""
    cluster.up(ENGINE)
    with cluster.serve(free_port()) as (refused, said):
        assert refused.wait(_TIMEOUT_S) == 3
        assert "`raylm up`" in said
        assert cluster.generate("still there")["text"] != ""
    cluster.told("down")
    wait(lambda: holder(cluster.port) == "")
    subprocess.run(
        [sys.executable, "-c", _OTHERS, cluster.address, str(cluster.port)],
        check=True,
        capture_output=True,
        timeout=_TIMEOUT_S,
        env=cluster.environment,
    )
    for number in (signal.SIGKILL, signal.SIGINT):
        with cluster.serve(free_port()) as (process, said):
            assert f"at http://127.0.0.1:{cluster.port} " in said
            assert cluster.generate("hello")["text"] != ""
            process.send_signal(number)
            process.wait(_TIMEOUT_S)
    assert holder(cluster.port) != ""  # Serve was there before


def test_no_cluster() -> None:
    """Verbs for a cluster start none: they say how one is started."""
    result = subprocess.run(
        [*_RAYLM, "status", f"--address=127.0.0.1:{free_port()}"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 3
    assert "no Ray cluster answers at" in result.stderr
