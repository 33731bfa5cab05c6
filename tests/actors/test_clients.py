"""What a model's manager knows of its clients: each is counted once, however often it goes and comes."""

from __future__ import annotations

import time
from types import SimpleNamespace

import msgspec
import pytest

from raylm.actors import manager_actor
from raylm.actors.manager_actor import _Clients
from raylm.pool import Pool
from raylm.statistics import PoolReport


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client has fallen silent as soon as anybody looks."""
    monkeypatch.setattr(manager_actor, "CLIENT_LEASE_S", -1)


async def _report(num_finished: int) -> PoolReport:
    """Return what a pool tells that has answered so many requests."""
    async with Pool() as pool:
        report = pool.report()
    statistics = msgspec.structs.replace(report.statistics, num_finished=num_finished)
    return msgspec.structs.replace(report, statistics=statistics)


@pytest.mark.usefixtures("silence")
async def test_a_client_that_comes_back_is_counted_once() -> None:
    """What it has done counts while it is silent, and is not added to what it tells when it is back."""
    clients = _Clients("model")
    await clients.news("client", 0, await _report(5))
    clients.expire()
    assert (clients.state().num_clients, clients.state().num_finished) == (0, 5)
    await clients.news("client", 0, await _report(7))
    assert (clients.state().num_clients, clients.state().num_finished) == (1, 7)


async def test_a_manager_that_stood_still_takes_nobody_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has heard nobody meanwhile. Those that it does not hear of from then on are gone."""
    now = 0.0
    monkeypatch.setattr(manager_actor, "time", SimpleNamespace(monotonic=lambda: now, time_ns=time.time_ns))
    clients = _Clients("model")
    await clients.news("client", 0, await _report(5))
    now += manager_actor.CLIENT_LEASE_S * 2
    clients.expire()
    assert len(clients) == 1
    for _ in range(5):
        now += manager_actor._EXPIRE_S
        clients.expire()
    assert len(clients) == 0


@pytest.mark.usefixtures("silence")
async def test_the_last_words_of_a_client_that_was_silent() -> None:
    """They count in place of what it had told before."""
    clients = _Clients("model")
    await clients.news("client", 0, await _report(5))
    clients.expire()
    clients.leave("client", await _report(8))
    clients.leave("client", await _report(8))
    assert (clients.state().num_clients, clients.state().num_finished) == (0, 8)


@pytest.mark.usefixtures("silence")
async def test_more_silent_clients_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all of them have done goes on to count."""
    monkeypatch.setattr(manager_actor, "MAX_SILENT", 2)
    clients = _Clients("model")
    for number in range(4):
        await clients.news(f"client {number}", 0, await _report(1))
    clients.expire()
    assert clients.state().num_finished == 4
    await clients.news("client 3", 0, await _report(2))
    assert clients.state().num_finished == 5
