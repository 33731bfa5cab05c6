"""lagent's four classes, each for asyncio programs and for those without an event loop.

They differ in where the model is; what they do with it is in `chatbot.py`.

| class | the model is |
|---|---|
| `LMDeployPipeline` | in the actors |
| `LMDeployServer` | in lmdeploy api_servers that the actors start |
| `LMDeployClient` | in an api_server, or any server that speaks OpenAI's protocol, which runs already |
| `TritonClient` | in a Triton server which runs already |
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Concatenate, Literal, ParamSpec

from raylm.actors.cluster import nodes
from raylm.chatbot import AsyncChatbot, AsyncServedModel, Chatbot, as_dict
from raylm.config import (
    APIServerConfig,
    Backend,
    EngineConfig,
    HTTPConfig,
    LMDeployConfig,
    OpenVINOConfig,
    PoolConfig,
    SessionConfig,
    TritonConfig,
)
from raylm.errors import InvalidRequestError
from raylm.models import model_name as short_name

P = ParamSpec("P")
Device = Literal["auto", "cuda", "cpu"]

_log = logging.getLogger(__name__)
_said: set[str] = set()


class AsyncLMDeployPipeline(AsyncChatbot):
    """A model in the actors of a Ray cluster.

    Args:
        path: Model: a built-in alias (`smollm2-135m-instruct`), a local file or folder, or a hub id.
        model_name: Name in receipts; None takes it from `path`.
        tp: GPUs of one replica. Must be 1 for an engine on CPU.
        replicas: Actors that serve the model.
        backend: `turbomind` and `pytorch` are lmdeploy's engines; `openvino` is for CPU. `auto` takes turbomind where
            the cluster has a GPU; a model that turbomind lacks is an error that says so, and needs `pytorch`. Where
            there is none that is openvino, or pytorch where only lmdeploy is installed.
        meta_template: See `AsyncChatbot`, as for the other arguments.
        max_new_tokens: Limit on generated tokens, >= 1.
        top_p: In (0, 1]; nucleus of probability mass to sample from.
        top_k: >= 1; how many of the likeliest tokens to sample from. None: no limit.
        temperature: >= 0; 0 is greedy decoding.
        repetition_penalty: > 0; 1.0 is none.
        stop_words: Text or texts that end the generation and are not part of it.
        device: Where lmdeploy's pytorch engine computes; its turbomind engine needs GPUs. `cpu` is for development and
            tests. `auto` takes it where the cluster has no GPU, and says so.
        backend_config: Settings of the engine; a sequence has one for each replica. `path`, `model_name` and `tp` are
            replaced by the arguments; `backend` and `device` are its own, and the arguments may be left out then. A
            `SimulatedConfig` needs no model.
        address: Address of the Ray cluster; `local` starts one for this pipeline whatever else runs.
        pool_config: Limits and bounds of the pool.
        session_config: Where sessions are kept, and their limits.

    Raises:
        InvalidRequestError: a parameter is out of range, or `backend` or `device` is not that of `backend_config`.
    """

    def __init__(
        self,
        path: str,
        model_name: str | None = None,
        tp: int = 1,
        replicas: int = 1,
        backend: Backend = "auto",
        meta_template: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 512,
        top_p: float = 0.8,
        top_k: int | None = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        stop_words: str | Sequence[str] | None = None,
        *,
        device: Device = "auto",
        backend_config: EngineConfig | Sequence[EngineConfig] | None = None,
        address: str | None = None,
        pool_config: PoolConfig | None = None,
        session_config: SessionConfig | None = None,
    ) -> None:
        super().__init__(
            (),
            meta_template=meta_template,
            max_new_tokens=max_new_tokens,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            stop_words=stop_words,
            address=address,
            pool_config=pool_config,
            session_config=session_config,
        )
        _check_model(path, tp, replicas)
        _check_device(backend, device)
        if backend_config is not None:
            given = backend_config if isinstance(backend_config, Sequence) else [backend_config]
            for config in given:
                _check_agreement("backend", backend, getattr(config, "backend", config.kind))
                _check_agreement("device", device, getattr(config, "device", "cpu"))
        self.path = path
        self.model_name = model_name
        self.tp = tp
        self.replicas = replicas
        self.backend = backend
        self.device = device
        self._backend_config = backend_config

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r} on {self._pool!r}>"

    def _place(self) -> list[EngineConfig]:
        given = self._backend_config
        if given is None:
            given = self._pick()
        configs = list(given) if isinstance(given, Sequence) else [given] * self.replicas
        if len(configs) != self.replicas:
            raise InvalidRequestError(f"backend_config has {len(configs)} entries for {self.replicas} replicas")
        return [self._complete(config) for config in configs]

    def _complete(self, config: EngineConfig) -> EngineConfig:
        model = {"path": self.path, "model_name": self.model_name or short_name(self.path)}
        if isinstance(config, LMDeployConfig | APIServerConfig):
            return config.updated({**model, "tp": self.tp})
        if self.tp != 1:
            raise InvalidRequestError(f"tp={self.tp} spreads a model over GPUs; a {config.kind} engine takes tp=1")
        if isinstance(config, OpenVINOConfig):
            cpus = min((node.num_cpus for node in nodes()), default=1)
            threads = max(1, int(cpus * len(nodes())) // self.replicas)
            return config.updated({**model, "num_threads": config.num_threads or min(threads, max(1, int(cpus)))})
        return config

    def _pick(self) -> EngineConfig:
        backend = self.backend
        if backend == "auto" and self.device != "cuda":
            on_gpu = self.device == "auto" and any(node.num_gpus for node in nodes())
            if not on_gpu and (find_spec("openvino_genai") is not None or find_spec("lmdeploy") is None):
                backend = "openvino"
                if self.device == "auto":
                    _say_once("the cluster has no GPU: backend 'auto' is openvino, on CPU")
        if backend == "openvino":
            return OpenVINOConfig()
        engine, device = _engine_and_device(backend, self.device)
        return LMDeployConfig().updated({"backend": engine, "device": device})


class AsyncLMDeployServer(AsyncChatbot):
    """A model in lmdeploy api_servers, each a child process of its actor.

    Args:
        path: Model: a built-in alias (`smollm2-135m-instruct`), a local folder, or a hub id.
        model_name: Name in receipts and at the servers; None takes it from `path`.
        server_name: Address that a server listens on.
        server_port: Its port. 0 takes a free one of 127.0.0.1, which several replicas need.
        tp: GPUs of one server.
        meta_template: See `AsyncChatbot`, as for the other arguments.
        max_new_tokens: Limit on generated tokens, >= 1.
        top_p: In (0, 1]; nucleus of probability mass to sample from.
        top_k: >= 1; how many of the likeliest tokens to sample from. None: no limit.
        temperature: >= 0; 0 is greedy decoding.
        repetition_penalty: > 0; 1.0 is none.
        stop_words: Text or texts that end the generation and are not part of it.
        replicas: Servers.
        backend: lmdeploy's engine; `auto` takes turbomind where the cluster has a GPU, and pytorch where it has none.
            A server that is told turbomind takes pytorch for a model that turbomind lacks.
        device: As in `AsyncLMDeployPipeline`.
        backend_config: Further settings of the servers; the arguments above take the place of theirs.
        address: Address of the Ray cluster; `local` starts one for this chatbot whatever else runs.
        pool_config: Limits and bounds of the pool.
        session_config: Where sessions are kept, and their limits.

    Raises:
        InvalidRequestError: a parameter is out of range.
    """

    def __init__(
        self,
        path: str,
        model_name: str | None = None,
        server_name: str = "0.0.0.0",  # noqa: S104  (lmdeploy's default)
        server_port: int = 23333,
        tp: int = 1,
        meta_template: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 512,
        top_p: float = 0.8,
        top_k: int | None = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        stop_words: str | Sequence[str] | None = None,
        *,
        replicas: int = 1,
        backend: Literal["auto", "turbomind", "pytorch"] = "auto",
        device: Device = "auto",
        backend_config: APIServerConfig | None = None,
        address: str | None = None,
        pool_config: PoolConfig | None = None,
        session_config: SessionConfig | None = None,
    ) -> None:
        _check_model(path, tp, replicas)
        if replicas > 1 and server_port:
            raise InvalidRequestError(
                f"server_port: {replicas} servers cannot share port {server_port}; 0 takes a free one for each"
            )
        _check_device(backend, device)
        given = backend_config or APIServerConfig()
        fixed = given.model_dump(include=given.model_fields_set & {"backend", "device"})
        _check_agreement("backend", backend, fixed.get("backend", backend))
        _check_agreement("device", device, fixed.get("device", device))
        config = given.updated(
            {
                "path": path,
                "model_name": model_name or short_name(path),
                "server_name": server_name,
                "server_port": server_port,
                "tp": tp,
            }
        )
        super().__init__(
            [config] * replicas,
            meta_template=meta_template,
            max_new_tokens=max_new_tokens,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            stop_words=stop_words,
            address=address,
            pool_config=pool_config,
            session_config=session_config,
        )
        self.backend = fixed.get("backend", backend)
        self.device = fixed.get("device", device)

    def _place(self) -> Sequence[EngineConfig]:
        backend, device = _engine_and_device(self.backend, self.device)
        return [config.updated({"backend": backend, "device": device}) for config in super()._place()]


class AsyncLMDeployClient(AsyncChatbot):
    """A client of lmdeploy api_servers, or of any servers that speak OpenAI's protocol.

    Args:
        url: The server, such as `http://10.0.0.5:23333`, or several that serve the same model.
        model_name: Which of its models; None takes its first one.
        meta_template: See `AsyncChatbot`, as for the other arguments. None leaves the template to the server.
        max_new_tokens: Limit on generated tokens, >= 1.
        top_p: In (0, 1]; nucleus of probability mass to sample from.
        top_k: >= 1; how many of the likeliest tokens to sample from. None: no limit.
        temperature: >= 0; 0 is greedy decoding.
        repetition_penalty: > 0; 1.0 is none.
        stop_words: Text or texts that end the generation and are not part of it.
        api_key: Sent as bearer token; None sends none.
        backend_config: Further settings of the clients; `url` is replaced by the argument.
        address: Address of the Ray cluster; `local` starts one for this chatbot whatever else runs.
        pool_config: Limits and bounds of the pool.
        session_config: Where sessions are kept, and their limits.

    Raises:
        InvalidRequestError: a parameter is out of range.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model_name: str | None = None,
        meta_template: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 512,
        top_p: float = 0.8,
        top_k: int | None = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        stop_words: str | Sequence[str] | None = None,
        *,
        api_key: str | None = None,
        backend_config: HTTPConfig | None = None,
        address: str | None = None,
        pool_config: PoolConfig | None = None,
        session_config: SessionConfig | None = None,
    ) -> None:
        urls = list(url) if isinstance(url, list | tuple) else [url]
        if not all(isinstance(url, str) and url.startswith(("http://", "https://")) for url in urls) or not urls:
            raise InvalidRequestError(f"url: expected http://HOST:PORT, or a list of them, got {url!r}")
        given = backend_config or HTTPConfig(url=urls[0])
        update: dict[str, Any] = {"model_name": model_name or given.model_name, "api_key": api_key or given.api_key}
        super().__init__(
            [given.updated({**update, "url": url}) for url in urls],
            meta_template=meta_template,
            max_new_tokens=max_new_tokens,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            stop_words=stop_words,
            address=address,
            pool_config=pool_config,
            session_config=session_config,
        )


class AsyncTritonClient(AsyncChatbot):
    """A client of Triton servers.

    Args:
        tritonserver_addr: `ip:port` of the server's gRPC endpoint, or several that serve the same model.
        model_name: The model in its repository.
        session_len: Prompt and generated tokens together.
        meta_template: See `AsyncChatbot`, as for the other arguments. Triton has no template of its own, so that
            `stream_chat` and `chat` need this one.
        max_new_tokens: Limit on generated tokens, >= 1.
        top_p: In (0, 1]; nucleus of probability mass to sample from.
        top_k: >= 1; how many of the likeliest tokens to sample from. None: no limit.
        temperature: >= 0; 0 is greedy decoding.
        repetition_penalty: > 0; 1.0 is none.
        stop_words: Text or texts that end the generation and are not part of it.
        backend_config: Further settings of the clients, such as TLS; the arguments above take the place of theirs.
        address: Address of the Ray cluster; `local` starts one for this chatbot whatever else runs.
        pool_config: Limits and bounds of the pool.
        session_config: Where sessions are kept, and their limits.

    Raises:
        InvalidRequestError: a parameter is out of range.
    """

    def __init__(
        self,
        tritonserver_addr: str | Sequence[str],
        model_name: str,
        session_len: int = 32768,
        meta_template: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 512,
        top_p: float = 0.8,
        top_k: int | None = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        stop_words: str | Sequence[str] | None = None,
        *,
        backend_config: TritonConfig | None = None,
        address: str | None = None,
        pool_config: PoolConfig | None = None,
        session_config: SessionConfig | None = None,
    ) -> None:
        addresses = list(tritonserver_addr) if isinstance(tritonserver_addr, list | tuple) else [tritonserver_addr]
        if not all(isinstance(place, str) and ":" in place for place in addresses) or not addresses:
            raise InvalidRequestError(
                f"tritonserver_addr: expected IP:PORT, or a list of them, got {tritonserver_addr!r}"
            )
        given = backend_config or TritonConfig(address=addresses[0], model_name="")
        update: dict[str, Any] = {"model_name": model_name, "session_len": session_len}
        super().__init__(
            [given.updated({**update, "address": place}) for place in addresses],
            meta_template=meta_template,
            max_new_tokens=max_new_tokens,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            stop_words=stop_words,
            address=address,
            pool_config=pool_config,
            session_config=session_config,
        )


def _arguments_of(
    other: Callable[Concatenate[Any, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give a constructor the signature of another."""

    def wrap(constructor: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        return functools.wraps(other)(constructor)

    return wrap


class LMDeployPipeline(Chatbot):
    """A model in the actors of a Ray cluster. Arguments and errors are those of `AsyncLMDeployPipeline`.

    It is ready when the constructor returns. Use it in `with`, or call `close`.
    """

    @_arguments_of(AsyncLMDeployPipeline.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._start(AsyncLMDeployPipeline(*args, **kwargs))


class LMDeployServer(Chatbot):
    """A model in lmdeploy api_servers. Arguments and errors are those of `AsyncLMDeployServer`.

    It is ready when the constructor returns. Use it in `with`, or call `close`.
    """

    @_arguments_of(AsyncLMDeployServer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._start(AsyncLMDeployServer(*args, **kwargs))


class LMDeployClient(Chatbot):
    """A client of lmdeploy api_servers. Arguments and errors are those of `AsyncLMDeployClient`.

    It is ready when the constructor returns. Use it in `with`, or call `close`.
    """

    @_arguments_of(AsyncLMDeployClient.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._start(AsyncLMDeployClient(*args, **kwargs))


class TritonClient(Chatbot):
    """A client of Triton servers. Arguments and errors are those of `AsyncTritonClient`.

    It is ready when the constructor returns. Use it in `with`, or call `close`.
    """

    @_arguments_of(AsyncTritonClient.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._start(AsyncTritonClient(*args, **kwargs))


class ServedModel(Chatbot):
    """A model that is being served. Arguments and errors are those of `AsyncServedModel`.

    It is ready when the constructor returns. Use it in `with`, or call `close`.
    """

    def __init__(self, model: str, *, address: str | None = None, **sampling: Any) -> None:
        self._start(AsyncServedModel(model, address=address, **sampling))


def connect(model: str, *, address: str | None = None, **sampling: Any) -> ServedModel:
    """Return the pool of a model that `raylm serve` serves, for a program without an event loop.

    Args:
        model: Its name.
        address: Address of the Ray cluster, which `raylm serve` tells as it starts. None: that of `RAY_ADDRESS`, or
            the one that runs on this machine.
        sampling: Generation parameters, as in `AsyncChatbot`.

    Raises:
        ModelNotFoundError: no model of that name is served on the cluster.
        PlacementError: there is no cluster at the address.
    """
    return ServedModel(model, address=address, **sampling)


def _check_model(path: object, tp: int, replicas: int) -> None:
    if not isinstance(path, str) or not path:
        raise InvalidRequestError(f"path: expected the name or place of a model, got {path!r}")
    if replicas < 1 or tp < 1:
        raise InvalidRequestError(f"replicas and tp must be at least 1, got {replicas} and {tp}")


def _check_device(backend: str, device: str) -> None:
    if backend == "turbomind" and device == "cpu":
        raise InvalidRequestError("device: lmdeploy's turbomind engine does not run on the cpu; pytorch does")
    if backend == "openvino" and device == "cuda":
        raise InvalidRequestError("device: the openvino engine runs on the cpu alone; turbomind and pytorch use GPUs")


def _check_agreement(name: str, asked: str, has: str) -> None:
    """Raise where an argument asks for another engine, or another place for it, than the settings that are given."""
    if asked not in ("auto", has):
        raise InvalidRequestError(
            f"{name}: {asked!r}, but backend_config (--engine-config) is for {has!r}; leave {name} out, or give a "
            f"backend_config for {asked!r}"
        )


def _engine_and_device(backend: str, device: str) -> tuple[str, str]:
    """Return which engine of lmdeploy is to run where, now that there is a cluster to look at."""
    if backend not in ("auto", "turbomind", "pytorch"):
        raise InvalidRequestError(f"backend: expected auto, turbomind, pytorch or openvino, got {backend!r}")
    _check_device(backend, device)
    has_gpu = any(node.num_gpus for node in nodes())
    if backend == "turbomind" or (backend == "auto" and device in ("auto", "cuda") and has_gpu):
        return "turbomind", "cuda"
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
        if device == "cpu":
            _say_once(
                "the cluster has no GPU: lmdeploy's pytorch engine runs on CPU, which is for development and tests"
            )
    return "pytorch", device


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        _log.warning("%s", text)


__all__ = [
    "AsyncChatbot",
    "AsyncLMDeployClient",
    "AsyncLMDeployPipeline",
    "AsyncLMDeployServer",
    "AsyncTritonClient",
    "Chatbot",
    "LMDeployClient",
    "LMDeployPipeline",
    "LMDeployServer",
    "TritonClient",
    "as_dict",
]
