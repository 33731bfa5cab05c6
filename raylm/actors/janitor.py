"""Nothing of an engine outlives its actor on a node, and no engine starts on a GPU that is still taken.

An engine's processes die with their actor by themselves (`engines/child.py`). What has escaped that, because it was
started by a library in ways of its own, is found by its environment: whatever an actor starts inherits its mark. Every
actor looks when it starts and once a minute; what bears the mark of a process that is no more is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import psutil

from raylm.errors import EngineStartError

SWEEP_S = 60.0
"""How often each actor looks for orphans."""

_MARK = "RAYLM_OWNER"

_NAMESPACE = Path("/proc/self/ns/pid")

_FREE_SHARE = 0.1
"""A GPU with less of its memory in use than this is free: a driver and a desktop take some."""

_FREE_TIMEOUT_S = 60.0
"""How long the memory of a process that was killed may take to come back."""

_LOOK_S = 0.5

_log = logging.getLogger(__name__)


def mark() -> None:
    """Have all that this process starts from now on bear its mark. Does nothing but on Linux."""
    if sys.platform == "linux":
        os.environ[_MARK] = _name(os.getpid())


def sweep() -> list[int]:
    """Kill the processes of this user on this node whose owner is gone; return their ids. Blocks for some time."""
    killed: list[int] = []
    if sys.platform != "linux":
        return killed
    for process in psutil.process_iter():
        try:
            owner = process.environ().get(_MARK)
            if owner is None or _lives(owner):
                continue
            _log.warning(
                "process %d (%s) is left over from an actor that is gone: it ends", process.pid, process.name()
            )
            process.kill()
        except psutil.Error:  # it is not ours, or has just ended
            continue
        killed.append(process.pid)
    return killed


def _name(pid: int) -> str:
    """Return what no other process is called: its number may be another's by now, or in another container."""
    # Not psutil's time of creation, which moves with the system's clock.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    started_at = fields[19]  # in clock ticks since boot: field 22 of proc(5)
    return f"{_NAMESPACE.readlink()}:{pid}:{started_at}"


def _lives(owner: str) -> bool:
    namespace, pid, _ = owner.rsplit(":", 2)
    if namespace != str(_NAMESPACE.readlink()):
        return True  # as far as can be seen from here
    try:
        return _name(int(pid)) == owner
    except (ProcessLookupError, FileNotFoundError):
        return False


@dataclass(frozen=True)
class Memory:
    """A GPU's memory.

    Attributes:
        gpu: Its number on the node.
        used_bytes: In use, by whomever.
        total_bytes: All of it.
        pids: Processes that use it, as far as the driver tells.
    """

    gpu: int
    used_bytes: int
    total_bytes: int
    pids: tuple[int, ...] = ()

    @property
    def is_free(self) -> bool:
        """Whether an engine may have it."""
        return self.used_bytes < _FREE_SHARE * self.total_bytes

    def __str__(self) -> str:
        who = f" by processes {', '.join(map(str, self.pids))}" if self.pids else ""
        return f"{self.used_bytes / 2**30:.1f} of {self.total_bytes / 2**30:.1f} GiB of GPU {self.gpu} are in use{who}"


async def gpus_free(gpus: Sequence[int]) -> None:
    """Return when the memory of these GPUs is free. At once where NVML is not installed, or sees no GPU.

    Raises:
        EngineStartError: somebody keeps it; the text says who.
    """
    if not gpus or find_spec("pynvml") is None:
        return
    try:
        async with asyncio.timeout(_FREE_TIMEOUT_S):
            # Nothing but asking tells.
            while taken := [memory for memory in await asyncio.to_thread(_memory, gpus) if not memory.is_free]:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)
    except TimeoutError:
        raise EngineStartError(
            f"{'; '.join(map(str, taken))}, after {_FREE_TIMEOUT_S:g} s. End what uses it, or tell Ray of fewer GPUs"
        ) from None


def _memory(gpus: Sequence[int]) -> list[Memory]:
    """Return the memory of some GPUs. Source: nvidia-ml-py 13, which wraps NVML."""
    nvml = import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, so no GPU of this kind
        return []
    try:
        found = []
        for gpu in gpus:
            handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            pids = tuple(process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
            found.append(Memory(gpu, memory.used, memory.total, pids))
        return found
    finally:
        nvml.nvmlShutdown()
