"""Who listens on this machine's ports."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def refusal(host: str, port: int) -> str | None:
    """Return why nothing can listen there now, and who does, or None when it is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            return f"{error.strerror}{holder(port)}"
    return None


def free_port() -> int:
    """Return a port that nobody listens on, and that for a minute nobody else is given, by this function or the system.

    A server that starts takes seconds until it listens, and the system would give a port that was only looked at to the
    next connection. It keeps one whose last connection was closed from this side (TIME-WAIT, tcp(7)) from everyone but
    those who name it, with SO_REUSEADDR as servers do.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        connection, _ = listener.accept()
        connection.close()
        client.recv(1)  # returns when the close has come
        return int(listener.getsockname()[1])


def holder(port: int) -> str:
    """Return who listens on a port, as far as /proc lets this process see; "" where nobody does."""
    inodes = _inodes(port)
    for pid in _holders(inodes):
        with contextlib.suppress(OSError):  # it has ended
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            return f": process {pid} does, {command[:200]}"
    return ": a process does that this user may not look at" if inodes else ""


def belongs_to_another(port: int, group: int) -> bool:
    """Return whether processes that listen on a port are to be seen, and none of them is in the process group."""
    groups = set()
    for pid in _holders(_inodes(port)):
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(pid))
    return bool(groups) and group not in groups


def _inodes(port: int) -> set[str]:
    return {f"socket:[{inode}]" for number, inode in _listeners() if number == port}


def _holders(inodes: set[str]) -> Iterator[int]:
    """Yield the processes that have one of these sockets open."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
            if any(_link(entry) in inodes for entry in (process / "fd").iterdir()):
                yield int(process.name)


def _link(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:
        return ""  # closed since the folder was read


def _listeners() -> Iterator[tuple[int, str]]:
    """Yield port and socket inode of everything that listens. Source: proc(5), /proc/net/tcp."""
    listen = "0A"
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if table.exists():
            for row in table.read_text().splitlines()[1:]:
                columns = row.split()
                if columns[3] == listen:
                    yield int(columns[1].rpartition(":")[2], 16), columns[9]
