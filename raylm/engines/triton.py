"""TritonEngine: a client of a Triton Inference Server, over gRPC.

One connection for each engine, one call for each request. Which of the dialects in `triton_dialects` a model speaks is
found from its inputs, not from its name.

The protocol's messages and methods are tritonclient's; gRPC is used without its client class, whose layers around each
response cost more than what is done with the response.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

from raylm.config import TritonConfig
from raylm.engines.base import Emit
from raylm.engines.triton_dialects import (
    TURBOMIND,
    CallFailedError,
    Dialect,
    Model,
    Outputs,
    TextOutput,
    Values,
    describe,
    dialect_of,
    estimate_tokens,
)
from raylm.engines.triton_turbomind import BUSY, CONFLICT, TOO_LONG, Take, TurboMind, failure_code
from raylm.engines.watch import Watch
from raylm.errors import (
    AuthenticationError,
    ContextLengthError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    ProtocolError,
    RaylmError,
    RequestTimeoutError,
    SessionBusyError,
    UpstreamError,
)
from raylm.messages import Delta, EngineInfo, EngineStatistics, Request, Usage

_CALL_TIMEOUT_S = 5.0  # of calls that need no generation
_RETRY_S = 0.25  # between two looks for a server that is down
_CLOSE_S = 1.0  # for what gRPC leaves behind; calls of other engines may be among it
_DRAIN_S = 2.0  # for the server to end a call after the last delta

_CHANNEL = [
    # As long as they like; gRPC's own limit is 4 MiB.
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    # gRPC's own pause grows to two minutes; a server that is back must be found at once.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Engines in one process do not share a connection, nor the pauses of one that failed.
    ("grpc.use_local_subchannel_pool", 1),
]

STATUSES: dict[str, type[RaylmError]] = {
    "OK": ProtocolError,
    "CANCELLED": UpstreamError,
    "UNKNOWN": UpstreamError,
    "INVALID_ARGUMENT": InvalidRequestError,
    "DEADLINE_EXCEEDED": RequestTimeoutError,
    "NOT_FOUND": UpstreamError,  # the model is not loaded, which is not the caller's fault
    "ALREADY_EXISTS": InvalidRequestError,
    "PERMISSION_DENIED": AuthenticationError,
    "RESOURCE_EXHAUSTED": UpstreamError,
    "FAILED_PRECONDITION": InvalidRequestError,
    "ABORTED": UpstreamError,
    "OUT_OF_RANGE": InvalidRequestError,
    "UNIMPLEMENTED": ProtocolError,
    "INTERNAL": UpstreamError,
    "UNAVAILABLE": UpstreamError,
    "DATA_LOSS": UpstreamError,
    "UNAUTHENTICATED": AuthenticationError,
}
"""The error for each gRPC status, by name."""

_TOO_LONG = re.compile(
    r"longer than the maximum model length|maximum context length|sum of prompt length"
    r"|exceeds? (the )?(maximum|max) (input|sequence|model|context)"
    r"|should be less than max_(num_tokens|seq_len|input_len)",
    re.IGNORECASE,
)
_WRONG_TENSORS = re.compile(
    r"unexpected inference input|unexpected shape for input|inference input '.*' data-type|expected number of inputs"
    r"|missing required input|batch-size must be",
    re.IGNORECASE,
)
_TLS = re.compile(r"ssl|tls|certificate|handshake", re.IGNORECASE)
"""What servers and gRPC say, because an error in a stream has no status.

Source: vLLM 0.10, TensorRT-LLM 1.2, Triton 2.51, gRPC 1.85.
"""


class _Connection:
    """A connection to a server. Belongs to the event loop that runs when it is made.

    Attributes:
        stub: The server's methods.
        stream: `ModelStreamInfer`, called with one request. On the wire it is the same as that of the stub, for which
            gRPC would need a task that sends the one request.

    Raises:
        OSError: a file for TLS cannot be read.
    """

    def __init__(self, config: TritonConfig) -> None:
        if config.ssl:
            files = (config.ca_file, config.key_file, config.certificate_file)
            credentials = grpc.ssl_channel_credentials(*(file and Path(file).read_bytes() for file in files))
            self._channel = grpc.aio.secure_channel(config.address, credentials, options=_CHANNEL)
        else:
            self._channel = grpc.aio.insecure_channel(config.address, options=_CHANNEL)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self.stream = self._channel.unary_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    async def close(self) -> None:
        """End it, and the calls that are under way."""
        await self._channel.close()


class TritonEngine:
    """Generates on a Triton Inference Server.

    A server counts tokens where its model can be asked to; see `triton_dialects.TextOutput` for where it cannot. With
    TurboMind all counts are exact, and deltas have token ids.

    Server and model are found again after an outage; that they are the same is taken for granted until the model
    refuses its tensors, and then it is looked at again. A decoupled model is asked for a stream. Of one that is not,
    the one response has to come within `idle_timeout_s`.

    Args:
        config: Address, model and limits.

    Source: tritonclient 2.73, `tritonclient.grpc.service_pb2_grpc.GRPCInferenceServiceStub`.
    """

    def __init__(self, config: TritonConfig) -> None:
        self._config = config
        self._connection: _Connection | None = None
        # Why nothing can be asked of the engine now; None when it works. Raised as a copy.
        self._down: EngineError | None = EngineError("the engine has not started; call start first")
        self._model: Model | None = None
        self._dialect: Dialect | None = None  # None: TurboMind
        self._turbomind: TurboMind | None = None
        self._session_len = config.session_len
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_tokens = 0
        self._heard_at = 0.0  # when the latest response of any stream came

    async def start(self) -> EngineInfo:
        """Connect, and find out what the model is. See `engines.base.Engine.start`.

        After a failure it may be called again. Waits up to `start_timeout_s` for the server, and for a model that is
        being loaded.

        Raises:
            EngineStartError: no server, another kind of encryption, no such model, or none that generates text.
        """
        config = self._config
        await self._disconnect()
        try:
            self._connection = _Connection(config)
        except OSError as error:
            raise EngineStartError(
                f"cannot read a file for TLS: {error}; look at ca_file, key_file and certificate_file"
            ) from error
        try:
            version = await self._find_server()
            dialect = await self._find_model()
        except CallFailedError as error:
            await self._disconnect()
            raise EngineStartError(f"{self._where()} failed while it was asked about its models: {error}") from error
        except BaseException:
            await self._disconnect()
            raise
        self._down = None
        return EngineInfo(
            engine="triton",
            engine_version=version,
            model=config.model_name,
            max_context=self._session_len,
            capacity=config.capacity,
            device=f"triton {dialect} at {config.address}",
        )

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate one request. See `engines.base.Engine.generate`.

        Raises:
            InvalidRequestError: the request is wrong, or its model cannot honour a parameter; the text names it.
            ContextLengthError: the prompt leaves no room for a token.
            UpstreamError: the server is down, or failed.
            ProtocolError: the server's answer makes no sense.
            RequestTimeoutError: the server was silent for `idle_timeout_s`: after the first token of this request, or
                towards all requests of this engine.
            AuthenticationError: the server does not let this client in.
            EngineError: the engine has not started, or was closed.
        """
        self._check_up()
        _check(request)
        told = request.generated.num_tokens if request.generated else 0

        def count(delta: Delta) -> None:
            nonlocal told
            self._num_tokens += delta.num_tokens - told
            told = delta.num_tokens
            emit(delta)

        self._num_running += 1
        self._idle.clear()
        try:
            if self._turbomind is not None:
                await self._turbomind.generate(request, count)
            else:
                await self._generate_text(request, count)
        except CallFailedError as error:
            if _WRONG_TENSORS.search(error.details):
                await self._look_again()
            raise self._mapped(error) from None
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def tokenize(self, request: Request) -> tuple[int, ...]:
        """Raise InvalidRequestError."""
        _check(request)
        raise InvalidRequestError("a Triton server cannot count tokens; ask another engine")

    async def check_health(self) -> None:
        """Return when the server is live and the model ready.

        A server that is down is no reason to replace this engine's actor.

        Raises:
            UpstreamError: it is not.
            EngineError: the engine has not started, or was closed.
        """
        self._check_up()
        models = self._turbomind.models if self._turbomind is not None else (self._model,)
        try:
            if not await self._is_live():
                raise UpstreamError(f"{self._where()} says that it is not live; look at its log")
            for model in models:
                if model is not None and not await self._is_ready(model.name):
                    raise UpstreamError(f"{self._where()} has not loaded the model {model.name!r}; load it")
        except CallFailedError as error:
            raise UpstreamError(str(self._mapped(error))) from None

    def statistics(self) -> EngineStatistics:
        """Return the load that this engine puts on the server."""
        return EngineStatistics(num_running=self._num_running, num_tokens=self._num_tokens)

    async def close(self) -> None:
        """End the connection, and the conversations that the server keeps. What is running fails with EngineError."""
        if self._turbomind is not None and self._down is None:
            await self._turbomind.close()
        self._down = EngineError("the engine was closed; start another one")
        await self._disconnect()
        await self._idle.wait()
        # gRPC has a task for each call, which ends a moment after the call was closed.
        rest = [task for task in asyncio.all_tasks() if "_AioCall." in repr(task)]
        if rest:
            await asyncio.wait(rest, timeout=_CLOSE_S)

    # Start

    async def _find_server(self) -> str:
        """Wait until the server answers; return its version."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._config.start_timeout_s
        while True:
            try:
                if await self._is_live():
                    metadata = await self._ask(
                        self._connected().stub.ServerMetadata, service_pb2.ServerMetadataRequest()
                    )
                    return str(metadata.version)
                reason = "it is not live"
            except CallFailedError as error:
                if _TLS.search(error.details):
                    raise EngineStartError(
                        f"{self._where()} and this client do not agree on TLS: {error}. Look at ssl, ca_file, key_file "
                        "and certificate_file; the server's certificate must be for the host in the address"
                    ) from error
                reason = str(error)
            if loop.time() > give_up_at:
                raise EngineStartError(
                    f"{self._where()} did not answer in {self._config.start_timeout_s:g} s: {reason}. Start it, look "
                    "at the address (the port is that of gRPC), and set ssl if the server wants TLS"
                )
            await asyncio.sleep(_RETRY_S)

    async def _find_model(self) -> str:
        """Find out what the model is; return the name of its dialect.

        Raises:
            EngineStartError: it is not there, or not known.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._config.start_timeout_s
        name = self._config.model_name
        while not await self._is_ready(name):
            listed = await self._ask(self._connected().stub.RepositoryIndex, service_pb2.RepositoryIndexRequest())
            index = {entry.name: entry for entry in listed.models}
            # LMDeploy's repositories have one name for all models, and say in the configuration which one it is.
            if "turbomind" in index and await self._is_ready("turbomind"):
                turbomind = await self._describe("turbomind")
                if turbomind.parameters.get("model_name") == name:
                    return await self._use_turbomind(turbomind)
            if name not in index or index[name].state != "LOADING" or loop.time() > give_up_at:
                have = ", ".join(f"{each.name} ({_state(each)})" for each in index.values())
                raise EngineStartError(
                    f"{self._where()} has not loaded the model {name!r}; it has {have or 'no model'}. Load it, or set "
                    "model_name"
                )
            await asyncio.sleep(_RETRY_S)
        model = await self._describe(name)
        if model.inputs.keys() >= TURBOMIND:
            return await self._use_turbomind(model)
        self._model, self._dialect, self._turbomind = model, dialect_of(model), None
        if self._dialect is None:
            raise EngineStartError(
                f"the model {name!r} on {self._where()} is none that raylm can talk to: {describe([model])}. Known are "
                "those of vLLM, of TensorRT-LLM (ensemble, BLS, LLM API) and of LMDeploy up to 0.5.1 (turbomind)"
            )
        return self._dialect.name

    async def _look_again(self) -> None:
        """Find out what the model takes now, for the next requests. Where that fails, one of those tries again."""
        if self._dialect is None:
            return  # nothing else has TurboMind's tensors
        with suppress(CallFailedError):
            model = await self._describe(self._config.model_name)
            if (dialect := dialect_of(model)) is not None:
                self._model, self._dialect = model, dialect

    async def _use_turbomind(self, model: Model) -> str:
        helpers = []
        for name, tensors in (("preprocessing", {"QUERY", "INPUT_ID"}), ("postprocessing", {"TOKENS_BATCH", "OUTPUT"})):
            if not await self._is_ready(name):
                raise EngineStartError(f"{self._where()} has turbomind without {name}; load that model too")
            helpers.append(await self._describe(name))
            if not tensors <= helpers[-1].inputs.keys() | helpers[-1].outputs:
                raise EngineStartError(
                    f"the model {name!r} on {self._where()} is not LMDeploy's: {describe(helpers[-1:])}. Use the "
                    "repository that LMDeploy up to 0.5.1 writes"
                )
        own = model.parameters.get("session_len", "")
        self._session_len = min(self._config.session_len, int(own) if own.isdecimal() else self._config.session_len)
        self._turbomind = TurboMind(self, helpers[0], model, helpers[1], self._session_len)
        await self._turbomind.start()
        return "TurboMind"

    async def _describe(self, name: str) -> Model:
        config = (await self._ask(self._connected().stub.ModelConfig, service_pb2.ModelConfigRequest(name=name))).config
        return Model(
            name=name,
            inputs={each.name: (_datatype(each.data_type), tuple(each.dims)) for each in config.input},
            outputs=frozenset(each.name for each in config.output),
            batched=config.max_batch_size > 0,
            decoupled=await self._is_decoupled(config),
            parameters={key: value.string_value for key, value in config.parameters.items()},
        )

    async def _is_decoupled(self, config: Any) -> bool:
        """Return whether a model streams: an ensemble does if a part of it does, which it need not say itself."""
        if config.model_transaction_policy.decoupled or config.platform != "ensemble":
            return bool(config.model_transaction_policy.decoupled)
        parts = [(await self._describe(step.model_name)).decoupled for step in config.ensemble_scheduling.step]
        return any(parts)

    # Text

    async def _generate_text(self, request: Request, emit: Emit) -> None:
        model, dialect, config = self._model, self._dialect, request.config
        if model is None or dialect is None:
            raise AssertionError("unreachable: the engine has started")
        prompt, generated = request.prompt or "", request.generated
        num_words = len(prompt.split())  # each of them is a token at least
        if num_words >= self._session_len:
            raise ContextLengthError(
                f"the prompt has {num_words} words, and so more tokens than fit: session_len is {self._session_len}, "
                "answer included; shorten the prompt"
            )
        num_before = generated.num_tokens if generated else 0
        left = min(config.max_new_tokens, self._session_len) - num_before
        sent = prompt + generated.text if generated else prompt
        values = dialect.tensors(model, sent, config.after(num_before, left=max(0, left)), max(1, left))
        output = TextOutput(
            request,
            emit,
            echo="" if dialect.exclude in model.inputs else sent,
            cumulative=dialect.repeats(model),
            streamed=model.decoupled,
            max_context=self._session_len,
            gives_reason="return_finish_reason" in values and "finish_reason" in model.outputs,
        )
        if left <= 0:
            await self._end_full(request, emit, model, values)
        elif model.decoupled:
            await self.stream(model, values, output.take)
            output.end()
        else:
            output.take(await self.infer(model, values), True)

    async def _end_full(self, request: Request, emit: Emit, model: Model, values: Values) -> None:
        """Emit the last delta of a request that earlier attempts have generated in full.

        The server is asked for one more token, which is thrown away, if it alone knows how long the prompt is.
        """
        if request.generated is None:
            raise AssertionError("unreachable: nothing was generated")
        num_tokens = request.generated.num_tokens
        prompt_tokens = estimate_tokens(request.prompt or "")
        if "num_input_tokens" in model.outputs and model.decoupled:
            probe = TextOutput(request, lambda _: None, "", False, True, self._session_len)
            await self.stream(model, values, lambda outputs, _: probe.count_prompt(outputs))
            prompt_tokens = probe.prompt_tokens
        emit(Delta("", num_tokens, finish_reason="length", usage=Usage(prompt_tokens, num_tokens)))

    # Calls

    # The errors below are raised outside `except`: the context of one that was raised inside would be a foreign error,
    # whose traceback keeps the connection, its sockets and gRPC's thread alive for as long as somebody keeps the error.

    async def _is_live(self) -> bool:
        return bool((await self._ask(self._connected().stub.ServerLive, service_pb2.ServerLiveRequest())).live)

    async def _is_ready(self, model: str) -> bool:
        request = service_pb2.ModelReadyRequest(name=model)
        return bool((await self._ask(self._connected().stub.ModelReady, request)).ready)

    async def _ask(self, method: Any, request: Any) -> Any:
        """Call the server for anything but inference."""
        try:
            return await method(request, timeout=_CALL_TIMEOUT_S)
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            failure = self._failed(error)
        raise failure

    async def infer(self, model: Model, values: Values) -> Outputs:
        """Return the one response of a model that is not decoupled."""
        cancelling = _cancelling()
        request = _pack(model, values)
        try:
            response = await self._connected().stub.ModelInfer(request, timeout=self._config.idle_timeout_s)
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            failure = self._failed(error)
        except asyncio.CancelledError:
            if _cancelling() > cancelling:
                raise
            failure = self._lost()
        else:
            return _outputs(response)
        raise failure

    async def stream(self, model: Model, values: Values, take: Take) -> None:
        """Hand the responses to a request to `take`, and return when the server has ended the call.

        Once `take` is done, or the server has sent an error, the rest of the call is read and thrown away: a call that
        is cancelled just as its request ends leaves the request stuck in the server (Triton 2.51).
        """
        failure: Exception | None = None
        done = False
        names: list[str] = []
        cancelling = _cancelling()
        call = self._connected().stream(_pack(model, values))
        watch = Watch(call.cancel, self._config.idle_timeout_s, lambda: self._heard_at)
        time = asyncio.get_running_loop().time
        try:
            async for answer in call:
                watch.heard_at = self._heard_at = time()
                watch.begun = True
                if done:
                    continue
                if answer.error_message:
                    failure = CallFailedError(None, answer.error_message)
                    done = True
                else:
                    response = answer.infer_response
                    contents = response.raw_output_contents
                    if len(contents) != len(names):  # otherwise they are those of the response before
                        names = [tensor.name for tensor in response.outputs]
                    if contents:
                        final = response.parameters["triton_final_response"].bool_param
                        done = take(dict(zip(names, contents, strict=False)), final)
                if done:
                    watch.end_in(_DRAIN_S)
        except asyncio.CancelledError:
            # gRPC raises it too, for a call that has died and for one that was closed.
            if _cancelling() > cancelling:
                raise
            if not done:
                failure = self._silent() if watch.expired else self._lost()
        except (grpc.RpcError, grpc.aio.BaseError) as rpc_error:
            if not done:
                failure = self._failed(rpc_error)
        finally:
            watch.stop()
            call.cancel()
            # gRPC keeps a closed channel's connection open while anything holds a call, and an error holds this frame.
            del call, watch
        if failure is not None:
            raise failure

    def _connected(self) -> _Connection:
        if self._connection is None:
            self._check_up()
            raise AssertionError("unreachable: an engine that is up has a connection")
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    # Errors

    def _check_up(self) -> None:
        if self._down is not None:
            raise EngineError(self._down.message)  # a copy: one that several tasks raise would collect their tracebacks

    def _failed(self, error: Exception) -> Exception:
        """Return what is in an error of gRPC, which has one of its own for each way to call."""
        if self._down is not None and self._connection is None:
            return EngineError(self._down.message)
        if isinstance(error, grpc.aio.AioRpcError):
            return CallFailedError(error.code().name, error.details() or "")
        return CallFailedError("UNKNOWN", str(error) or type(error).__name__)

    def _lost(self) -> Exception:
        """Return the error for a call that ended without a word."""
        if self._down is not None:
            return EngineError(self._down.message)
        return CallFailedError("UNAVAILABLE", "the call was lost")

    def _silent(self) -> RequestTimeoutError:
        return RequestTimeoutError(
            f"{self._where()} sent nothing for {self._config.idle_timeout_s:g} s; look at its log, or raise "
            "idle_timeout_s"
        )

    def _where(self) -> str:
        return f"the Triton server at {self._config.address}"

    def _mapped(self, error: CallFailedError) -> RaylmError:
        """Return the error for what a server or gRPC said. The one place where foreign errors become raylm's."""
        text = f"{self._where()}: {error.details}"
        code = failure_code(error)
        if code == TOO_LONG or _TOO_LONG.search(error.details):
            return ContextLengthError(f"{text}; shorten the prompt (session_len is {self._session_len})")
        if code in {BUSY, CONFLICT}:
            return SessionBusyError(text)
        if _WRONG_TENSORS.search(error.details):  # they are of this engine's making
            return ProtocolError(
                f"{text}. The model has changed since this engine looked at it; send the request again"
            )
        if error.status is None:
            return UpstreamError(text)
        if error.status == "UNAVAILABLE" and _TLS.search(error.details):
            text += ". Client and server do not agree on TLS: look at ssl, ca_file, key_file and certificate_file"
        elif error.status == "DEADLINE_EXCEEDED":
            text += "; look at its log, or raise idle_timeout_s"
        return STATUSES.get(error.status, ProtocolError)(text)


def _pack(model: Model, values: Values) -> Any:
    """Return a request whose tensors have the type and shape that a model declares."""
    request = service_pb2.ModelInferRequest(model_name=model.name)
    for name, value in values.items():
        datatype, dims = model.inputs[name]
        array = np.array(value, dtype=triton_to_np_dtype(datatype))
        shape = (1,) * (len(dims) + model.batched - array.ndim) + array.shape
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        content = b"".join(map(_with_length, value)) if datatype == "BYTES" else array.tobytes()
        request.raw_input_contents.append(content)
    return request


def _with_length(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little") + text


def _outputs(response: Any) -> Outputs:
    contents = response.raw_output_contents
    return {tensor.name: content for tensor, content in zip(response.outputs, contents, strict=False)}


def _cancelling() -> int:
    """Return how often this task was asked to end."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def _datatype(number: int) -> str:
    """Return Triton's name of a data type in a model configuration."""
    name = model_config_pb2.DataType.Name(number).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name


def _state(entry: Any) -> str:
    return ": ".join(filter(None, [entry.state.lower() or "not loaded", entry.reason]))


def _check(request: Request) -> None:
    """Raise InvalidRequestError for what no model on a Triton server takes, or not in the same way as the others."""
    if request.prompt_token_ids is not None:
        raise InvalidRequestError("prompt_token_ids: raylm sends text to a Triton server; send a prompt")
    for parameter in ("echo", "json_schema"):
        if getattr(request.config, parameter):
            raise InvalidRequestError(f"{parameter}: models on a Triton server cannot do that; leave it out")
    if request.messages is not None:
        raise InvalidRequestError(
            "messages: a Triton server applies no chat template; give a meta_template, which turns them into a prompt"
        )
    if not request.prompt:
        raise InvalidRequestError("the prompt is empty; send some text")
    try:
        request.prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the prompt is no valid Unicode: {error}; repair it") from None
