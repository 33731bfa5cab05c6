"""What an operator does with a cluster that serves: look, scale, drain, end. Verbs of the command line call these."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import ray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raylm.actors.manager import NAMESPACE, SERVED_PLACEMENT_TIMEOUT_S, named_actors
from raylm.actors.manager_actor import end, find, served_models, told
from raylm.actors.sessions import connect_store, count_sessions
from raylm.config import ModelConfig
from raylm.errors import EngineStartError, ModelNotFoundError, NoActorError, PlacementError, RaylmError, first_line
from raylm.statistics import ModelState, SlotStatistics

_ANSWER_TIMEOUT_S = 30.0
_LOOK_INTERVAL_S = 0.5

_LONGEST_LOG_S = 7 * 24 * 3600

_COLORS = {"up": "green", "failed": "red", "down": "red", "suspected": "yellow"}

_BAR = 12
"""Width of the load of a slot, in characters."""

_decode_state = msgspec.msgpack.Decoder(ModelState).decode


async def states() -> list[ModelState]:
    """Return what each model that is served on this cluster does. One whose manager does not answer has a `problem`."""
    return list(await asyncio.gather(*(_state(model) for model in sorted(await asyncio.to_thread(served_models)))))


async def _state(model: str) -> ModelState:
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            manager = await asyncio.to_thread(find, model)
            state = _decode_state(await told(manager.state.remote()))
            if not state.problem:
                config = ModelConfig.model_validate_json(await told(manager.config.remote()))
                state.num_sessions = await _num_sessions(config, manager)
    except TimeoutError:
        return ModelState(
            name=model,
            problem=f"its manager does not answer within {_ANSWER_TIMEOUT_S:g} s; look at the logs of Ray's nodes",
        )
    except RaylmError as error:
        return ModelState(name=model, problem=str(error))
    return state


async def _num_sessions(model: ModelConfig, manager: Any) -> int | None:
    variable = model.sessions.password_env
    if variable is not None and not os.environ.get(variable):
        return None  # whoever looks after a model need not know it
    store = connect_store(model.sessions, await told(manager.sessions.remote()), f"raylm:{model.name}:")
    try:
        return await count_sessions(store)
    finally:
        await store.aclose()


async def settled(models: Iterable[ModelConfig]) -> None:
    """Return when each of these models has the actors that are wanted, all of them up, and no others.

    Raises:
        EngineStartError: one does not start; the text says why.
        PlacementError: one has had no room for as long as its configuration allows.
        ModelNotFoundError: one is not served, or no longer.
    """
    left = {model.name: model.pool.placement_timeout_s or SERVED_PLACEMENT_TIMEOUT_S for model in models}
    began_at = time.monotonic()
    while left:
        for model in left:
            await asyncio.to_thread(find, model)
        for state in await asyncio.gather(*map(_state, left)):
            wanted = [slot for slot in state.slots if slot.slot not in state.outdated]
            are_up = [slot.state for slot in wanted] == ["up"] * state.num_wanted
            if are_up and not state.outdated and not state.problem:
                del left[state.name]
                continue
            for slot in wanted:
                if slot.state == "failed":
                    raise EngineStartError(
                        f"slot {slot.slot} of {state.name} did not start: {slot.detail}. `raylm logs {state.name} "
                        f"{slot.slot}` has its log; when that is mended, `raylm drain {state.name} {slot.slot}` has it "
                        "tried again"
                    )
                if slot.state == "waiting" and time.monotonic() - began_at > left[state.name]:
                    raise PlacementError(f"slot {slot.slot} of {state.name} has no room: {slot.detail}")
        await asyncio.sleep(_LOOK_INTERVAL_S)


async def scale(model: str, replicas: int, group: int | None = None) -> None:
    """Have a model consist of so many actors; returns at once.

    Args:
        model: A model that is served.
        replicas: How many there are to be, 0 or more.
        group: Which of its groups of actors, as they are in its configuration, from 0; None where there is one.

    Raises:
        ModelNotFoundError: no model of that name is served on this cluster.
        InvalidRequestError: that cannot be.
    """
    manager = await asyncio.to_thread(find, model)
    await told(manager.scale.remote(replicas, group))


async def drain(model: str, slot: int) -> None:
    """Have the actor of a slot finish what it has, and replaced by another; returns at once.

    Raises:
        ModelNotFoundError: no model of that name is served on this cluster.
        InvalidRequestError: there is no such slot.
    """
    manager = await asyncio.to_thread(find, model)
    await told(manager.drain.remote(slot))


async def down() -> list[str]:
    """End everything of raylm on this cluster: gateways, batches, models with their actors. Return what has ended.

    Streams have as long as gateways that are replaced give them. What belongs to others on the cluster stays, and so
    does what batches have on disk.
    """
    ended = []
    if await asyncio.to_thread(_end_application):
        ended.append("the gateways")
    served = sorted(await asyncio.to_thread(served_models))
    for actor in await asyncio.to_thread(named_actors):
        if actor.rpartition(":")[0] not in served:  # batches, whose rows must not fail for want of the model
            with suppress(ValueError):  # it has just ended
                ray.kill(ray.get_actor(actor, namespace=NAMESPACE), no_restart=True)
                ended.append(f"actor {actor}")
    await asyncio.gather(*(end(model) for model in served))
    return ended + served


def _end_application() -> bool:
    from raylm.serve.run import end_serve, serve_runs

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return serve_runs() and end_serve()


async def actor_of(model: str, slot: int) -> str:
    """Return the id of the actor in a slot, or of the last one that was there.

    Raises:
        ModelNotFoundError: there is no such model, or no such slot of it.
    """
    await asyncio.to_thread(find, model)
    state = await _state(model)
    if state.problem:
        raise NoActorError(f"{model}: {state.problem}")
    for found in state.slots:
        if found.slot == slot:
            return found.actor
    raise ModelNotFoundError(f"{model} has no slot {slot}; `raylm status` shows those that there are")


def log_lines(actor: str, *, num_lines: int, follow: bool) -> Iterator[str]:
    """Yield what an actor's process has written, and with `follow` what it goes on to write.

    Raises:
        NoActorError: Ray's dashboard, which knows where logs are, does not run, or knows none of that actor.
    """
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    try:
        address = ray.get_runtime_context().gcs_address
        yield from get_log(address, actor_id=actor, suffix="err", tail=num_lines, follow=follow, timeout=_LONGEST_LOG_S)
    except (RayStateApiException, ConnectionError, OSError) as error:
        raise NoActorError(
            f"no log of actor {actor}: {first_line(error)}. Logs come from Ray's dashboard: `ray start --head` starts "
            "it"
        ) from error


class Rates:
    """Tokens per second of each slot, from one look to the next."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def of(self, model: str, slot: SlotStatistics) -> float | None:
        """Return the rate since the last look; None at the first one."""
        if slot.engine is None:
            return None
        now, key = time.monotonic(), (model, slot.actor)
        before = self._seen.get(key)
        self._seen[key] = now, slot.engine.num_tokens
        if before is None or now <= before[0]:
            return None
        return max(0, slot.engine.num_tokens - before[1]) / (now - before[0])


def table(models: Sequence[ModelState], rates: Rates | None = None) -> RenderableType:
    """Return the state of the models for people.

    Args:
        models: What `states` has returned.
        rates: With them each slot has a column of its tokens per second.
    """
    if not models:
        return Text("nothing is served on this cluster; raylm up CONFIG starts something")
    return Group(*(_model(model, rates) for model in models))


def _model(model: ModelState, rates: Rates | None) -> RenderableType:
    if model.problem:
        return Text.assemble((model.name, "bold"), (f"  {model.problem}\n", "red"))
    slots = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("slot", "right"), ("state", "left"), ("node", "left"), ("GPU", "left"), ("load", "left")):
        slots.add_column(name, justify=justify)  # type: ignore[arg-type]
    slots.add_column("tokens due", justify="right")
    if rates is not None:
        slots.add_column("tok/s", justify="right")
    slots.add_column("lost", justify="right")
    slots.add_column("", overflow="fold", style="dim")
    total = 0.0
    for slot in model.slots:
        cells: list[Any] = [
            str(slot.slot),
            Text(slot.state, _COLORS.get(slot.state, "")),
            slot.node,
            ",".join(map(str, slot.gpus)),
            _bar(slot.num_running, slot.capacity),
            f"{slot.outstanding_tokens:,}",
        ]
        if rates is not None:
            rate = rates.of(model.name, slot)
            total += rate or 0
            cells.append("" if rate is None else f"{rate:,.0f}")
        slots.add_row(*cells, str(slot.num_deaths or ""), slot.detail or _where(slot))
    num_up = sum(slot.state == "up" for slot in model.slots)
    head = Text.assemble((model.name, "bold"), f"  {num_up} of {model.num_wanted} up")
    if rates is not None:
        head.append(f"  {total:,.0f} tok/s")
    for number, words in (
        (model.num_running, "running"),
        (model.num_waiting, "waiting"),
        (model.num_sessions, "sessions"),
        (model.num_finished, "answered"),
        (model.num_moved, "moved"),
        (model.num_failed, "failed"),
    ):
        if number is not None:
            head.append(f"  {number:,} {words}")
    parts: list[RenderableType] = [head, slots if model.slots else Text("no actors", "dim")]
    if model.failures:
        last = model.failures[-1]
        parts.append(Text(f"last failure: {last.type}: {last.message}", "red"))
    return Group(*parts, "")


def _where(slot: SlotStatistics) -> str:
    engine = "simulated" if slot.device == "clock" else slot.device
    return f"{engine}, pid {slot.pid}" if slot.pid is not None else ""


def _bar(running: int, capacity: int) -> Text:
    filled = round(_BAR * min(1, running / capacity)) if capacity else 0
    return Text.assemble(("█" * filled, "green"), ("░" * (_BAR - filled), "dim"), f" {running}/{capacity}")
