"""The child process of the lmdeploy engine: lmdeploy's `AsyncEngine` on an event loop that it has for itself.

lmdeploy runs parts of its decode step on the loop of whoever calls it, cannot be closed inside a Ray actor, and cannot
be stopped while it starts; in a process of its own none of that matters to anybody. The process is the one that
lmdeploy would otherwise start by itself (`enable_mp_engine`), with an owner that knows when to end it.

A forward pass may hold up the loop, on CPU for as long as it takes. Commands are therefore read in a thread, and pings
answered there.

What `child.py` says about the conversation with the parent holds here. Tokens become text in the parent.

With the PyTorch backend and `tp` > 1 lmdeploy runs its ranks as Ray actors. For that alone this process joins the Ray
cluster, as a driver whose actors end with it, and gives lmdeploy the placement group of the actor that started it.

The only importer of lmdeploy, with `lmdeploy_cpu`. It is imported late, so that the parent can import `Load`. What is
wrong with lmdeploy's answers is put right here, for an api_server too (`mend_server`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from raylm.engines.child import (
    Add,
    Cancel,
    Command,
    Extra,
    Failure,
    Frames,
    Output,
    Ping,
    Pong,
    Ranked,
    Ready,
    Report,
    Step,
    Tokenize,
    Tokens,
    first_body,
    pack,
    start_child,
)
from raylm.errors import (
    ActorLostError,
    ContextLengthError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    RaylmError,
    to_message,
)
from raylm.messages import FinishReason, GenerationConfig, Message, Request

PLACEMENT_GROUP_VARIABLE = "RAYLM_PLACEMENT_GROUP"
"""Environment variable: id of the placement group of the actor that this process belongs to, in hexadecimal."""

ERRORS: Mapping[str, type[RaylmError]] = {
    "invalid_request": InvalidRequestError,
    "unauthorized": EngineError,
    "model_not_found": EngineError,
    "request_conflict": EngineError,
    "context_length_exceeded": ContextLengthError,
    "unsupported_feature": InvalidRequestError,
    "preprocess_failed": InvalidRequestError,
    "request_cancelled": EngineError,
    "engine_unavailable": ActorLostError,
    "internal_error": EngineError,
}
"""What each code of an lmdeploy `RequestError` is here. Source: lmdeploy 0.18.0, `serve.core.exceptions.ErrorCode`."""

_WATCH_S = 1.0
_STALL_S = 120.0
"""An engine with work whose scheduler has not moved for this long hangs. A forward pass is much shorter."""

_MAX_TEMPERATURE = 2.0  # Source: lmdeploy 0.18.0, GenerationConfig.__post_init__

_OWN_OPTIONS = frozenset(
    {"device_type", "enable_mp_engine", "mp_engine_backend", "distributed_executor_backend", "logprobs_mode"}
)
"""Options of lmdeploy's engine config that follow from where and how the engine runs."""

_SAMPLE = "Hello, w\u00f6rld! \u4f60\u597d \U0001f600\n\tdef f(x):  return 'x' # 12345"
"""Text that tells whether this module spells a model's tokens as its tokenizer does."""

_log = logging.getLogger(__name__)


class Load(msgspec.Struct, tag=True):
    """The first command: build an engine. Answered by `Ready` or `Failure`.

    Attributes:
        path: Model folder, or the GGUF file of a built-in model.
        backend: `turbomind` or `pytorch`.
        device: `cuda`, `ascend` or `cpu`.
        engine_config: Arguments of lmdeploy's engine config that raylm has a setting for, None for its default.
        options: Any others, as the user gave them.
    """

    path: str
    backend: str
    device: str
    engine_config: dict[str, Any]
    options: dict[str, Any]


_decode_load: msgspec.msgpack.Decoder[Load] = msgspec.msgpack.Decoder(Load)
_decode_command: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def build_engine(load: Load) -> Any:
    """Return lmdeploy's `AsyncEngine`, loaded.

    Raises:
        InvalidRequestError: an option that lmdeploy does not have, or a value that it does not take.
        EngineStartError: lmdeploy is not installed, or cannot load the model.
    """
    if load.device == "cpu":
        # Threads that spin while they wait bring a machine with other work to its knees. Read as torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import lmdeploy
        from lmdeploy.serve.core import AsyncEngine
    except ImportError as error:
        raise EngineStartError(
            f"cannot import lmdeploy ({error}); install it with: pip install 'raylm[lmdeploy]'"
        ) from error
    errors = _Errors()
    logger = logging.getLogger("lmdeploy")
    logger.setLevel(logging.WARNING)  # it would tell of every request
    logger.addHandler(errors)
    path = Path(load.path)
    if load.device == "cpu":
        from raylm.engines import lmdeploy_cpu

        try:
            lmdeploy_cpu.install()
        except RuntimeError as error:
            raise EngineStartError(str(error)) from error
    if path.is_file():
        from raylm.engines.gguf import to_folder

        path = to_folder(path)
    kind = lmdeploy.TurbomindEngineConfig if load.backend == "turbomind" else lmdeploy.PytorchEngineConfig
    config = _engine_config(kind, load)
    if load.backend == "pytorch":
        _score_apart()
        if config.tp > 1:
            _join_cluster()
    try:
        if load.backend == "turbomind":
            _check_turbomind(path)
        return AsyncEngine(str(path), backend=load.backend, backend_config=config)
    except EngineStartError:
        raise
    # lmdeploy raises whatever its libraries do, and where a check of its own fails it logs the reason and exits.
    except (Exception, SystemExit) as error:
        _log.exception("lmdeploy did not start")
        why = errors.last if isinstance(error, SystemExit) else _describe(error)
        raise EngineStartError(
            f"lmdeploy cannot load {path} with its {load.backend} engine on {load.device}: {why}. Check that the "
            "folder is a complete model that this engine supports, and that there is memory for it: lower "
            "cache_max_entry_count, session_len or max_batch_size, or raise tp"
        ) from error
    finally:
        logger.removeHandler(errors)


def _check_turbomind(path: Path) -> None:
    """Raise EngineStartError where lmdeploy's own pipeline would take its PyTorch engine in place of TurboMind.

    That needs a placement of another kind, so it is not done here.
    """
    from lmdeploy.archs import autoget_backend

    if autoget_backend(str(path)) != "turbomind":
        raise EngineStartError(
            f"lmdeploy's turbomind engine does not know the model in {path}, or does not run on this machine; set "
            'backend="pytorch"'
        )


class _Errors(logging.Handler):
    """Remembers the last error that was logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = "no reason given"

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        self.last = " ".join(record.getMessage().split()).rstrip(".")


def _engine_config(kind: Any, load: Load) -> Any:
    """Return lmdeploy's engine config of class `kind`."""
    known = {field.name for field in dataclasses.fields(kind)}
    for name in load.options:
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "nothing near it"
            raise InvalidRequestError(f"options: lmdeploy's {kind.__name__} has no {name!r}; it has {near}")
        if name in _OWN_OPTIONS or name in load.engine_config:
            raise InvalidRequestError(f"options: {name!r} follows from raylm's own settings; change those")
    arguments = {name: value for name, value in load.engine_config.items() if value is not None}
    if load.backend == "pytorch":
        arguments["device_type"] = load.device
        arguments["logprobs_mode"] = "raw_logprobs"
    try:
        return kind(**arguments, **load.options)
    except (AssertionError, TypeError, ValueError) as error:  # pydantic's error is a ValueError
        raise InvalidRequestError(
            f"lmdeploy's {kind.__name__} refuses its settings: {_describe(error)}; change the one that it names, or "
            f"else one of these: {', '.join([*arguments, *load.options])}"
        ) from error


def _describe(error: Exception) -> str:
    """Return an exception in one line. Assertions often have no text; then the line that failed says more."""
    text = " ".join(str(error).split())
    if not text and error.__traceback__ is not None:
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{type(error).__name__}: {text}".rstrip(": .")


def _join_cluster() -> None:
    """Let lmdeploy's Ray executor find this process's cluster, and the placement group that its ranks go to.

    Raises:
        EngineStartError: this process does not belong to an actor in a placement group.
    """
    group_id = os.environ.get(PLACEMENT_GROUP_VARIABLE)
    if group_id is None:
        raise EngineStartError(
            "lmdeploy's PyTorch engine with tp > 1 runs in an actor of a raylm pool, which places its ranks; use one, "
            "or the turbomind backend"
        )
    import ray
    import ray.util
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
    group = PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))
    # A driver is in no group of its own; lmdeploy would then make one, and wait half an hour for the GPUs that this
    # actor's group holds. Source: lmdeploy 0.18.0, `pytorch.ray.init_ray_cluster`.
    ray.util.get_current_placement_group = lambda: group
    # lmdeploy takes the host of Ray's head for rank 0's, which is on this one.
    os.environ.setdefault("LMDEPLOY_DIST_MASTER_ADDR", ray.util.get_node_ip_address())


def spell_tokens(tokenizer: Any) -> dict[int, bytes]:
    """Return the tokens by id as `text.Vocabulary` takes them, without special tokens.

    Args:
        tokenizer: A tokenizer of transformers.

    Raises:
        EngineStartError: it writes its tokens in none of the ways known here.
    """
    special = set(tokenizer.all_special_ids)
    added = {token_id: token for token_id, token in tokenizer.added_tokens_decoder.items() if token_id not in special}
    byte_level = _is_byte_level(tokenizer)
    tokens: dict[int, bytes] = {}
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in special or getattr(tokenizer.added_tokens_decoder.get(token_id), "special", False):
            continue
        if isinstance(token, bytes):
            tokens[token_id] = token
        elif byte_level and token_id not in added:
            with contextlib.suppress(KeyError):  # a token that no text can give
                tokens[token_id] = bytes(_BYTE_OF[character] for character in token)
        else:
            tokens[token_id] = token.encode()
    return tokens


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        # Tokenizers in plain Python that are byte-level have this table, as GPT-2's had.
        return hasattr(tokenizer, "byte_decoder")
    decoder = json.loads(backend.decoder.__getstate__())
    return "ByteLevel" in {part["type"] for part in [decoder, *decoder.get("decoders", ())]}


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for. Source: GPT-2, `bytes_to_unicode`."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


def check_spelling(tokenizer: Any, tokens: dict[int, bytes]) -> None:
    """Raise EngineStartError unless `tokens` spell a sample text as the tokenizer does."""
    from raylm.engines.text import Detokenizer, Vocabulary

    token_ids = tokenizer.encode(_SAMPLE, add_special_tokens=False)
    expected = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    found = Detokenizer(Vocabulary(tokens)).feed(token_ids)
    if found.strip() != expected.strip():
        raise EngineStartError(
            f"this model's tokenizer ({type(tokenizer).__name__}) writes its tokens in a way that raylm cannot read: "
            f"{expected!r} became {found!r}. Run the model behind lmdeploy's api_server"
        )


class _Running:
    """One request inside this process.

    Attributes:
        task: Works on it.
        session: lmdeploy's handle on it, from the moment that lmdeploy knows it.
        cancelled: Its client has left.
    """

    __slots__ = ("cancelled", "session", "task")

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.session: Any = None
        self.cancelled = False


class Worker:
    """Drives one engine.

    Args:
        engine: lmdeploy's `AsyncEngine`.
        reports: Where frames go.
    """

    def __init__(self, engine: Any, reports: BinaryIO) -> None:
        import lmdeploy
        from lmdeploy.serve.core.exceptions import RequestError

        self._generation_config = lmdeploy.GenerationConfig
        self._request_error = RequestError
        self._version: str = lmdeploy.__version__
        self._engine = engine
        self._reports = reports
        self._turbomind = engine.backend == "turbomind"
        self._capacity: int = engine.backend_config.max_batch_size
        # The KV cache may hold less than one sequence of the length that was asked for. lmdeploy then ends answers
        # early with only a warning. Source: lmdeploy 0.18.0, `pytorch.engine.Engine._add_message`.
        self._max_context: int = engine.session_len
        if not self._turbomind:
            self._max_context = min(self._max_context, engine.engine.max_session_len)
        # Source: lmdeploy 0.18.0, `pytorch.strategies.ar.ARStrategyFactory.build_sampling_strategy`.
        self._padding_id: int = getattr(engine.hf_cfg, "bos_token_id", None) or 0
        vocabulary: dict[str, int] = engine.tokenizer.get_vocab()
        self._num_embeddings = max(vocabulary.values()) + 1
        self._tokens = spell_tokens(engine.tokenizer.model.model)
        self._special = {token: token_id for token, token_id in vocabulary.items() if token_id not in self._tokens}
        # Source: lmdeploy 0.18.0, `serve.core.async_engine.AsyncEngine._determine_gen_config`.
        config = self._generation_config(stop_token_ids=engine.stop_words)
        config.update_from_hf_gen_cfg(engine.hf_gen_cfg, engine.tokenizer.eos_token_id)
        self._eos_ids = frozenset(config.stop_token_ids)
        # lmdeploy would make requests wait where they cannot be cancelled: for a request handle.
        self._slots = asyncio.Semaphore(self._capacity)
        self._running: dict[int, _Running] = {}
        self._outputs: list[Output] = []
        self._healthy_at = time.monotonic()
        self._sending = threading.Lock()
        # The parent makes the text. lmdeploy's would cost this loop more than the rest of a token's way.
        engine.tokenizer.detokenize_incrementally = _no_text

    async def serve(self, descriptor: int) -> None:
        """Obey the commands that come in on a file descriptor. The process ends when it is closed."""
        check_spelling(self._engine.tokenizer.model.model, self._tokens)
        loop = asyncio.get_running_loop()
        self._engine.start_loop(loop, use_async_api=True)
        self._send(Ready(self._version, self._tokens, self._max_context, self._capacity))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_or_end(self._watch()))
            threading.Thread(target=self._listen, args=(descriptor, loop, tasks), daemon=True).start()

    def _listen(self, descriptor: int, loop: asyncio.AbstractEventLoop, tasks: asyncio.TaskGroup) -> None:
        """Read commands, in a thread: pings are answered in the middle of a forward pass that holds up the loop."""
        frames = Frames()
        while chunk := os.read(descriptor, 1 << 20):
            for body in frames.feed(chunk):
                command = _decode_command.decode(body)
                if not isinstance(command, Ping):
                    loop.call_soon_threadsafe(self._obey, command, tasks)
                elif time.monotonic() - self._healthy_at < _STALL_S:
                    self._send(Pong(command.key))  # else there is no answer, which says it as well
        os._exit(0)  # the parent is gone: nobody is there to wait for an orderly end

    def _obey(self, command: Add | Cancel | Tokenize, tasks: asyncio.TaskGroup) -> None:
        match command:
            case Add(key, request):
                self._running[key] = _Running(tasks.create_task(_or_end(self._work(key, request))))
            case Tokenize(key, request):
                self._send(self._tokenize(key, request))
            case Cancel(key):
                if (running := self._running.get(key)) is not None and not running.cancelled:
                    running.cancelled = True
                    # Behind the first step of its task: one that is cancelled before that says nothing.
                    asyncio.get_running_loop().call_soon(self._abort, running, tasks)

    def _abort(self, running: _Running, tasks: asyncio.TaskGroup) -> None:
        if running.session is None:
            running.task.cancel()
        else:
            # Not by cancelling the task: lmdeploy then loses some of the cancellations.
            tasks.create_task(_or_end(running.session.async_abort()))

    async def _work(self, key: int, request: Request) -> None:
        """Do all that there is to a request. Its last output ends it, whatever happened."""
        last = Output(key, 0)
        try:
            await self._generate(key, request, last)
        except RaylmError as error:
            last.error = to_message(error)
        except asyncio.CancelledError:
            last.finish_reason = "cancelled"
        except self._request_error as error:
            await self._probe()
            last.error = to_message(ERRORS[error.code.value](f"lmdeploy: {error.message}"))
        except Exception as error:  # noqa: BLE001 - one request's, and the others go on
            _log.exception("request %s failed", request.request_id)
            await self._probe()
            last.error = to_message(EngineError(f"lmdeploy failed on this request: {_describe(error)}; send it again"))
        finally:
            del self._running[key]
        self._put(last)

    async def _generate(self, key: int, request: Request, last: Output) -> None:
        """Generate, and fill in the last output."""
        prompt_ids = self._prompt_ids(request)
        num_prompt = last.prompt_tokens = len(prompt_ids)
        if not num_prompt:
            raise InvalidRequestError("the prompt is empty: it has no tokens; send some text")
        if num_prompt >= self._max_context:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens and the context holds {self._max_context}, answer included; "
                "shorten the prompt"
            )
        config, generated, earlier_ids, num_earlier = request.config, request.generated, [], 0
        if generated is not None:
            num_earlier = generated.num_tokens
            earlier_ids = generated.token_ids or self._encode(generated.text, begin=False)
            if max(earlier_ids, default=0) >= self._num_embeddings:
                # An id that the model does not have ends lmdeploy's engine for good.
                raise InvalidRequestError("`generated` has token ids that this model does not have; leave them out")
        input_ids = prompt_ids + earlier_ids
        room = min(config.max_new_tokens - num_earlier, self._max_context - len(input_ids))
        sampling = self._sampling(config, input_ids, earlier_ids, num_earlier, room)
        if config.echo and generated is None:
            last.extra = Extra(prompt_token_ids=tuple(prompt_ids))
        if room < 1 and not (last.extra and config.logprobs):
            last.finish_reason, last.cached_tokens = "length", 0
            return
        async with self._slots:
            if last.extra is not None:
                if config.logprobs:
                    last.extra = await self._score(key, prompt_ids, config)
                if room < 1:
                    last.finish_reason = "length"
                    return
                self._put(Output(key, num_prompt, extra=last.extra))
                last.extra = None
            session = self._engine.session_mgr.get()
            prepared = await self._engine.preprocess(None, session, gen_config=sampling, input_ids=input_ids)
            running = self._running[key]
            running.session = session
            num_tokens = 0
            reason = None
            async for out in self._engine.generate(prepared):
                num_tokens += len(out.token_ids or ())
                last.cached_tokens = min(out.cached_tokens, num_prompt)
                reason = out.finish_reason
                logprobs = _logprobs(out) if config.logprobs else ()
                extra = Extra(_top_logprobs(out, config.top_logprobs)) if config.top_logprobs else None
                if reason is not None:
                    last.token_ids, last.logprobs, last.extra = tuple(out.token_ids or ()), logprobs, extra
                elif out.token_ids:
                    self._put(Output(key, num_prompt, tuple(out.token_ids), logprobs, extra=extra))
        if running.cancelled:
            last.finish_reason = "cancelled"
            last.token_ids = last.logprobs = ()
            last.extra = None
        else:
            last.finish_reason = _finish_reason(reason, num_tokens, room)
            last.num_silent = int(reason == "stop")

    async def _score(self, key: int, prompt_ids: list[int], config: GenerationConfig) -> Extra:
        """Return what is told of the prompt where `echo` asks for its log-probabilities."""
        if self._turbomind:
            raise InvalidRequestError(
                "echo: lmdeploy's turbomind engine tells no log-probabilities of the prompt; leave logprobs out, or "
                "use the pytorch backend"
            )
        if len(prompt_ids) == 1:  # lmdeploy does not like to be asked for nothing
            return Extra((), tuple(prompt_ids), (0.0,), ((),) if config.top_logprobs else ())
        session = self._engine.session_mgr.get()
        scoring = self._generation_config(max_new_tokens=0, logprobs=config.top_logprobs, logprob_start_len=0)
        prepared = await self._engine.preprocess(None, session, gen_config=scoring, input_ids=prompt_ids)
        self._running[key].session = session
        rows: list[dict[int, float]] = []
        async for out in self._engine.generate(prepared):
            rows = out.logprobs or rows
        self._running[key].session = None
        if self._running[key].cancelled:  # whether or not lmdeploy was done by then
            raise asyncio.CancelledError
        if len(rows) != len(prompt_ids) - 1:
            raise EngineError(f"lmdeploy told {len(rows)} log-probabilities of {len(prompt_ids)} tokens; send it again")
        logprobs = _of_tokens(prompt_ids[1:], rows)
        ranked = tuple(_rank(row, config.top_logprobs) for row in rows)
        return Extra((), tuple(prompt_ids), (0.0, *logprobs), ((), *ranked) if config.top_logprobs else ())

    def _tokenize(self, key: int, request: Request) -> Tokens:
        try:
            return Tokens(key, tuple(self._prompt_ids(request)))
        except RaylmError as error:
            return Tokens(key, error=to_message(error))
        except Exception as error:  # noqa: BLE001 - one request's, and the others go on
            _log.exception("the tokens of request %s could not be counted", request.request_id)
            return Tokens(key, error=to_message(EngineError(f"lmdeploy failed on this request: {_describe(error)}")))

    def _prompt_ids(self, request: Request) -> list[int]:
        if request.messages is not None:
            return self._encode(self._apply_chat_template(request.messages), begin=True)
        if request.prompt_token_ids is None:
            return self._encode(request.prompt or "", begin=True)
        for token_id in request.prompt_token_ids:
            # An id that the model does not have ends lmdeploy's engine for good.
            if not 0 <= token_id < self._num_embeddings:
                raise InvalidRequestError(
                    f"prompt_token_ids: {token_id} is no token of this model, which has {self._num_embeddings}"
                )
        return list(request.prompt_token_ids)

    def _encode(self, text: str, *, begin: bool) -> list[int]:
        """Return the tokens of `text`; with `begin`, as those of a whole prompt."""
        # Where a chat template has already written the token that begins a prompt, lmdeploy does not add another.
        ids: list[int] = self._engine.tokenizer.encode(text, add_bos=begin, add_special_tokens=begin)
        return ids

    def _apply_chat_template(self, messages: tuple[Message, ...]) -> str:
        import jinja2

        history = [{"role": message.role, "content": message.content} for message in messages]
        try:
            prompt = self._engine.chat_template.messages2prompt(history)
        # A template raises what its own `raise_exception` does, or trips over what it did not expect.
        except (jinja2.TemplateError, AssertionError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {_describe(error)}; change them, or set a "
                "meta_template"
            ) from error
        if prompt is None:
            raise InvalidRequestError("this model has no chat template; set a meta_template, or send a prompt")
        return str(prompt)

    def _sampling(
        self, config: GenerationConfig, input_ids: list[int], earlier_ids: list[int], num_earlier: int, room: int
    ) -> Any:
        """Return lmdeploy's form of `config` for a request that may generate `room` more tokens.

        Args:
            config: What the user asked for.
            input_ids: All tokens that it begins with: the prompt's, then `earlier_ids`.
            earlier_ids: Tokens that earlier attempts generated, as far as they are known.
            num_earlier: How many those were.
            room: Limit on new tokens.
        """
        config = config.after(num_earlier, left=room)
        if config.temperature > _MAX_TEMPERATURE:
            raise InvalidRequestError(
                f"temperature: lmdeploy takes at most {_MAX_TEMPERATURE:g}, got {config.temperature:g}"
            )
        penalty = config.repetition_penalty
        presence, frequency = config.presence_penalty, config.frequency_penalty
        if self._turbomind:
            for name in ("presence_penalty", "frequency_penalty"):
                if getattr(config, name):
                    raise InvalidRequestError(f"{name}: lmdeploy's turbomind engine cannot honour it; set it to 0")
        penalised = penalty != 1 or presence != 0 or frequency != 0
        sampling = self._generation_config(
            max_new_tokens=room,
            min_new_tokens=config.min_new_tokens,
            # Greedy decoding drops the penalties. Sampling from the one likeliest token does not.
            do_sample=not config.greedy or penalised,
            temperature=1.0 if config.greedy else config.temperature,
            top_p=1.0 if config.greedy else config.top_p,
            top_k=1 if config.greedy else config.top_k or 0,  # 0: no limit
            repetition_penalty=penalty,
            ignore_eos=config.ignore_eos,
            logprobs=max(1, config.top_logprobs) if config.logprobs else None,
            include_stop_str_in_output=True,  # the token that ended the sequence is counted and told
            random_seed=config.seed,
        )
        # A special token has no text that the parent could find a stop word in.
        if stop_ids := {self._special[word] for word in config.stop_words if word in self._special}:
            sampling.stop_token_ids = list(self._eos_ids | stop_ids)
            if config.ignore_eos:
                # lmdeploy bans what would end the sequence, of which it takes these to be a part.
                sampling.ignore_eos = False
                sampling.bad_token_ids = list(self._eos_ids - stop_ids)
        if penalised and not self._turbomind:
            sampling.repetition_penalty = 1.0
            sampling.logits_processors = [
                _Penalty(penalty, presence, frequency, input_ids, len(earlier_ids), self._padding_id)
            ]
        if config.json_schema is not None:
            if num_earlier:
                raise EngineError("json_schema: lmdeploy cannot continue such an answer; send the request again")
            sampling.response_format = _response_format(config.json_schema)
        return sampling

    async def _watch(self) -> None:
        while True:
            await self._probe()
            await asyncio.sleep(_WATCH_S)

    async def _probe(self) -> None:
        """End this process when lmdeploy's engine is dead or hangs, which it does not get over."""
        health = await self._engine.health_probe(_STALL_S)
        if health["status"] != "healthy":
            sys.stderr.write(f"lmdeploy's engine is {health['status']}: {health['message']}\n")
            sys.stderr.flush()
            os._exit(1)
        self._healthy_at = time.monotonic()

    def _put(self, output: Output) -> None:
        """Report an output, together with everything else of this turn of the loop."""
        if not self._outputs:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outputs.append(output)

    def _flush(self) -> None:
        outputs, self._outputs = self._outputs, []
        try:
            usage = float(self._engine.engine.get_schedule_metrics().cache_usage) if self._running else 0.0
        except Exception:  # noqa: BLE001 - of the engine's process; what it produced is worth more than this figure
            _log.exception("lmdeploy does not tell its load")
            usage = 0.0
        self._send(Step(outputs, usage))

    def _send(self, report: Report) -> None:
        frame = pack(report)
        with self._sending:
            self._reports.write(frame)
            self._reports.flush()


async def _or_end(work: Awaitable[None]) -> None:
    """Wait for a task's work. An error ends this process at once: lmdeploy's threads would hold up an orderly end."""
    try:
        await work
    except Exception:  # noqa: BLE001 - whatever it is, it is this process's last word
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


class _Penalty:
    """The penalties for the PyTorch engine, as a logits processor: on each token that was generated.

    The engine itself has a repetition penalty alone. That one is a token late where it prepares a step before the last
    one is over, takes the tokens of an earlier attempt for prompt, and penalises the padding that it puts between
    requests of different lengths.

    Source: lmdeploy 0.18.0, `pytorch.strategies.ar.sampling._gather_generated_ids`. Rows that a processor is given have
    padding before, after and between the tokens: `pytorch.strategies.ar.step_inputs.merge_sampling_delta`.

    Args:
        penalty: On repetition, > 0; 1 is none.
        presence: Taken off the score of each token that was generated.
        frequency: The same, times how often it was.
        input_ids: All tokens that the request begins with.
        num_earlier: How many at the end of those were generated.
        padding_id: The id that the engine pads with. It is no token that a model generates.
    """

    def __init__(
        self,
        penalty: float,
        presence: float,
        frequency: float,
        input_ids: list[int],
        num_earlier: int,
        padding_id: int,
    ) -> None:
        self._penalty = penalty
        self._presence = presence
        self._frequency = frequency
        self._input_ids = input_ids
        self._num_earlier = num_earlier
        self._padding_id = padding_id
        self._start = 0  # where in the row the input was last

    def __call__(self, row: Any, scores: Any) -> Any:
        """Return `scores` [vocabulary] of the token that follows those in `row` [tokens]."""
        import torch

        length = len(self._input_ids)
        expected = torch.tensor(self._input_ids, device=row.device)
        for start in (self._start, *range(len(row) - length + 1)):
            if torch.equal(row[start : start + length], expected):
                break
        self._start = start
        generated, counts = row[start + length - self._num_earlier :].unique(return_counts=True)
        generated, counts = generated[generated != self._padding_id], counts[generated != self._padding_id]
        score = scores[generated]
        score = torch.where(score < 0, score * self._penalty, score / self._penalty)
        scores[generated] = score - self._presence - self._frequency * counts
        return scores


def mend_server() -> None:
    """Have lmdeploy's api_server, which is about to run in this process, answer as the engine here does.

    What `_score_apart` is about is left as it is there: the server starts its PyTorch engine in a process of its own,
    which this does not reach, and raylm's clients ask no server to score a prompt.
    """
    _keep_whole_characters()
    _penalise_exactly()


def _keep_whole_characters() -> None:
    """Have lmdeploy hold back half a character alone, and not with it all text that came in the same step.

    On a busy server a step has many tokens, and what is held back in the last one is lost.

    Source: lmdeploy 0.18.0, `tokenizer.HuggingFaceTokenizer.detokenize_incrementally`.
    """
    from lmdeploy.tokenizer import HuggingFaceTokenizer

    whole_step = HuggingFaceTokenizer.detokenize_incrementally

    def detokenize(self: Any, all_input_ids: Sequence[int], state: Any, **options: Any) -> tuple[str, Any]:
        before, num_tokens = state.ids_offset, len(state.prev_tokens or ())
        text, after = whole_step(self, all_input_ids, state, **options)
        if text or len(all_input_ids) - before < 2:
            return text, after
        if state.prev_tokens is not None:
            del state.prev_tokens[num_tokens:]  # which the step has added to
        after = state
        for end in range(before + 1, len(all_input_ids) + 1):
            token_text, after = whole_step(self, all_input_ids[:end], after, **options)
            text += token_text
        return text, after

    HuggingFaceTokenizer.detokenize_incrementally = detokenize


def _penalise_exactly() -> None:
    """Have the server's repetition penalty depend on the answer alone, as that of the engine in process does.

    The PyTorch engine's own depends on when a step is prepared: greedy text is not the same twice. See `_Penalty`.

    Source: lmdeploy 0.18.0, `serve.core.async_engine.AsyncEngine._determine_gen_config`.
    """
    from lmdeploy.serve.core import AsyncEngine

    determine = AsyncEngine._determine_gen_config

    def determine_gen_config(self: Any, input_ids: Sequence[int], gen_config: Any = None) -> Any:
        config = determine(self, input_ids, gen_config)
        if self.backend == "pytorch" and config.repetition_penalty != 1:
            padding_id = getattr(self.hf_cfg, "bos_token_id", None) or 0
            penalty = _Penalty(config.repetition_penalty, 0.0, 0.0, list(input_ids), 0, padding_id)
            config.logits_processors = [*(config.logits_processors or ()), penalty]
            config.repetition_penalty = 1.0
        return config

    AsyncEngine._determine_gen_config = determine_gen_config


def _score_apart() -> None:
    """Have the PyTorch engine read prompts that it scores in other steps than prompts that it continues.

    It takes a step with both for one of scores alone: it answers the others with token 0, and later dies of them.

    Source: lmdeploy 0.18.0, `pytorch.engine.inputs_maker.fill_logits_indices` and
    `pytorch.paging.prefill_scheduler._PrefillScheduler.schedule`.
    """
    from lmdeploy.pytorch.paging.prefill_scheduler import _PrefillScheduler

    schedule = _PrefillScheduler.schedule

    def schedule_apart(self: Any, *, waiting: Sequence[Any], **rest: Any) -> list[Any]:
        scored = [sequence for sequence in waiting if sequence.logprob_start_pos >= 0]
        others = [sequence for sequence in waiting if sequence.logprob_start_pos < 0]
        # Who waits longest comes first, so that neither kind starves.
        kinds = sorted(filter(None, (scored, others)), key=lambda kind: min(each.arrive_time for each in kind))
        for kind in kinds:
            if chosen := schedule(self, waiting=kind, **rest):
                return list(chosen)
        return []

    _PrefillScheduler.schedule = schedule_apart


def _no_text(token_ids: list[int], state: Any, **_: object) -> tuple[str, Any]:
    """Stand in for lmdeploy's detokenizer: note which tokens were seen."""
    state.ids_offset = len(token_ids)
    return "", state


def _logprobs(out: Any) -> tuple[float, ...]:
    """Return the log-probability of each token of a `GenOut`, which has those of the likeliest ones beside it."""
    return _of_tokens(out.token_ids or (), out.logprobs or ())


def _top_logprobs(out: Any, num: int) -> tuple[Ranked, ...]:
    """Return the likeliest tokens in the place of each token of a `GenOut`."""
    return tuple(_rank(row, num) for row in out.logprobs or ())


def _of_tokens(token_ids: Sequence[int], rows: Sequence[Mapping[int, float]]) -> tuple[float, ...]:
    pairs = zip(token_ids, rows, strict=True)
    return tuple(min(0.0, float(row[token_id])) for token_id, row in pairs)


def _rank(row: Mapping[int, float], num: int) -> Ranked:
    # One more than was asked for is in it, where the token itself is none of the likeliest.
    ranked = sorted(row.items(), key=lambda candidate: -candidate[1])[:num]
    return tuple((int(token_id), min(0.0, float(logprob))) for token_id, logprob in ranked)


def _response_format(json_schema: str) -> dict[str, Any]:
    try:
        schema = json.loads(json_schema)
    except ValueError as error:
        raise InvalidRequestError(f"json_schema: it is no JSON: {error}") from None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _finish_reason(reason: str | None, num_tokens: int, room: int) -> FinishReason:
    """Return why lmdeploy ended a request that nobody cancelled.

    Raises:
        EngineError: it did not end it for a good reason. Source: lmdeploy 0.18.0, `serve.core.async_engine.GenOut`.
    """
    if reason == "stop":
        return "stop"
    if reason == "length":
        if num_tokens < room:
            raise EngineError(
                f"lmdeploy ended the answer after {num_tokens} tokens where {room} were asked for and the context has "
                "room: its KV cache is full; raise cache_max_entry_count, or lower session_len"
            )
        return "length"
    raise EngineError(f"lmdeploy ended the answer with {reason or 'no reason'}; send it again")


def main() -> None:
    """Run the worker on this process's stdin and stdout."""
    reports = start_child()
    try:
        load = _decode_load.decode(first_body(0))
    except EOFError:
        return  # the parent is gone
    try:
        engine = build_engine(load)
        asyncio.run(Worker(engine, reports).serve(0))
    except RaylmError as error:
        reports.write(pack(Failure(to_message(error))))
        reports.flush()
    except BaseException:  # noqa: BLE001 - whatever it is, it is this process's last word
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)  # an orderly end would wait for lmdeploy's threads


if __name__ == "__main__":
    main()
