"""OpenVINOEngine: language models on CPU, the embedded default.

The model runs in a child process, `openvino_worker`, because its decode step would hold the GIL. What the two processes
say to each other is in `child.py`. Token ids become text on this side: the library's own detokenizer would cost the
decode loop hundreds of microseconds a step.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from raylm.config import OpenVINOConfig
from raylm.engines.base import Emit
from raylm.engines.child import ChildProcess
from raylm.engines.openvino_worker import Load
from raylm.errors import EngineStartError
from raylm.messages import EngineInfo, EngineStatistics, Request
from raylm.models import fingerprint, max_context, model_name, resolve


class OpenVINOEngine:
    """Generates with OpenVINO GenAI and its continuous batching.

    `num_tokens`, `token_ids` and usage count every token that the model generated: the one that ended the sequence and
    those of a stop word are among them, though they have no text.

    A continued request arrives at the greedy text of an undisturbed one if the engine is `deterministic`, and if there
    is no presence or frequency penalty, which begin anew. A sampled one goes on with other random numbers than it would
    have had.

    Args:
        config: Model and resources.

    Source: openvino-genai 2026.4, `ContinuousBatchingPipeline`.
    """

    def __init__(self, config: OpenVINOConfig) -> None:
        self._config = config
        self._child = ChildProcess(
            "raylm.engines.openvino_worker",
            "OpenVINO",
            "give it more memory, or lower cache_size_gb and capacity",
        )

    async def start(self) -> EngineInfo:
        """Load the model in a child process. See `engines.base.Engine.start`. After a failure it may be called again.

        Raises:
            EngineStartError: no such model, no openvino-genai, or OpenVINO cannot load the model in `start_timeout_s`.
        """
        config = self._config
        path = await asyncio.to_thread(resolve, config.path)
        load = Load(
            path=str(path),
            capacity=config.capacity,
            max_context=await asyncio.to_thread(_context, path, config.max_context),
            cache_size_gb=config.cache_size_gb,
            num_threads=config.num_threads,
            deterministic=config.deterministic,
            prefix_caching=config.prefix_caching,
        )
        # Before the child, which nobody would end if this failed after it.
        identity = await asyncio.to_thread(fingerprint, path, config.deterministic)
        ready = await self._child.start(load, timeout_s=config.start_timeout_s)
        return EngineInfo(
            engine="openvino",
            engine_version=ready.engine_version,
            model=config.model_name or model_name(config.path),
            max_context=ready.max_context,
            capacity=ready.capacity,
            device="CPU" if config.num_threads is None else f"CPU ({config.num_threads} threads)",
            fingerprint=identity,
        )

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate one request. See `engines.base.Engine.generate`."""
        await self._child.generate(request, emit)

    async def tokenize(self, request: Request) -> tuple[int, ...]:
        """Return the ids of the prompt's tokens. See `engines.base.Engine.tokenize`."""
        return await self._child.tokenize(request)

    async def check_health(self) -> None:
        """Return when the child has answered a ping, which it does between two decode steps.

        Raises:
            ActorLostError: the child is dead.
            EngineError: the engine has not started, or was closed.
        """
        await self._child.check_health()

    def statistics(self) -> EngineStatistics:
        """Return the load. An aborted request is running until the child has let go of it."""
        return self._child.statistics()

    async def close(self) -> None:
        """End the child. Requests that are still running fail with EngineError."""
        await self._child.close()


def _context(path: Path, limit: int | None) -> int:
    """Return the smaller of the model's own context and `limit`."""
    try:
        own = max_context(path)
    except EngineStartError:
        if limit is None:
            raise
        return limit
    return own if limit is None else min(own, limit)
