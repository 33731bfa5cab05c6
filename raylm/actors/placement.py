"""Placement: from engines' settings and a cluster's nodes to Ray options, and to a plan of what goes where.

Pure: no Ray, no clock. What a replica takes is its `Shape`:

    TurboMind, api_server    one actor with `tp` GPUs of one node
    PyTorch, tp > 1          a placement group: `tp` bundles of one GPU for lmdeploy's own Ray actors, and one without
                             for the engine's. On one node where any has `tp` GPUs, else packed over several
    a small model            one actor with a share of one GPU
    OpenVINO                 one CPU
    HTTP, Triton             a sliver of a CPU

A plan packs accelerators tightly (`packing.py`) and spreads the rest. Replicas over several nodes come first, and as
Ray itself packs a group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from raylm.actors.packing import ONE, Room, pack, span, spread, units
from raylm.config import (
    EngineConfig,
    HTTPConfig,
    LMDeployConfig,
    ModelConfig,
    NodeConfig,
    OpenVINOConfig,
    SimulatedConfig,
    TritonConfig,
)
from raylm.errors import PlacementError

_MAX_LINES = 8
"""Nodes that an error lists, and groups of replicas that it looks for alternatives for."""

_SLIVER = 0.01


@dataclass(frozen=True)
class Node:
    """One node of a cluster.

    Attributes:
        name: For people.
        num_cpus: Logical CPUs, used or not.
        num_gpus: Logical GPUs, used or not.
        resources: Its other resources by Ray's names, such as `NPU` and `accelerator_type:A100`.
        labels: Its labels.
        id: Ray's id of it; empty when it is not there yet.
        held: What is taken of it at present, by Ray's names.
    """

    name: str
    num_cpus: float
    num_gpus: float
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""
    held: Mapping[str, float] = field(default_factory=dict)

    def total(self, resource: str) -> float:
        """Return how much it has of a resource, used or not."""
        if resource == "CPU":
            return self.num_cpus
        return self.num_gpus if resource == "GPU" else self.resources.get(resource, 0)

    def free(self, resource: str) -> float:
        """Return how much of a resource nobody holds."""
        return max(0, self.total(resource) - self.held.get(resource, 0))

    def has_kind(self, shape: Shape) -> bool:
        """Return whether it is of the kind that a shape asks for, whatever its size."""
        return not self.lacks(shape)

    def lacks(self, shape: Shape) -> str:
        """Return what of the asked kind it is not, for people; empty when it is of that kind."""
        if shape.accelerator_type and not self.total(f"accelerator_type:{shape.accelerator_type}"):
            return f"accelerator type {shape.accelerator_type}"
        for name, wanted in shape.labels:
            if not matches(self.labels.get(name), wanted):
                return f"label {name}={wanted}"
        for name, _ in shape.resources:
            if not self.total(name):
                return f"resource {name}"
        return ""


@dataclass(frozen=True)
class Shape:
    """What one replica takes.

    Attributes:
        num_cpus: Logical CPUs, a part of one allowed.
        num_gpus: GPUs, or what `accelerator` names: `tp`, a share below 1 of one, or 0 for an engine that runs on CPU.
        grouped: The engine's ranks are Ray actors themselves, one a GPU. The replica then is a placement group, its own
            actor takes no GPU, and the ranks find theirs in the group.
        accelerator: Ray's name of what `num_gpus` counts: `GPU` or `NPU`.
        accelerator_type: Model of the accelerator, such as `A100`; None takes any.
        resources: Custom resources of the node of the replica's actor.
        labels: What each of its nodes' labels must be: `value`, `!value`, `in(a,b)` or `!in(a,b)`.
    """

    num_cpus: float
    num_gpus: float = 0
    grouped: bool = False
    accelerator: str = "GPU"
    accelerator_type: str | None = None
    resources: tuple[tuple[str, float], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @cached_property
    def needs(self) -> dict[str, int]:
        """What it takes in all, by Ray's names, in units."""
        found = {"CPU": units(self.num_cpus), **{name: units(amount) for name, amount in self.resources}}
        if self.num_gpus:
            found[self.accelerator] = units(self.num_gpus)
        return {name: amount for name, amount in found.items() if amount}

    def without(self, resource: str) -> Shape:
        """Return the same shape without what it takes of a resource."""
        if resource == "CPU":
            return replace(self, num_cpus=0)
        if resource == self.accelerator:
            return replace(self, num_gpus=0, grouped=False)
        return replace(self, resources=tuple(one for one in self.resources if one[0] != resource))

    def actor_options(self) -> dict[str, Any]:
        """Return the options of the replica's Ray actor. Ray starts it again as often as it dies."""
        resources = dict(self.resources)
        options: dict[str, Any] = {
            "num_cpus": self.num_cpus,
            "num_gpus": 0,
            "max_restarts": -1,
            "scheduling_strategy": "DEFAULT" if self.num_gpus else "SPREAD",  # Ray's default packs
        }
        if not self.grouped:  # what is asked of the group's nodes is in its bundles
            if self.accelerator == "GPU":
                options["num_gpus"] = self.num_gpus
            elif self.num_gpus:
                resources[self.accelerator] = self.num_gpus
            if self.accelerator_type:
                options["accelerator_type"] = self.accelerator_type
            if self.labels:
                options["label_selector"] = dict(self.labels)
        if resources:
            options["resources"] = resources
        return options

    def bundles(self) -> list[dict[str, float]]:
        """Return the bundles of the placement group of a grouped replica: its own actor's first, then the ranks'."""
        # Source of the amount: ray 2.60, `accelerator_type` of an actor's options.
        kind = {f"accelerator_type:{self.accelerator_type}": 0.001} if self.accelerator_type else {}
        first = {"CPU": self.num_cpus, **dict(self.resources), **kind}
        return [first, *({self.accelerator: 1.0, **kind} for _ in range(int(self.num_gpus)))]

    def bundle_labels(self) -> list[dict[str, str]]:
        """Return the label selectors of `bundles`; none when there is nothing to select."""
        return [dict(self.labels) for _ in self.bundles()] if self.labels else []

    def spans(self, nodes: Sequence[Node]) -> bool:
        """Return whether one replica goes over several nodes, for none that is of its kind is large enough."""
        sizes = [node.total(self.accelerator) for node in nodes if node.has_kind(self)]
        return self.grouped and max(sizes, default=0) < self.num_gpus and sum(sizes) > 0

    def __str__(self) -> str:
        parts = [_count(self.num_gpus, self._accelerator_name)] if self.num_gpus else []
        if self.num_cpus or not parts:
            parts.append(_count(self.num_cpus, "CPU"))
        parts += [f"{amount:g} {name}" for name, amount in self.resources]
        return " and ".join(parts) + "".join(f", {name}={wanted}" for name, wanted in self.labels)

    @property
    def _accelerator_name(self) -> str:
        return f"{self.accelerator_type} {self.accelerator}" if self.accelerator_type else self.accelerator


def shape(config: EngineConfig) -> Shape:
    """Return what one replica of an engine takes."""
    labels = tuple(config.label_selector.items())
    custom = tuple(config.resources.items())
    if isinstance(config, HTTPConfig | TritonConfig):
        return Shape(_SLIVER, resources=custom, labels=labels)
    if isinstance(config, OpenVINOConfig):
        return Shape(1, resources=custom, labels=labels)
    kind = config.accelerator_type
    if isinstance(config, SimulatedConfig):
        return Shape(0, config.num_gpus, accelerator_type=kind, resources=custom, labels=labels)
    # lmdeploy's PyTorch engine runs several ranks as Ray actors only. Source: lmdeploy 0.18,
    # `pytorch.engine.executor.get_distributed_executor_backend`. An api_server starts them as processes.
    grouped = isinstance(config, LMDeployConfig) and config.backend == "pytorch" and config.tp > 1
    if config.device == "cpu" and not grouped:
        return Shape(1, resources=custom, labels=labels)
    return Shape(
        1,
        config.num_gpus or config.tp,  # of a group on CPU, these are logical ones
        grouped,
        "NPU" if config.device == "ascend" else "GPU",
        kind,
        custom,
        labels,
    )


@dataclass(frozen=True)
class Replica:
    """One slot that is to be placed.

    Attributes:
        slot: Its number among those of its model.
        shape: What it takes.
        model: Name of its model; empty where there is only one.
    """

    slot: int
    shape: Shape
    model: str = ""


@dataclass(frozen=True)
class Plan:
    """Which replica goes where.

    Attributes:
        nodes: The cluster.
        replicas: What is to be placed.
        places: By replica, the index in `nodes` of each rank's node, that of its actor first. A replica without ranks
            has its actor's alone; one that has no room has none.
    """

    nodes: tuple[Node, ...]
    replicas: tuple[Replica, ...]
    places: tuple[tuple[int, ...], ...]

    @property
    def fits(self) -> bool:
        """Whether every replica has room."""
        return all(self.places)

    @property
    def num_gpus(self) -> float:
        """Accelerators that the replicas that have room take."""
        placed = zip(self.replicas, self.places, strict=True)
        return sum(units(replica.shape.num_gpus) for replica, places in placed if places) / ONE

    def lines(self) -> list[str]:
        """Return the plan for people, node by node: what it has and who goes there."""
        by_node: dict[int, dict[tuple[str, Shape, tuple[int, ...]], list[int]]] = defaultdict(lambda: defaultdict(list))
        for replica, places in zip(self.replicas, self.places, strict=True):
            for index in dict.fromkeys(places):
                ranks = tuple(rank for rank, place in enumerate(places) if place == index)
                by_node[index][replica.model, replica.shape, ranks].append(replica.slot)
        return [
            f"{node.name}: {_resources(node)}: "
            + ("; ".join(_who(*key, slots) for key, slots in by_node[index].items()) or "nothing")
            for index, node in enumerate(self.nodes)
        ]

    def problems(self) -> list[str]:
        """Return what does not fit, one text a group of equal replicas: what is missing, and what would fit instead."""
        groups: dict[tuple[str, Shape], list[int]] = {}
        for number, replica in enumerate(self.replicas):
            groups.setdefault((replica.model, replica.shape), []).append(number)
        waiting = {key: numbers for key, numbers in groups.items() if not all(self.places[n] for n in numbers)}
        texts: list[str] = []
        for (model, wanted), numbers in waiting.items():
            num_placed = sum(bool(self.places[number]) for number in numbers)
            spans = wanted.spans(self.nodes)
            each = " each" if len(numbers) > 1 else ""
            text = (
                f"{f'{model}: ' if model else ''}{_count(len(numbers), 'replica')} of {wanted}{each}, "
                f"{'over several nodes' if spans else f'on one node{each}'}, "
                f"{'do' if each else 'does'} not fit: room for {num_placed}"
            )
            if len(texts) < _MAX_LINES:
                text += f"; {self._missing(wanted, numbers, len(numbers) - num_placed)}. "
                text += f"What would fit: {', or '.join(self._instead(wanted, numbers, num_placed))}"
            texts.append(text)
        return texts

    def text(self) -> str:
        """Return all of it for people: the nodes, and whether it fits or why not."""
        return "\n".join([*self.lines(), "", *([self._fit()] if self.fits else self.problems())])

    def _fit(self) -> str:
        """Return what fits, and on how much."""
        gpus = sum(node.free("GPU") for node in self.nodes)
        taken = sum(replica.shape.num_gpus for replica in self.replicas if replica.shape.accelerator == "GPU")
        of_gpus = f" and {taken:g} of {_count(gpus, 'free GPU')}" if taken else ""
        return f"it fits: {_count(len(self.replicas), 'replica')} on {_count(len(self.nodes), 'node')}{of_gpus}"

    def refusal(self) -> str:
        """Return in one line why it does not fit, and what each node has."""
        problems, lines = self.problems(), self.lines()
        if len(problems) > _MAX_LINES:
            problems[_MAX_LINES:] = [f"{len(problems) - _MAX_LINES} more kinds of replicas do not fit"]
        if len(lines) > _MAX_LINES:
            lines[_MAX_LINES:] = [f"and {len(lines) - _MAX_LINES} more nodes"]
        return f"{'. '.join(problems)}. Nodes: {' | '.join(lines) or 'the cluster has no node'}"

    def _missing(self, wanted: Shape, numbers: Sequence[int], num_waiting: int) -> str:
        """Return what more there would have to be."""
        alike = [node for node in self.nodes if node.has_kind(wanted)]
        if not alike:
            lacking = dict.fromkeys(node.lacks(wanted) for node in self.nodes)
            return f"no node has {_join(lacking) or 'anything'}{self._kinds(wanted)}"
        spans = wanted.spans(self.nodes)
        for name, need in wanted.needs.items():
            most = max(units(node.total(name)) for node in alike)
            if most < need and not (spans and name == wanted.accelerator):
                return f"no such node has {_amount(name, need)}: the most is {most / ONE:g}"
        most_wanted = wanted.accelerator if wanted.num_gpus else next(iter(wanted.needs))
        name = next((name for name in wanted.needs if self._with(numbers, wanted.without(name))), most_wanted)
        if spans and name == wanted.accelerator:
            return f"missing: {_amount(name, self._short(wanted, num_waiting))}"
        text = f"missing: {_amount(name, wanted.needs[name] * num_waiting)}"
        if name == wanted.accelerator and wanted.num_gpus > 1:
            text += f", {wanted.num_gpus:g} on each node"
        idle = [replace(node, held={}) for node in self.nodes]
        if any(node.held for node in alike) and plan(idle, self.replicas, search=False).fits:
            text += ", which others hold at present"
        return text

    def _with(self, numbers: Sequence[int], changed: Shape) -> bool:
        """Return whether some replicas would all fit in another shape."""
        replicas = list(self.replicas)
        for number in numbers:
            replicas[number] = replace(replicas[number], shape=changed)
        places = plan(self.nodes, replicas, search=False).places
        return all(places[number] for number in numbers)

    def _short(self, wanted: Shape, num_waiting: int) -> int:
        """Return how many units of accelerators are missing for replicas that may be on any nodes of their kind."""
        alike = {index for index, node in enumerate(self.nodes) if node.has_kind(wanted)}
        left = sum(units(self.nodes[index].free(wanted.accelerator)) // ONE for index in alike)
        for replica, places in zip(self.replicas, self.places, strict=True):
            if replica.shape.accelerator == wanted.accelerator and replica.shape.num_gpus >= 1:
                left -= sum(place in alike for place in places)
        return max(1, int(wanted.num_gpus) * num_waiting - left) * ONE

    def _kinds(self, wanted: Shape) -> str:
        """Return which accelerator types there are, when the asked one is not among them."""
        prefix = "accelerator_type:"
        there = {name.removeprefix(prefix) for node in self.nodes for name in node.resources if name.startswith(prefix)}
        if wanted.accelerator_type and wanted.accelerator_type not in there:
            return f" (there is {_join(sorted(there)) or 'none of any type'})"
        keys = [name for name, _ in wanted.labels]
        values = {f"{key}={node.labels[key]}" for key in keys for node in self.nodes if key in node.labels}
        return f" (there is {_join(sorted(values))})" if values else ""

    def _instead(self, wanted: Shape, numbers: Sequence[int], num_placed: int) -> list[str]:
        """Return changes with which the replicas would fit."""
        found = [_count(num_placed, "replica")] if num_placed else []
        size = int(wanted.num_gpus)
        while size > 1:
            size = (size + 1) // 2
            if self._with(numbers, replace(wanted, num_gpus=size, grouped=wanted.grouped and size > 1)):
                found.append(f"tp {size}")
                break
        alike = [node for node in self.nodes if node.has_kind(wanted)]
        if not wanted.grouped and wanted.num_gpus > 1:
            spread_out = replace(wanted, grouped=True)
            if spread_out.spans(self.nodes) and self._with(numbers, spread_out):
                found.append("lmdeploy's pytorch backend, whose ranks may be on several nodes")
        num_waiting = len(numbers) - num_placed
        largest = max(alike, key=lambda node: node.total(wanted.accelerator), default=None)
        if largest is None:
            return [f"a node with {wanted}"]
        if wanted.spans(self.nodes):
            more = -(-self._short(wanted, num_waiting) // units(largest.total(wanted.accelerator)))
        else:
            each = Room(replace(largest, held={})).count(wanted, num_waiting)
            more = -(-num_waiting // each) if each else 0
        if more:
            found.append(f"{more} more {'nodes' if more > 1 else 'node'} like {largest.name}")
        return found or [f"a node with {wanted}"]


def plan(nodes: Sequence[Node], replicas: Sequence[Replica], *, search: bool = True) -> Plan:
    """Place replicas on what is free of the nodes.

    Where not all fit, as many accelerators are used as can be; of replicas that take none, as many as the rest of the
    CPUs holds.

    Args:
        nodes: The cluster.
        replicas: What is to be placed.
        search: Take the time to look for a better packing where the first ones do not place everything.
    """
    rooms = [Room(node) for node in nodes]
    groups: dict[Shape, list[int]] = {}
    for number, replica in enumerate(replicas):
        groups.setdefault(replica.shape, []).append(number)
    spanning = {wanted for wanted in groups if wanted.num_gpus and wanted.spans(nodes)}
    places: list[tuple[int, ...]] = [()] * len(replicas)
    for wanted in sorted(spanning, key=lambda one: -one.num_gpus):
        for number in groups[wanted]:
            places[number] = span(rooms, wanted)
    packed = {wanted: len(numbers) for wanted, numbers in groups.items() if wanted.num_gpus and wanted not in spanning}
    for (wanted, index), count in pack(rooms, packed, search=search).items():
        rooms[index].take(wanted, count)
        for number in groups[wanted][:count]:
            places[number] = (index,) * max(1, int(wanted.num_gpus))
        del groups[wanted][:count]
    light = [(wanted, number) for wanted, numbers in groups.items() if not wanted.num_gpus for number in numbers]
    for number, index in spread(rooms, sorted(light, key=lambda one: -one[0].num_cpus)):
        places[number] = (index,)
    return Plan(tuple(nodes), tuple(replicas), tuple(places))


def replicas_of(models: Iterable[ModelConfig], *, most: bool = False) -> list[Replica]:
    """Return the slots of models that are to be served.

    Args:
        models: The models.
        most: See `ModelConfig.slots`.
    """
    return [
        Replica(slot, shape(engine), model.name)
        for model in models
        for slot, engine in enumerate(model.slots(most=most))
    ]


def outlook(nodes: Sequence[Node], models: Sequence[ModelConfig]) -> str:
    """Return whether models would fit with all actors that autoscaling may ask for; empty where it asks for no more."""
    more = [
        f"{group.most} of {model.name} in place of {group.replicas}"
        for model in models
        for group in model.engines
        if group.most > group.replicas
    ]
    if not more:
        return ""
    planned = plan(nodes, replicas_of(models, most=True))
    verdict = planned._fit() if planned.fits else f"it does not fit. {'. '.join(planned.problems())}"
    return f"with max_replicas, {_join(more)}, {verdict}"


def nodes_of(configs: Iterable[NodeConfig]) -> list[Node]:
    """Return the nodes of a cluster that is not there."""
    found = []
    for config in configs:
        kind = {f"accelerator_type:{config.accelerator_type}": 1.0} if config.accelerator_type else {}
        for number in range(config.count):
            name = config.name if config.count == 1 else f"{config.name}-{number}"
            resources = {**config.resources, **kind}
            found.append(Node(name, config.num_cpus, config.num_gpus, resources, config.labels))
    return found


def require(plan: Plan) -> None:
    """Raise PlacementError when a plan does not fit."""
    if not plan.fits:
        raise PlacementError(plan.refusal())


def matches(label: str | None, selector: str) -> bool:
    """Return whether a node's label is what a selector asks for.

    Args:
        label: Its value; None when the node has no such label.
        selector: `value`, `!value`, `in(a,b)` or `!in(a,b)`.

    Source: ray 2.60, label selectors.
    """
    negated = selector.startswith("!")
    text = selector.removeprefix("!")
    values = re.split(r"\s*,\s*", text[3:-1].strip()) if text.startswith("in(") else [text]
    return (label in values) != negated


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if 0 < number <= 1 else 's'}"


def _amount(resource: str, need: int) -> str:
    return _count(need / ONE, resource)


def _join(words: Iterable[str]) -> str:
    return ", ".join(words)


def _resources(node: Node) -> str:
    """Return what a node has, and what of that is free."""
    found = []
    for name in ("CPU", "GPU", *(name for name in node.resources if not name.startswith("accelerator_type:"))):
        total, free = node.total(name), node.free(name)
        found.append(f"{total:g} {name}{'s' if total != 1 else ''}" + (f" ({free:g} free)" if free != total else ""))
    return ", ".join(found)


def _who(model: str, wanted: Shape, ranks: tuple[int, ...], slots: Sequence[int]) -> str:
    """Return which slots of a model are on a node, and with which ranks."""
    name = f"{model} " if model else ""
    several = len(slots) > 1
    text = f"{name}slot{'s' if several else ''} {_ranges(slots)}"
    if wanted.num_gpus > 1:
        share = f"ranks {_ranges(ranks)}" if len(ranks) > 1 else f"rank {ranks[0]}"
        part = f" of {wanted.num_gpus:g}" if len(ranks) < wanted.num_gpus else ""
        text += f" ({share}{part}{' each' if several else ''})"
    elif wanted.num_gpus:
        text += f" ({_count(wanted.num_gpus, wanted.accelerator)}{' each' if several else ''})"
    return text


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as `0-3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
