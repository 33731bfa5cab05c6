"""A real redis-server on a free port of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from raylm.ports import free_port


def find_redis_server() -> str:
    """Return the program. Without it the test is skipped, and fails where CI=true."""
    path = shutil.which("redis-server")
    if path is None:
        reason = "redis-server is not installed; `make system-deps` installs it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class RedisServer:
    """A database that is empty at first, and keeps what it has confirmed when it is killed.

    Args:
        folder: Where it keeps that.
        options: More of the program's own options.
        within: The command that runs it, with the program's own after it, where that is not to be on this machine's
            network.
    """

    def __init__(self, folder: Path, *options: str, within: Sequence[str] = ()) -> None:
        self._options = options
        self._within = within
        self._program = find_redis_server()
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, or start it again; returns when it answers."""
        # What a process has written outlives its crash without `fsync`, which takes seconds while others fill the disk.
        options = ["--save", "", "--appendonly", "yes", "--appendfsync", "no", "--dir", str(self._folder)]
        self._process = subprocess.Popen(
            [*self._within, self._program, "--bind", "127.0.0.1", "--port", str(self.port), *options, *self._options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            if "Ready to accept connections" in line:
                return
            lines.append(line)
        self.kill()
        pytest.fail("redis-server did not start:\n" + "".join(lines))

    def signal(self, number: int) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None
