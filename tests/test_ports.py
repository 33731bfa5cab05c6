"""Ports that are free stay so until they are used."""

from __future__ import annotations

import socket

import pytest

from raylm.ports import free_port


def test_kept() -> None:
    """A free port is given to nobody else meanwhile, and whoever names it can listen there, on this address or all."""
    port = free_port()
    assert port not in {free_port() for _ in range(100)}
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    for host in ("127.0.0.1", ""):
        with socket.create_server((host, port)):
            pass
