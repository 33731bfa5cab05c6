"""The command from its start to its end."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from raylm.ports import holder
from tests.serve.command import serve_command

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
        _, alive = psutil.wait_procs(family, timeout=90)  # Ray's agents look for their raylet now and then
        assert [process.name() for process in alive] == []
        assert holder(port) == ""
