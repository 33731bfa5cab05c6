"""Ports for servers that are not there all the time."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_port() -> Iterator[int]:
    """A port that the system gives to nobody as long as the block lasts. Whoever names it may listen there."""
    with socket.socket() as keeper:  # bound, but not listening
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]
