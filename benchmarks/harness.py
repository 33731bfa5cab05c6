"""What the benchmarks share: their one argument, a Ray cluster of their own, and the form of their output.

Text for people goes to stderr. The last line on stdout is one JSON object:

    {"benchmark": name, "figures": [{"name": ..., "value": ..., "unit": ..., "bar": ..., "better": ...}, ...]}
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import msgspec
import ray


class Figure(msgspec.Struct, frozen=True):
    """One measured number.

    Attributes:
        name: What it is; stable, for scripts to find it.
        value: The number.
        unit: Its unit; "" for a ratio.
        bar: What the project asks of it; None for a baseline or an extra.
        better: Which side of the bar is good.
    """

    name: str
    value: float
    unit: str
    bar: float | None = None
    better: Literal["higher", "lower"] = "higher"

    def __str__(self) -> str:
        text = f"{self.name:<36} {self.value:>12,.4g} {self.unit}"
        if self.bar is None:
            return text
        met = self.value >= self.bar if self.better == "higher" else self.value <= self.bar
        return f"{text:<62} {'meets' if met else 'MISSES'} the bar of {self.bar:g} ({self.better} is better)"


def quick_asked(description: str | None) -> bool:
    """Parse the command line; return whether `--quick` was on it.

    Args:
        description: The benchmark's module docstring.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of the same, in under a minute")
    return bool(parser.parse_args().quick)


def say(text: str) -> None:
    """Tell people something."""
    print(text, file=sys.stderr, flush=True)


def publish(benchmark: str, figures: Sequence[Figure]) -> None:
    """Print the figures, for people and then for programs."""
    rounded = [msgspec.structs.replace(figure, value=float(f"{figure.value:.4g}")) for figure in figures]
    say("\n".join(["", benchmark, *map(str, rounded)]))
    print(msgspec.json.encode({"benchmark": benchmark, "figures": rounded}).decode())


@contextmanager
def local_cluster() -> Iterator[None]:
    """Start a Ray cluster on this machine, like the one a pipeline starts for itself, and end it.

    One thing differs. Ray gives its workers a niceness of 15; on a machine with other work that would measure the other
    work, and no baseline outside Ray would be comparable. Here they have 0, like this process.
    """
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=128 * 1024**2,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"worker_niceness": 0},
    )
    try:
        yield
    finally:
        ray.shutdown()
