"""LMDeployEngine: lmdeploy's TurboMind and PyTorch engines, on GPUs.

lmdeploy runs in a child process, `lmdeploy_worker`. What the two processes say to each other, and why there are two, is
in `child.py`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from raylm.config import APIServerConfig, LMDeployConfig
from raylm.engines.base import Emit
from raylm.engines.child import ChildProcess
from raylm.engines.lmdeploy_worker import Load
from raylm.errors import EngineStartError
from raylm.messages import EngineInfo, EngineStatistics, Request
from raylm.models import BUILTIN_MODELS, fingerprint, model_name, resolve


class LMDeployEngine:
    """Generates with lmdeploy.

    `num_tokens`, `token_ids` and usage count every token that the model generated: the one that ended the sequence and
    those of a stop word are among them, though they have no text. `ignore_eos` means what it means to lmdeploy: the end
    of sequence is never generated.

    A continued request arrives at the greedy text of an undisturbed one as far as the model computes the same for the
    same tokens in another batch; GPU kernels do that nearly always. A sampled one goes on with other random numbers
    than it would have had.

    Args:
        config: Model and resources.

    Source: lmdeploy 0.18, `serve.core.AsyncEngine`.
    """

    def __init__(self, config: LMDeployConfig) -> None:
        self._config = config
        self._child = ChildProcess(
            "raylm.engines.lmdeploy_worker",
            "lmdeploy",
            "give it more memory, or lower cache_max_entry_count, session_len and max_batch_size",
        )

    async def start(self) -> EngineInfo:
        """Load the model in a child process. See `engines.base.Engine.start`. After a failure it may be called again.

        A child that dies or takes longer than `start_timeout_s` is killed, and another one tries, `start_attempts` in
        all.

        Raises:
            InvalidRequestError: lmdeploy's engine config has no such option, or not with that value.
            EngineStartError: no such model, no lmdeploy, or lmdeploy cannot load the model.
        """
        config = self._config
        # Before the child, which nobody would end if this failed after it.
        path, identity = await asyncio.to_thread(find_model, config)
        load = Load(
            path=str(path),
            backend=config.backend,
            device=config.device,
            engine_config={
                "tp": config.tp,
                "session_len": config.session_len,
                "max_batch_size": config.max_batch_size,
                "cache_max_entry_count": config.cache_share,
                "quant_policy": config.quant_policy,
                "dtype": config.dtype,
                "model_format": config.model_format,
                "enable_prefix_caching": config.prefix_caching,
            },
            options=config.options,
        )
        ready = await self._child.start(load, timeout_s=config.start_timeout_s, attempts=config.start_attempts)
        return EngineInfo(
            engine="lmdeploy",
            engine_version=ready.engine_version,
            model=config.model_name or model_name(config.path),
            max_context=ready.max_context,
            capacity=ready.capacity,
            device=f"{config.backend} on {config.device}" + (f", tp {config.tp}" if config.tp > 1 else ""),
            fingerprint=identity,
        )

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate one request. See `engines.base.Engine.generate`."""
        await self._child.generate(request, emit)

    async def tokenize(self, request: Request) -> tuple[int, ...]:
        """Return the ids of the prompt's tokens. See `engines.base.Engine.tokenize`."""
        return await self._child.tokenize(request)

    async def check_health(self) -> None:
        """Return when the child has answered that lmdeploy's engine lives, also in the middle of a forward pass.

        Raises:
            ActorLostError: the child or the engine in it is dead.
            EngineError: the engine has not started, or was closed.
        """
        await self._child.check_health()

    def statistics(self) -> EngineStatistics:
        """Return the load. An aborted request is running until lmdeploy has let go of it."""
        return self._child.statistics()

    async def close(self) -> None:
        """End the child. Requests that are still running fail with EngineError."""
        await self._child.close()


def find_model(config: LMDeployConfig | APIServerConfig) -> tuple[Path, str]:
    """Return where the files of a model are that lmdeploy is to load, and `EngineInfo.fingerprint`.

    Raises:
        EngineStartError: no such model, or a GGUF file of the user's.
    """
    path = resolve(config.path)
    if path.is_file() and config.path not in BUILTIN_MODELS:
        raise EngineStartError(
            f"lmdeploy reads no GGUF file, which {path} is; give the folder or hub id of the model that it was made "
            "from"
        )
    return path, fingerprint(path, config.backend, config.dtype, config.quant_policy, config.model_format)
