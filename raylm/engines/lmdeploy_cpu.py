"""Makes the unmodified lmdeploy PyTorch engine run where there is no GPU. For development and tests.

    from raylm.engines import lmdeploy_cpu
    lmdeploy_cpu.install()                                               # before an engine is built
    lmdeploy.pipeline(folder, backend_config=PytorchEngineConfig(session_len=2048, num_gpu_blocks=64))

or, for lmdeploy's command line,

    python -m raylm.engines.lmdeploy_cpu serve api_server FOLDER --backend pytorch

It adds a device type `cpu` in the way in which lmdeploy's own ascend, camb and maca devices are added: a set of
operators, built on lmdeploy's `default` torch ones, with a paged attention in plain torch; and stand-ins for the
torch.cuda calls of the engine. Nothing is faked. Scheduler, paging, sampling, sessions and servers are lmdeploy's, and
every token comes from a forward pass. `tp` > 1 goes through lmdeploy's Ray executor, over gloo, on Ray's logical GPUs.

What it cannot do: TurboMind, data and expert parallelism, LoRA, mixtures of experts, quantised weights or KV cache,
attention sinks, ALiBi and soft-capped logits. Those raise. What it cannot show: races between CUDA streams.

It replaces private names of lmdeploy, so it refuses every version but the one that it was written for.
`make test-lmdeploy-regression` compares it with transformers; run that before raising the version.

Source: lmdeploy 0.18.0; the modules and symbols are named where they are replaced.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SUPPORTED_VERSION = "0.18.0"

MEMORY_VARIABLE = "LMDEPLOY_CPU_MEM_GB"
"""Environment variable: memory, in GiB, that an engine may plan its KV cache with. 2 if it is not set."""

_MAX_BATCH_SIZE = 32  # where the user does not say; lmdeploy's table of devices has no CPU

_SHIMMED = (
    "lmdeploy.pytorch.engine.model_agent.agent",
    "lmdeploy.pytorch.engine.cache_engine.engine",
    "lmdeploy.pytorch.engine.cache_engine.layout",
    "lmdeploy.pytorch.engine.logits_process",
    "lmdeploy.pytorch.strategies.base.model_inputs",
)
"""Modules whose global name `torch` becomes a `_TorchShim`. The real torch.cuda stays as it is for everybody else."""

_installed = False


class _Finished:
    """A CUDA stream or event: work on a CPU is finished when the call returns, so there is nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def query(self) -> bool:
        """Return that the work is done."""
        return True

    def _wait(self, *args: object, **kwargs: object) -> None:
        pass

    synchronize = wait = wait_event = wait_stream = record = _wait


_DEFAULT_STREAM = _Finished()


@contextlib.contextmanager
def _stream(stream: Any = None) -> Iterator[Any]:
    yield stream


class _TorchShim(types.ModuleType):
    """`torch` as a few modules of lmdeploy see it: `torch.cuda` answers for the CPU, and 'cuda' means 'cpu'."""

    def __init__(self) -> None:
        import torch

        super().__init__("torch_on_cpu")
        self.cuda = types.SimpleNamespace(
            Stream=_Finished,
            Event=_Finished,
            stream=_stream,
            current_stream=lambda *_: _DEFAULT_STREAM,
            synchronize=lambda *_: None,
            empty_cache=lambda: None,
            current_device=lambda: "cpu",
        )
        for name in ("empty", "zeros", "full", "randint"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        import torch

        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory of tensors that puts on the CPU what was meant for a GPU."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


def _free_memory(*_: object) -> tuple[int, int]:
    """Return the memory that an engine may plan with: (free, total), in bytes."""
    import psutil

    total = int(float(os.environ.get(MEMORY_VARIABLE, "2")) * (1 << 30))
    return min(total, psutil.virtual_memory().available), total


def _make_backend() -> type[Any]:
    """Return the set of operators for the CPU, an `OpsBackend`."""
    import torch
    from lmdeploy.pytorch.backends.attention import AttentionImpl, AttentionMetadata, PagedAttentionBuildSpec
    from lmdeploy.pytorch.backends.default import DefaultOpsBackend
    from lmdeploy.pytorch.backends.default.multinomial_sampling import DefaultMultinomialSamplingImpl
    from lmdeploy.pytorch.backends.multinomial_sampling import MultinomialSamplingBuildSpec

    @dataclass
    class CpuAttentionMetadata(AttentionMetadata):
        """What one step's attention needs.

        Attributes:
            slots: Block and offset in the paged cache of every new token.
            blocks: The part of the block table that is in use, [sequences, blocks].
            rows: Of each sequence: its first and last query, the length of its keys, its blocks. None when every
                sequence has one query.
        """

        slots: Any = None
        blocks: Any = None
        rows: Any = None

    class CpuPagedAttention(AttentionImpl):
        """Writes the new keys and values into the paged cache, gathers each sequence's blocks, and attends."""

        def forward(
            self,
            query: Any,
            key: Any,
            value: Any,
            k_cache: Any,
            v_cache: Any,
            attn_metadata: Any,
            k_scales_zeros: Any = None,
            v_scales_zeros: Any = None,
            learnable_sink: Any = None,
            nsa_indices: Any = None,
            inplace: bool = True,
        ) -> Any:
            """Attend. Shapes: query [tokens, heads, size], key and value [tokens, kv heads, size]."""
            if learnable_sink is not None or nsa_indices is not None:
                raise NotImplementedError("attention sinks and sparse attention on device_type='cpu'")
            meta = attn_metadata
            k_cache[meta.slots] = key.to(k_cache.dtype)
            v_cache[meta.slots] = value.to(v_cache.dtype)
            attend = functools.partial(
                torch.nn.functional.scaled_dot_product_attention,
                scale=self.scale,
                enable_gqa=self.num_heads != self.num_kv_heads,
            )
            if meta.rows is None:  # the whole batch in one call
                keys, values = (cache[meta.blocks].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
                mask = self._mask(meta.kv_seqlens[:, None] - 1, torch.arange(keys.size(2))[None])
                return attend(query[:, :, None], keys, values, attn_mask=mask[:, None, None])[:, :, 0]
            out = query.new_empty(*query.shape[:-1], self.v_head_size)
            for begin, end, length, blocks in meta.rows:
                keys, values = (
                    cache[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (k_cache, v_cache)
                )
                mask = self._mask(torch.arange(length - (end - begin), length)[:, None], torch.arange(length)[None])
                rows = attend(query[begin:end].transpose(0, 1)[None], keys, values, attn_mask=mask)
                out[begin:end] = rows[0].transpose(0, 1)
            return out

        def _mask(self, query_at: Any, key_at: Any) -> Any:
            """Return which keys a query sees, by their positions in the sequence."""
            mask = key_at <= query_at if self.causal else key_at < key_at.max() + 1
            window = self.sliding_window
            window = window[0] if isinstance(window, tuple | list) else window
            if window is not None and window > 0:
                # transformers' window. lmdeploy's GPU kernel sees one key more in a prefill.
                mask &= key_at > query_at - window
            return mask

    class CpuMultinomial(DefaultMultinomialSamplingImpl):
        """Draws by each request's own seed, as lmdeploy's CUDA kernel does."""

        def forward(self, scores: Any, seeds: Any, offsets: Any, indices: Any = None) -> Any:
            """Draw one of `scores` [sequences, candidates] for each sequence."""
            draws = []
            for row, seed, offset in zip(scores, seeds.tolist(), offsets.tolist(), strict=True):
                generator = torch.Generator().manual_seed((seed * 1000003 + offset) % (1 << 63))
                draws.append(torch.multinomial(row.float(), 1, generator=generator))
            drawn = torch.stack(draws)
            return (drawn if indices is None else indices.gather(1, drawn)).view(-1)

    class CpuOpsBackend(DefaultOpsBackend):
        """The operators of device type `cpu`."""

        @staticmethod
        def get_name() -> str:
            return "cpu"

        @classmethod
        def build_op(cls, spec: Any, *, enable_deterministic: bool = False) -> Any:
            if isinstance(spec, PagedAttentionBuildSpec):
                if spec.alibi or spec.logit_softcapping > 0 or spec.block_sparse_size != 1 or spec.use_flash_mla:
                    raise NotImplementedError(f"{spec} on device_type='cpu'")
                return CpuPagedAttention(
                    num_heads=spec.num_heads,
                    head_size=spec.head_dim,
                    scale=spec.scale,
                    num_kv_heads=spec.num_kv_heads,
                    v_head_size=spec.v_head_dim,
                    sliding_window=spec.sliding_window,
                    causal=spec.causal,
                )
            if isinstance(spec, MultinomialSamplingBuildSpec):
                return CpuMultinomial()
            return super().build_op(spec, enable_deterministic=enable_deterministic)

        @staticmethod
        def get_attention_metadata_cls() -> type[Any]:
            return CpuAttentionMetadata

        @staticmethod
        def ccl_backend() -> str:
            return "gloo"

        @staticmethod
        def support_ray() -> bool:
            _install_ray()
            return True

        @classmethod
        def update_step_context(cls, ctx: Any) -> Any:
            """Work out, once a step and not once a layer, where in the cache everything is."""
            size = ctx.cache_config.kernel_block_size
            q_lens, kv_lens = ctx.q_seqlens, ctx.kv_seqlens
            blocks, starts = ctx.block_offsets.long(), ctx.q_start_loc
            num_tokens = int(q_lens.sum())
            sequence = torch.repeat_interleave(torch.arange(len(q_lens)), q_lens)
            position = torch.arange(num_tokens) - starts[sequence] + (kv_lens - q_lens)[sequence]
            meta = CpuAttentionMetadata(
                is_decoding=ctx.is_decoding,
                block_offsets=blocks,
                q_start_loc=starts,
                q_seqlens=q_lens,
                kv_seqlens=kv_lens,
                quant_policy=ctx.kv_quant_policy,
                slots=(blocks[sequence, position // size], position % size),
            )
            meta.blocks = blocks[:, : -(-int(kv_lens.max()) // size)]
            if num_tokens != len(q_lens):
                begins, ends = starts.tolist(), (starts + q_lens).tolist()
                meta.rows = tuple(
                    (begin, end, length, row[: -(-length // size)])
                    for begin, end, length, row in zip(begins, ends, kv_lens.tolist(), blocks, strict=False)
                )
            ctx.attn_metadata = meta
            return ctx

    return CpuOpsBackend


def install() -> None:
    """Teach this process's lmdeploy to run on CPU. Device types `cuda`, its default, and `cpu` both mean that then.

    Does nothing where torch sees a GPU, or when it was done before.

    Raises:
        RuntimeError: lmdeploy has another version than `SUPPORTED_VERSION`.
    """
    global _installed
    import lmdeploy
    import torch

    if _installed or torch.cuda.is_available():
        return
    if lmdeploy.__version__ != SUPPORTED_VERSION:
        raise RuntimeError(
            f"raylm.engines.lmdeploy_cpu was written for lmdeploy {SUPPORTED_VERSION} and this is "
            f"{lmdeploy.__version__}; pip install lmdeploy=={SUPPORTED_VERSION}, or run on a GPU"
        )
    _install_config()
    _install_backend()
    _install_limits()
    _install_device()
    _install_child()
    _installed = True


def _install_config() -> None:
    """Accept `device_type="cpu"`, and there `dtype="float32"`."""
    from lmdeploy import archs, messages
    from lmdeploy.cli.utils import ArgumentHelper

    post_init = messages.PytorchEngineConfig.__post_init__

    def checked_post_init(self: Any) -> None:
        on_cpu = self.device_type in {"cpu", "cuda"}
        dtype = self.dtype
        if on_cpu:
            self.device_type, self.dtype = "cuda", "auto" if dtype == "float32" else dtype
        post_init(self)
        if on_cpu:
            if self.dp * self.ep > 1 or self.quant_policy:
                raise ValueError("device_type='cpu' is for dp = ep = 1 and a KV cache that is not quantised")
            self.device_type, self.dtype, self.eager_mode = "cpu", dtype, True

    messages.PytorchEngineConfig.__post_init__ = checked_post_init
    ArgumentHelper.device.__defaults__[-1].append("cpu")  # the choices of --device
    archs.autoget_backend = lambda *_, **__: "pytorch"  # TurboMind has no build for CPUs


def _install_backend() -> None:
    """Provide the operators of device type `cpu`."""
    from lmdeploy.pytorch.backends import selector

    backend, get_backend = _make_backend(), selector._get_backend

    def _get_backend() -> Any:
        on_cpu = selector.get_device_manager().current_context().device_type == "cpu"
        return backend if on_cpu else get_backend()

    selector._get_backend = _get_backend


def _install_limits() -> None:
    """Answer for the CPU where limits and checks ask a device."""
    import torch
    from lmdeploy.cli import serve
    from lmdeploy.pytorch import config
    from lmdeploy.pytorch.backends.default import rotary_embedding
    from lmdeploy.pytorch.check_env.torch import TorchChecker
    from lmdeploy.pytorch.engine import config_builder

    max_batch_size, update_torch_dtype = config_builder.get_max_batch_size, config._update_torch_dtype
    for module in (config_builder, serve):
        module.get_max_batch_size = lambda device: (
            _MAX_BATCH_SIZE if device in {"cpu", "cuda"} else max_batch_size(device)
        )

    def _update_torch_dtype(model_config: Any, dtype: str, device_type: str = "auto") -> Any:
        if device_type != "cpu":
            return update_torch_dtype(model_config, dtype, device_type)
        # lmdeploy would turn float32 into float16, which is for GPUs.
        own = str(getattr(model_config.hf_config, "dtype", None) or "float32").rpartition(".")[2]
        model_config.dtype = getattr(torch, own if dtype == "auto" else dtype)
        return model_config

    config._update_torch_dtype = _update_torch_dtype
    TorchChecker.__init__.__defaults__ = ("cpu", None)
    # Without torch.compile, which needs a C++ compiler and a minute.
    rotary_embedding._rotary_embedding_fwd = rotary_embedding._rotary_embedding_fwd.__wrapped__


def _install_device() -> None:
    """Stand in for the engine's torch.cuda calls and its literal device `cuda`."""
    from lmdeploy.pytorch.engine.model_agent import agent

    shim = _TorchShim()
    for name in _SHIMMED:
        importlib.import_module(name).torch = shim  # type: ignore[attr-defined]
    agent.get_gpu_memory = _free_memory
    agent._try_to_cuda = lambda value, non_blocking=False: (  # noqa: ARG005 - lmdeploy passes it by name
        value.to_device("cpu") if hasattr(value, "to_device") else value
    )
    init = agent.BaseModelAgent.__init__

    def on_cpu_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.device = "cpu"

    agent.BaseModelAgent.__init__ = on_cpu_init


_engine_process: Callable[..., None] | None = None


def _install_child() -> None:
    """Install in the engine's own process, too, where lmdeploy gives it one: `enable_mp_engine`, api_server."""
    global _engine_process
    from lmdeploy.pytorch.engine.mp_engine import zmq_engine

    _engine_process = zmq_engine.ZMQMPEngine._mp_proc
    zmq_engine.ZMQMPEngine._mp_proc = staticmethod(_mp_proc)


def _mp_proc(shared_dict: Any, condition: Any, *args: Any, **kwargs: Any) -> None:
    install()
    if _engine_process is None:
        raise AssertionError("unreachable: install sets it")
    _engine_process(shared_dict, _Condition(condition), *args, **kwargs)


class _Condition:
    """A condition of a manager that may be gone when it is released.

    The parent stops the manager once it has read the port, sometimes before the child's release has been answered; the
    child then dies of EOFError, on one core at half of all starts. Source: lmdeploy 0.18.0, `zmq_engine.py`, lines 79
    to 101 and 132. On a GPU this class is not there, and the race is.
    """

    def __init__(self, condition: Any) -> None:
        self.notify = condition.notify
        self._condition = condition

    def __enter__(self) -> Any:
        return self._condition.__enter__()

    def __exit__(self, *error: Any) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            self._condition.__exit__(*error)


class _Marked:
    """Marks the worker class that `_install_ray` has put in place."""


def _install_ray() -> None:
    """For tp > 1: lmdeploy's Ray executor over gloo, on Ray's logical GPUs."""
    import torch
    from lmdeploy.pytorch import ray as lmdeploy_ray
    from lmdeploy.pytorch.devices import DeviceContext, get_device_manager
    from lmdeploy.pytorch.engine.executor import ray_executor

    if issubclass(ray_executor.RayWorkerWrapper, _Marked):
        return

    class RayWorker(_Marked, ray_executor.RayWorkerWrapper):
        """A rank. Its class travels to the rank's process, and installs there."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            install()
            super().__init__(*args, **kwargs)

        def init_process_group(self, *args: Any, **kwargs: Any) -> None:
            with get_device_manager().context(DeviceContext("cpu")):
                super().init_process_group(*args, **kwargs)

        def warmup_dist(self) -> None:
            torch.distributed.all_reduce(torch.zeros(1), group=self.dist_ctx.tp_group.gpu_group)

    device_str = lmdeploy_ray.get_device_str
    by_device = ray_executor.RayExecutor._init_distributed_environment_by_device

    def get_device_str(device_type: str | None = None) -> Any:
        device_type = device_type or get_device_manager().current_context().device_type
        return device_str("cuda" if device_type == "cpu" else device_type)

    def init_by_device(self: Any, device: str) -> None:
        by_device(self, "cuda" if device == "cpu" else device)

    lmdeploy_ray.get_device_str = ray_executor.get_device_str = get_device_str
    ray_executor.RayExecutor._init_distributed_environment_by_device = init_by_device
    ray_executor.RayWorkerWrapper = RayWorker


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lmdeploy's command line on CPU.

    Args:
        arguments: Its arguments; None takes this process's.
    """
    # Threads that spin while they wait bring a machine with other work to its knees. Read as torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    install()
    from lmdeploy.cli import run

    if arguments is not None:
        sys.argv[1:] = arguments
    sys.exit(run())


if __name__ == "__main__":
    # Under its own name: what travels to the engine's process is found there by it, not as `__main__`.
    from raylm.engines import lmdeploy_cpu

    lmdeploy_cpu.main()
