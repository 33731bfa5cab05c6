"""What Prometheus is told: the counts of all pools of each model, whichever gateway is asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from raylm.statistics import BOUNDS_S, Histogram, ModelState

__all__ = ["CONTENT_TYPE", "render"]

_COUNTERS = {
    "num_finished": ("requests_finished", "Requests answered."),
    "num_failed": ("requests_failed", "Requests that ended with an error."),
    "num_aborted": ("requests_aborted", "Requests that their clients left or cancelled."),
    "num_attempts": ("attempts", "Attempts to answer a request."),
    "num_tokens": ("tokens", "Tokens of answered requests."),
}
_GAUGES = {
    "num_waiting": ("requests_waiting", "Requests in the queues."),
    "num_running": ("requests_running", "Requests at actors."),
    "num_sessions": ("sessions", "Sessions remembered."),
    "num_clients": ("pools", "Gateways and other clients."),
    "num_wanted": ("slots_wanted", "Slots that there should be."),
}
_HISTOGRAMS = {
    "first_token_s": ("first_token_seconds", "From a request's arrival to its first token; not of lists and batches."),
    "token_gap_s": ("token_gap_seconds", "Between the tokens of a request, its mean; not of lists and batches."),
    "queue_s": ("queue_seconds", "In the queue."),
}


def render(models: Sequence[ModelState], batches: Mapping[str, int]) -> bytes:
    """Return the text for Prometheus.

    Args:
        models: Of each model, what all pools do.
        batches: How many batches there are of each status.
    """
    return generate_latest(_Collected([*_families(models), _batches(batches)]))


class _Collected:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _families(models: Sequence[ModelState]) -> Iterator[Metric]:
    for attribute, (name, help_text) in _COUNTERS.items():
        counter = CounterMetricFamily(f"raylm_{name}", help_text, labels=["model"])
        for model in models:
            counter.add_metric([model.name], getattr(model, attribute))
        yield counter
    moves = CounterMetricFamily(
        "raylm_moves",
        "Attempts that were lost and taken up elsewhere; silent is the watchdog's.",
        labels=["model", "cause"],
    )
    for model in models:
        for cause, count in model.moves.items():
            moves.add_metric([model.name, cause], count)
    yield moves
    for attribute, (name, help_text) in _GAUGES.items():
        gauge = GaugeMetricFamily(f"raylm_{name}", help_text, labels=["model"])
        for model in models:
            if (value := getattr(model, attribute)) is not None:
                gauge.add_metric([model.name], value)
        yield gauge
    for attribute, (name, help_text) in _HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"raylm_{name}", help_text, labels=["model"])
        for model in models:
            times: Histogram = getattr(model, attribute)
            histogram.add_metric([model.name], _buckets(times), times.total_s)
        yield histogram
    yield from _slot_families(models)


def _batches(counts: Mapping[str, int]) -> Metric:
    gauge = GaugeMetricFamily("raylm_batches", "Batches that there are.", labels=["status"])
    for status, count in sorted(counts.items()):
        gauge.add_metric([status], count)
    return gauge


def _slot_families(models: Sequence[ModelState]) -> Iterator[Metric]:
    up = GaugeMetricFamily("raylm_slot_up", "1 for a slot whose actor can work.", labels=["model", "slot"])
    running = GaugeMetricFamily("raylm_slot_running", "Requests in the slot's engine.", labels=["model", "slot"])
    outstanding = GaugeMetricFamily(
        "raylm_slot_outstanding_tokens", "Tokens that its requests may still need.", labels=["model", "slot"]
    )
    deaths = CounterMetricFamily("raylm_slot_deaths", "Actors lost in the slot.", labels=["model", "slot"])
    tokens = CounterMetricFamily("raylm_slot_tokens", "Tokens its engine has generated.", labels=["model", "slot"])
    for model in models:
        for slot in model.slots:
            labels = [model.name, str(slot.slot)]
            up.add_metric(labels, slot.state == "up")
            running.add_metric(labels, slot.num_running)
            outstanding.add_metric(labels, slot.outstanding_tokens)
            deaths.add_metric(labels, slot.num_deaths)
            tokens.add_metric(labels, slot.engine.num_tokens if slot.engine else 0)
    yield from (up, running, outstanding, deaths, tokens)


def _buckets(times: Histogram) -> list[tuple[str, float]]:
    buckets, total = [], 0
    for bound, count in zip([*map(str, map(float, BOUNDS_S)), "+Inf"], times.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
