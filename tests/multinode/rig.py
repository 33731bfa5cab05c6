"""A Ray cluster of several machines, on this one, and everything that may happen to a machine.

A node is what `ray start` makes of it, in a network namespace of its own, with an address, a host name and a folder of
its own. A cable, which can be pulled, joins it to a switch, which is a namespace too: nothing of this is to be seen in
the machine's own network. GPUs are numbers. The head, which is node 0, has none; programs that use the cluster run on
it.

Where such namespaces cannot be made the nodes are those of `ray.cluster_utils.Cluster`, all on one address. They have
no cable, and their memory is the machine's; tests that need either are skipped.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
import pytest

from tests.actors.nodes import ENVIRONMENT, Nodes
from tests.actors.redis_server import RedisServer

NUM_NODES = 3
NUM_GPUS = 4
"""Of each node but the head."""

_STORE_BYTES = 80 * 2**20
_START_TIMEOUT_S = 180.0
_END_TIMEOUT_S = 120.0
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# Arguments: host name, memory cgroup or nothing, where cgroups are mounted, command.
_ENTER = """
hostname "$0"
if [ -n "$1" ]; then echo $$ > "$1/cgroup.procs" && mount --bind "$1" "$2"; fi || exit 1
shift 2
exec "$@"
"""

_FILL = """
import sys
limit, step, held = int(sys.argv[1]), 8 << 20, []
def used():  # as Ray counts: without the files that the kernel keeps in memory while there is room
    with open(sys.argv[2]) as usage, open(sys.argv[3]) as statistics:
        files = [int(line.split()[1]) for line in statistics if line.startswith(("inactive_file ", "active_file "))]
        return int(usage.read()) - sum(files)
while used() < limit:
    held.append(b"x" * step)
print("full", flush=True)
sys.stdin.read()
"""

_names = (f"rl{os.getpid()}{letter}" for letter in map(chr, itertools.count(ord("a"))))


@dataclass(eq=False)
class Node:
    """A machine.

    Attributes:
        number: 0 for the head.
        id: Ray's id of it.
        name: Its network namespace; "" where it has none.
        address: Its address.
        memory: Its memory cgroup, if its memory is limited.
    """

    number: int
    id: str = ""
    name: str = ""
    address: str = "127.0.0.1"
    memory: Path | None = None
    memory_bytes: int = 0
    processes_seen: list[psutil.Process] = field(default_factory=list)


class Rig:
    """The cluster. Use as a context manager.

    Args:
        num_nodes: Nodes beside the head.
        environment: More environment of all nodes, such as Ray's own settings.
        redis: Have the GCS keep what it knows in a Redis on the head, which is what Ray calls fault tolerance.

    Attributes:
        how: What its nodes are, for people.
        nodes: Those that have been started and not been killed, the head first.
        address: Where its GCS listens.
    """

    how = ""
    address = ""

    def __init__(
        self, num_nodes: int = NUM_NODES, environment: Mapping[str, str] | None = None, *, redis: bool = False
    ) -> None:
        self.environment = {**ENVIRONMENT, **(environment or {}), "PATH": _PATH}
        self._num_nodes = num_nodes
        self._redis = redis
        self.nodes: list[Node] = []
        self._joining = threading.Lock()  # several nodes may join at a time
        self._gcs: tuple[list[str], dict[str, str]] = ([], {})
        self._stack = ExitStack()
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def head(self) -> Node:
        """The node of the GCS and of programs."""
        return self.nodes[0]

    def node(self, node_id: str) -> Node:
        """Return the node of an id."""
        return next(node for node in self.nodes if node.id == node_id)

    def on_head(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs a command on the head."""
        raise NotImplementedError

    def add_node(self, num_gpus: int = NUM_GPUS, label: str = "any", memory_bytes: int = 0) -> Node:
        """Start a node; return when it has joined.

        Args:
            num_gpus: Its GPUs.
            label: Value of its label `kind`.
            memory_bytes: Limit on the memory of all its processes; 0: none.
        """
        raise NotImplementedError

    def processes(self, node: Node) -> list[psutil.Process]:
        """Return the living processes of a node."""
        raise NotImplementedError

    def kill_node(self, node: Node) -> None:
        """End all processes of a node at once, as when its power fails."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        while left := self.processes(node):  # some may just have been started by others
            assert time.monotonic() < deadline, f"processes of {node} do not end: {left}"
            # The raylet first: it would tell of its workers' deaths.
            for process in sorted(left, key=lambda process: not _is(process, "raylet")):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        self.nodes.remove(node)

    def gone(self, node: Node, *, but: Container[str] = ()) -> None:
        """Wait until a node that has died has no process left, and forget it.

        Args:
            node: The node.
            but: Titles of processes that may be left.
        """
        deadline = time.monotonic() + _END_TIMEOUT_S
        while left := [one for one in self.processes(node) if title(one) not in but]:
            assert time.monotonic() < deadline, f"orphans of {node}: {left}"
            time.sleep(0.05)
        self.nodes.remove(node)

    def until_idle(self) -> None:
        """Wait until no node has a process of an actor: Ray kills them without waiting for their end."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        for node in self.nodes:
            while left := [found for found in map(title, self.processes(node)) if "Actor" in found]:
                assert time.monotonic() < deadline, f"orphans on node {node.number}: {left}"
                time.sleep(0.05)

    def restore(self) -> None:
        """Start a node for each one that has died."""
        missing = self._num_nodes + 1 - len(self.nodes)
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda _: self.add_node(), range(missing)))

    def cut(self, node: Node) -> None:
        """Pull a node's cable. Skips the test where there is none."""
        raise NotImplementedError

    def join(self, node: Node) -> None:
        """Plug it in again."""
        raise NotImplementedError

    def cut_for(self, node: Node, seconds: float) -> None:
        """Do both, with a pause that does not depend on how busy this process is."""
        raise NotImplementedError

    def fill_memory(self, node: Node, share: float) -> subprocess.Popen[str]:
        """Have a process on a node take all of its memory but `1 - share`; it does until its stdin is closed."""
        raise NotImplementedError

    def kill_gcs(self) -> None:
        """End the GCS as a crash would."""
        gcs = next(process for process in self.processes(self.head) if _is(process, "gcs_server"))
        self._gcs = gcs.cmdline(), gcs.environ()
        gcs.kill()
        gcs.wait(_END_TIMEOUT_S)

    def restart_gcs(self) -> None:
        """Start the GCS again as it was, which is what restarts the head in a real cluster."""
        command, environment = self._gcs
        gcs = subprocess.Popen(
            self.on_head(command), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

        def end() -> None:
            gcs.kill()
            gcs.wait()

        self._stack.callback(end)

    def _start(self) -> None:
        raise NotImplementedError

    def _with_redis(self, within: Sequence[str] = ()) -> dict[str, str]:
        """Return the environment of the head; start its database first if it is to have one."""
        if not self._redis:
            return self.environment
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        server = RedisServer(Path(folder), within=within)
        server.start()
        self._stack.callback(server.kill)
        return {**self.environment, "RAY_REDIS_ADDRESS": f"127.0.0.1:{server.port}"}


class NamespaceRig(Rig):
    """Nodes with networks of their own."""

    how = "nodes in network namespaces"

    def _start(self) -> None:
        self._name = next(_names)
        self._numbers = itertools.count()
        self._folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))  # the paths of sockets have to be short
        self._stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        self._switch = f"{self._name}s"
        _add_namespace(self._switch)
        self._stack.callback(_remove_namespace, self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        head = self._plug()
        environment = self._with_redis(self._inside(head, []))
        options = ["--head", "--port=6379", "--include-dashboard=false", "--no-monitor", "--num-cpus=4"]
        self._ray(head, *options, environment=environment)
        self.address = f"{self.head.address}:6379"
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda _: self.add_node(), range(self._num_nodes)))

    def on_head(self, command: Sequence[str]) -> list[str]:
        return self._inside(self.head, command)

    def add_node(self, num_gpus: int = NUM_GPUS, label: str = "any", memory_bytes: int = 0) -> Node:
        node = self._plug()
        if memory_bytes:
            node.memory, node.memory_bytes = self._memory_cgroup(node.name, memory_bytes), memory_bytes
        self._ray(node, f"--address={self.address}", "--num-cpus=1", f"--num-gpus={num_gpus}", f"--labels=kind={label}")
        return node

    def processes(self, node: Node) -> list[psutil.Process]:
        return _processes(_pids(node.name))

    def cut(self, node: Node) -> None:
        _ip("-n", self._switch, "link", "set", node.name, "down")

    def join(self, node: Node) -> None:
        _ip("-n", self._switch, "link", "set", node.name, "up")

    def cut_for(self, node: Node, seconds: float) -> None:
        cable = f"ip -n {self._switch} link set {node.name}"
        command = f"{cable} down && sleep {seconds:g} && {cable} up"
        subprocess.run(["sh", "-c", command], check=True, env={**os.environ, "PATH": _PATH})

    def fill_memory(self, node: Node, share: float) -> subprocess.Popen[str]:
        assert node.memory is not None
        own = _memory_root()  # the node sees its own cgroup there, and no other
        arguments = [str(int(node.memory_bytes * share)), str(own / _MEMORY_FILES[1]), str(own / "memory.stat")]
        filler = subprocess.Popen(
            self._inside(node, [sys.executable, "-c", _FILL, *arguments]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        assert filler.stdout is not None
        assert filler.stdout.readline() == "full\n", f"it ended with {filler.wait()}"
        return filler

    def _plug(self) -> Node:
        """Make a node's network, and plug it in."""
        number = next(self._numbers)
        # Any network will do, for nothing else is on that switch. To people, one of each process is easier to read.
        network = f"10.{64 + os.getpid() // 256 % 128}.{os.getpid() % 256}"
        name = f"{self._name}{number}"
        node = Node(number, name=name, address=f"{network}.{number + 1}")
        _add_namespace(name)
        self._stack.callback(_remove_namespace, name)
        _ip("-n", self._switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self._switch, "link", "set", name, "master", "switch", "up")
        _ip("-n", name, "address", "add", f"{node.address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", name, "link", "set", interface, "up")
        return node

    def _ray(self, node: Node, *options: str, environment: Mapping[str, str] | None = None) -> None:
        """Run `ray start` on a node; returns when it has joined."""
        command = [str(Path(sys.executable).with_name("ray")), "start", *options]
        command += [f"--node-ip-address={node.address}", f"--temp-dir={self._folder / str(node.number)}"]
        command += [f"--object-store-memory={_STORE_BYTES}", "--include-log-monitor=false", "--disable-usage-stats"]
        done = subprocess.run(
            self._inside(node, command),
            env=environment or self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_START_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        node.id = _node_id(next(process for process in self.processes(node) if _is(process, "raylet")))
        with self._joining:
            self.nodes.append(node)
            self.nodes.sort(key=lambda known: known.number)

    def logs(self, node: Node) -> str:
        """Return what a node's raylet has written."""
        folder = self._folder / str(node.number) / "session_latest" / "logs"
        return "".join(file.read_text(errors="replace") for file in sorted(folder.glob("raylet*")))

    def _inside(self, node: Node, command: Sequence[str]) -> list[str]:
        # `ip netns exec` would hide the cgroups.
        enter = ["nsenter", f"--net=/run/netns/{node.name}", "unshare", "--uts", "--mount", "sh", "-c", _ENTER]
        root = "" if node.memory is None else str(_memory_root())
        return [*enter, f"node-{node.number}", str(node.memory or ""), root, *command]

    def _memory_cgroup(self, name: str, limit: int) -> Path:
        """Return a new memory cgroup. Skips the test where none can be made."""
        root = _memory_root()
        group = root / name
        try:
            group.mkdir()
            self._stack.callback(_remove_cgroup, group)
            (group / _MEMORY_FILES[0]).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"memory cgroups cannot be made here: {error}")
        return group


class PlainRig(Rig):
    """Nodes on the machine's own network."""

    how = "nodes of ray.cluster_utils.Cluster, all on one address"

    def _start(self) -> None:
        self._cluster = Nodes([{"num_gpus": NUM_GPUS}] * self._num_nodes, self._with_redis())
        self._stack.callback(self._cluster.close)
        self.address = self._cluster.address
        known = {node_id: number + 1 for number, node_id in enumerate(self._cluster.ids)}
        raylets = [process for process in self._descendants() if _is(process, "raylet")]
        self.nodes = sorted((Node(known.get(one, 0), one) for one in map(_node_id, raylets)), key=lambda n: n.number)

    def on_head(self, command: Sequence[str]) -> list[str]:
        return list(command)

    def add_node(self, num_gpus: int = NUM_GPUS, label: str = "any", memory_bytes: int = 0) -> Node:
        if memory_bytes:
            pytest.skip(f"no node has a memory of its own: {how_here()}")
        node = Node(self.nodes[-1].number + 1, self._cluster.add(num_gpus=num_gpus, labels={"kind": label}))
        self.nodes.append(node)
        return node

    def processes(self, node: Node) -> list[psutil.Process]:
        if node is self.head:
            return self._descendants()
        living = [process for process in node.processes_seen if _runs(process)]
        for process in self._descendants():
            with suppress(psutil.NoSuchProcess):
                if _is(process, "raylet") and _node_id(process) == node.id:
                    living = list({*living, process, *process.children(recursive=True)})
        node.processes_seen = living
        return living

    def cut(self, node: Node) -> None:  # noqa: ARG002
        pytest.skip(f"no node has a cable: {how_here()}")

    def cut_for(self, node: Node, seconds: float) -> None:  # noqa: ARG002
        self.cut(node)

    def _descendants(self) -> list[psutil.Process]:
        return [process for process in psutil.Process(self._cluster.pid).children(recursive=True) if _runs(process)]


def start_rig(num_nodes: int = NUM_NODES, environment: Mapping[str, str] | None = None, *, redis: bool = False) -> Rig:
    """Start a cluster, with networks where that is possible. See `Rig`."""
    return (PlainRig if refusal() else NamespaceRig)(num_nodes, environment, redis=redis)


def how_here() -> str:
    """Return what nodes are on this machine, for people."""
    return PlainRig.how + f", because {reason}" if (reason := refusal()) else NamespaceRig.how


@functools.cache
def refusal() -> str:
    """Return why nodes cannot have networks of their own here; "" when they can."""
    for program in ("ip", "nsenter", "unshare", "hostname"):
        if shutil.which(program, path=_PATH) is None:
            return f"{program} is not installed (`make system-deps`)"
    _sweep()
    name = next(_names)
    try:
        _add_namespace(name)
    except AssertionError as error:
        return str(error)
    try:
        _ip("-n", name, "link", "add", "switch", "type", "bridge")
        _ip("-n", name, "link", "add", "cable", "type", "veth", "peer", "name", "eth0")
        subprocess.run(
            ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "hostname", name],
            check=True,
            capture_output=True,
        )
    except (AssertionError, subprocess.CalledProcessError) as error:
        return str(error)
    finally:
        _remove_namespace(name)
    return ""


def _sweep() -> None:
    """Remove what test runs that were killed have left."""
    for file in Path("/run/netns").glob("rl[0-9]*"):
        maker = "".join(itertools.takewhile(str.isdigit, file.name[2:]))
        if not psutil.pid_exists(int(maker)):
            with suppress(AssertionError):  # another run sweeps too
                _remove_namespace(file.name)


def _ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=False, env={**os.environ, "PATH": _PATH}
    )
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout


def _add_namespace(name: str) -> None:
    _ip("netns", "add", name)


def _remove_namespace(name: str) -> None:
    """End every process in a network namespace, and remove it."""
    deadline = time.monotonic() + _END_TIMEOUT_S
    while pids := _pids(name):
        assert time.monotonic() < deadline, f"processes of {name} do not end: {pids}"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    _ip("netns", "delete", name)


def _pids(name: str) -> list[int]:
    return [int(pid) for pid in _ip("netns", "pids", name).split()]


def _processes(pids: Iterable[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if _runs(process := psutil.Process(pid)):
                found.append(process)
    return found


def title(process: psutil.Process) -> str:
    """Return a process's command line, which is a title for those of Ray; "" when it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


def _runs(process: psutil.Process) -> bool:
    """Return whether a process has not ended, whoever is to be told of its end."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is(process: psutil.Process, program: str) -> bool:
    try:
        return Path(process.exe()).name == program
    except psutil.Error:
        return False  # it has ended meanwhile


def _node_id(raylet: psutil.Process) -> str:
    return next(word.partition("=")[2] for word in raylet.cmdline() if word.startswith("--node_id="))


_V1 = Path("/sys/fs/cgroup/memory")
_MEMORY_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes") if _V1.exists() else ("memory.max", "memory.current")


def _memory_root() -> Path:
    return _V1 if _V1.exists() else Path("/sys/fs/cgroup")


def _remove_cgroup(group: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    deadline = time.monotonic() + _END_TIMEOUT_S
    while True:
        try:
            group.rmdir()
        except OSError:
            assert time.monotonic() < deadline, f"{group} is still in use"
            time.sleep(0.05)
        else:
            return
