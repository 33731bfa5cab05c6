"""The command from its start to its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from raylm.ports import free_port, holder
from tests.serve.command import GATEWAY_PORTS, HAPROXY_PORTS, serve_command, wait_for

ONE = {"models": [{"name": "sim", "engines": [{"kind": "simulated"}]}]}


@pytest.mark.parametrize("proxy", ["haproxy", "python"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(proxy: str, number: signal.Signals, tmp_path: Path) -> None:
    """Whatever ends the command, no process and no port of it is left."""
    with serve_command({**ONE, "batches": {"folder": str(tmp_path)}}, proxy=proxy) as command:
        port = int(command.url.rpartition(":")[2])
        assert command.get("/health").json() == {"status": "ok"}
        family = psutil.Process(command.process.pid).children(recursive=True)
        assert bool(command.processes("bin/haproxy")) == (proxy == "haproxy")
        command.stop(number)
        _, alive = psutil.wait_procs(family, timeout=150)  # Ray's agents look for their raylet now and then
        assert [process.name() for process in alive] == []
        wait_for(lambda: holder(port) == "")  # Serve may have started another HAProxy meanwhile


def listening(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Return where any of them listens."""
    connections = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # an HAProxy, in whose place Serve has started another
            connections += process.net_connections("tcp")
    return {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(
    ("proxy", "host"), [("haproxy", "127.0.0.1"), ("haproxy", "127.0.0.2"), ("python", "127.0.0.1")]
)
def test_it_listens_at_its_host_alone(proxy: str, host: str) -> None:
    """Proxies and gateways listen at one address, and reach each other there."""
    with serve_command(ONE, proxy=proxy, host=host) as command:
        assert command.get("/v1/models").status_code == 200
        (gateway,) = command.processes("ray::ServeReplica:raylm:gateway")
        (proxy_actor,) = command.processes("ray::ProxyActor")
        port = int(command.url.rpartition(":")[2])
        ours = {port, int(gateway.environ()["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]), *GATEWAY_PORTS}

        def found() -> set[tuple[str, int]]:
            everywhere = listening([gateway, proxy_actor, *command.processes("bin/haproxy")])
            return {(address, number) for address, number in everywhere if number in ours}

        wait_for(lambda: len({number for _, number in found()}) == (3 if proxy == "haproxy" else 2))
        assert {address for address, _ in found()} == {host}


def test_closed() -> None:
    """HAProxy's figures are for this machine, and its socket is for this user; nothing of that stays."""
    with serve_command(ONE, proxy="auto") as command:
        assert "through haproxy" in command.log.read_text()

        def found() -> set[tuple[str, int]]:
            return listening(command.processes("bin/haproxy"))

        wait_for(lambda: len({port for _, port in found()}) == 3)  # clients, metrics, statistics
        assert {address for address, _ in found()} == {"127.0.0.1"}

        (*_, haproxy) = command.processes("bin/haproxy")  # Serve ends one when it has started the next
        arguments = haproxy.cmdline()
        of_node = Path(arguments[arguments.index("-f") + 1]).parent
        folder = of_node.parent
        assert folder.stat().st_mode & 0o777 == of_node.stat().st_mode & 0o777 == 0o700
        assert (of_node / "admin.sock").stat().st_mode & 0o777 == 0o600

        assert command.stop() == 130
        assert not folder.exists()


@pytest.mark.parametrize("port", ["--port", "RAY_SERVE_HAPROXY_STATS_PORT"])
def test_a_port_that_is_taken(port: str, tmp_path: Path) -> None:
    """The command says in one line which port it cannot have, and who has it."""
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(ONE))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        ports = {name: str(free_port()) for name in ("--port", *HAPROXY_PORTS)} | {port: taken}
        ended = subprocess.run(
            [Path(sys.executable).parent / "raylm", "serve", file, "--port", ports.pop("--port"), "--address", "local"],
            env={**os.environ, **ports},
            stderr=subprocess.PIPE,
            text=True,
            timeout=180,
        )
    assert ended.returncode == 3
    (said,) = ended.stderr.splitlines()
    assert f"port {taken} cannot be had" in said
    assert f"process {os.getpid()} does" in said
    assert port in said
