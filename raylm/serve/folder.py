"""Where HAProxy has its files: a folder for one command, closed to other users and gone when the command has ended.

By itself Serve takes `/tmp/haproxy-serve`: the first user has it, and whoever may connect to the socket in it commands
HAProxy. Source: ray 2.60, serve/_private/constants.py.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PARENT = Path("/tmp")  # noqa: S108 - mkdtemp makes the folder; names of sockets have 107 bytes, and Serve adds 67
_PREFIX = "raylm-ha-"

_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
}


class HAProxyFolder:
    """A new folder, of which the environment tells the Serve that is started next. Removes those of dead commands.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        for left in _PARENT.glob(f"{_PREFIX}*"):
            _remove_orphan(left)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PARENT))
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # the kernel releases it, however this process ends
            if self.path.exists():
                break
            os.close(self._lock)  # another command has taken it for an orphan, before it was locked
        self._told = {name: str(self.path / file) for name, file in _FILES.items() if name not in os.environ}
        os.environ.update(self._told)

    def remove(self) -> None:
        """Remove it, with all that is in it. HAProxy has ended."""
        for name in self._told:
            os.environ.pop(name, None)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_orphan(folder: Path) -> None:
    """Remove a folder that no living command has."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # that of another user, or gone
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
