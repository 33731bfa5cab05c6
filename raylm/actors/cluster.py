"""The Ray cluster that this process works on: how to connect to it, and what it consists of."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import ray
from ray._private import state
from ray._private.authentication import authentication_token_setup
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorAlreadyExistsError
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylm.actors.placement import Node
from raylm.errors import ClusterBusyError, PlacementError

_OBJECT_STORE_BYTES = 128 * 1024**2  # of a local cluster; raylm keeps nothing in Ray's object store
_LOCAL_SYSTEM = {"prestart_worker_first_driver": False}
"""Of a local cluster. Ray would start a process for each core of the machine, whatever it is then asked to do."""

_CONNECT_TIMEOUT_S = 5.0

_KEPT = b"raylm"
"""Namespace in Ray's own key-value store, which is private to Ray (2.60); Serve keeps its state there too."""

_OPERATOR = "operator"
_OPERATORS = "raylm-operators"
"""Ray namespace of that name. It is apart from that of what is served, all of which `raylm down` ends."""

RELEASE_S = 5.0
"""So long after a program's end Ray may take it for one that works."""

_RETRY_S = 0.2

_COUNTED = frozenset({"CPU", "GPU"})
_BUILTIN = _COUNTED | {"memory", "object_store_memory"}


def connect(address: str | None, *, start: bool = True) -> Literal["started", "joined"] | None:
    """Connect this process to Ray; return how, or None where it was connected already.

    Without an address that is the cluster of `RAY_ADDRESS`, or the one that `ray start` started on this machine. It is
    not one that another program has started for itself, for that ends with its program.

    Args:
        address: Address of the cluster; `local` starts one for this process whatever else runs.
        start: Start one for this process where there is none.

    Raises:
        PlacementError: there is no cluster at the address that was asked for, or none and none is to be started.
    """
    if ray.is_initialized():
        return None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    asked_for = address or os.environ.get("RAY_ADDRESS")
    # Ray has no public word for "is there one?", and would try a silent address for many minutes.
    found = canonicalize_bootstrap_address(address)
    if found is not None and (asked_for or _answers(found)):
        if not _answers(found):
            raise PlacementError(f"no Ray cluster answers at {asked_for}; start one there, or leave the address out")
        # As `ray start` does, and `ray.init` only for a cluster that it starts: this user's token opens this user's
        # clusters.
        logging.getLogger(authentication_token_setup.__name__).setLevel(logging.ERROR)
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            ray.init(address=found, **quiet)
        except ConnectionError as error:
            raise PlacementError(
                f"cannot connect to the Ray cluster at {found}: {error}. If it checks tokens, set RAY_AUTH_MODE=token "
                "before this program starts"
            ) from error
        return "joined"
    if not start:
        raise PlacementError("no Ray cluster runs here; start one with `ray start --head`, or give its --address")
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _system_config=_LOCAL_SYSTEM,
        **quiet,
    )
    return "started"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


class _Operator:
    """Does nothing: what counts is that it is there."""


@contextmanager
def operating() -> Iterator[None]:
    """Be the one program that changes what the cluster serves, until the block is left. Entering blocks.

    What says so is the name of an actor, which only one can have. Ray ends the actor with the program that has made it,
    also with one that is killed, so the name is never left taken. It is on the program's own node: both are cut off
    from the cluster together.

    Raises:
        ClusterBusyError: another program is at it; the text says which.
    """
    make = ray.remote(_Operator).options(
        name=_OPERATOR,
        namespace=_OPERATORS,
        num_cpus=0,
        max_restarts=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    )
    deadline = time.monotonic() + RELEASE_S
    while True:
        try:
            operator = make.remote()
            break
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                raise ClusterBusyError(
                    f"{_other_operator()} is changing what this cluster serves; wait until it has done so, or end it"
                ) from None
        time.sleep(_RETRY_S)
    try:
        yield
    finally:
        ray.kill(operator)


def _other_operator() -> str:
    """Return which program is operating, for people."""
    try:
        known = actor_record(ray.get_actor(_OPERATOR, namespace=_OPERATORS))
    except ValueError:  # it has ended just now
        known = {}
    return program(known.get("JobID", "")) or "another program"


def program(job: str, *, timeout_s: float = 0) -> str | None:
    """Return which process a Ray job is, for people; None when it has ended. Blocks for some milliseconds.

    Args:
        job: Its id, as `ray.get_runtime_context().get_job_id()` returns it.
        timeout_s: So long it may have to end: Ray takes some time to see that a program was killed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = [known for known in state.jobs() if known["JobID"] == job and not known["IsDead"]]
        if not found:
            return None
        if time.monotonic() >= deadline:
            return f"process {found[0]['DriverPid']} on {found[0]['DriverIPAddress']}"
        time.sleep(_RETRY_S)


def remember(key: str, value: bytes) -> None:
    """Keep something for as long as the cluster lasts. Blocks for some milliseconds."""
    internal_kv._internal_kv_put(key.encode(), value, overwrite=True, namespace=_KEPT)


def remembered(key: str) -> bytes | None:
    """Return what was kept under a key, by whatever process; None if nothing was. Blocks for some milliseconds."""
    found: bytes | None = internal_kv._internal_kv_get(key.encode(), namespace=_KEPT)
    return found


def forget(key: str) -> None:
    """Keep it no longer. Blocks for some milliseconds."""
    internal_kv._internal_kv_del(key.encode(), namespace=_KEPT)


def actor_record(actor: Any) -> dict[str, Any]:
    """Return what Ray knows of an actor, whose handle this is; nothing when it knows none. Blocks for a millisecond."""
    record: dict[str, Any] = state.actors(actor._actor_id.hex())
    return record


def placed(actors: Mapping[int, Any]) -> set[int]:
    """Return which of these actors have their room in the cluster. Blocks."""
    if not actors:
        return set()
    # A process is chosen once an actor's room is taken, long before it answers. Before that, the address is that of
    # the node's raylet that looks for room, with or without its port.
    raylets = {node["NodeID"]: node["NodeManagerPort"] for node in ray.nodes()}
    addresses = {slot: actor_record(actor)["Address"] for slot, actor in actors.items()}
    return {slot for slot, address in addresses.items() if address["Port"] not in (0, raylets.get(address["NodeID"]))}


def nodes() -> list[Node]:
    """Return the living nodes of the cluster that this process is connected to, and what of them is taken."""
    free = available_resources_per_node()
    found = [node for node in ray.nodes() if node["Alive"]]
    hosts = Counter(node["NodeManagerHostname"] for node in found)
    result = []
    for node in found:
        host, node_id, total = node["NodeManagerHostname"], node["NodeID"], node["Resources"]
        # Of a node that has just joined it is not known yet what is free: all.
        held = {name: amount - free.get(node_id, total).get(name, 0) for name, amount in total.items()}
        result.append(
            Node(
                host if hosts[host] == 1 else f"{host}:{node_id[:6]}",
                total.get("CPU", 0),
                total.get("GPU", 0),
                {name: amount for name, amount in total.items() if not _is_builtin(name)},
                node["Labels"],
                node_id,
                {name: amount for name, amount in held.items() if amount > 0 and not _is_builtin(name, but=_COUNTED)},
            )
        )
    return result


def _is_builtin(name: str, but: frozenset[str] = frozenset()) -> bool:
    """Return whether Ray itself gives a node that resource, and no engine asks for it by name."""
    return name not in but and (name in _BUILTIN or name.startswith("node:"))
