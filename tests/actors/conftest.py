"""A Redis database for the tests of a file, and patience with it."""

from collections.abc import Iterator

import pytest

from raylm.actors import redis_sessions
from tests.actors.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A redis-server that is up."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def slow_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is silent for some seconds is not given up: it may be the machine that is slow."""
    monkeypatch.setattr(redis_sessions, "_GIVE_UP_S", 60)
