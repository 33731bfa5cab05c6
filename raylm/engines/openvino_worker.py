"""The child process of the OpenVINO engine.

`ContinuousBatchingPipeline.step()` holds the GIL from beginning to end, up to hundreds of milliseconds, so it cannot
share a process with an event loop. It runs here instead, in a plain loop:

    read the commands that are there -> one decode step -> one report of what every request produced

What `child.py` says about the conversation with the parent holds here. An exception of the pipeline is not survived:
its traceback on stderr is the last word.

The only importer of openvino_genai. It is imported late, so that the parent can import `Load`.
"""

from __future__ import annotations

import os
import secrets
import select
from collections import deque
from importlib.metadata import version
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
    ContextLengthError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    RaylmError,
    to_message,
)
from raylm.messages import FinishReason, GenerationConfig, Message, Request

# Greedy text independent of the batch takes all three. Source: measured with openvino-genai 2026.4.
_DETERMINISTIC = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class Load(msgspec.Struct, tag=True):
    """The first command: load a model. Answered by `Ready` or `Failure`.

    Attributes:
        path: GGUF file or folder with an OpenVINO model.
        capacity: Requests decoded together.
        max_context: Prompt and generated tokens together.
        cache_size_gb: Memory for the KV cache, in GiB.
        num_threads: CPU threads; None lets OpenVINO decide.
        deterministic: Greedy text that does not depend on the batch.
        prefix_caching: Keep the KV cache of finished requests.
    """

    path: str
    capacity: int
    max_context: int
    cache_size_gb: int
    num_threads: int | None
    deterministic: bool
    prefix_caching: bool


_decode_load: msgspec.msgpack.Decoder[Load] = msgspec.msgpack.Decoder(Load)
_decode_command: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


class _Running:
    """One request in the pipeline, or on its way there.

    Attributes:
        input_ids: What the pipeline is to read.
        prompt_tokens: How many of them are the prompt's.
        sampling: OpenVINO's form of how to generate.
        logprobs: Whether log-probabilities are asked for.
        scoring: Whether it is there for the log-probabilities of its prompt. It is handed in again for its answer.
        echo: The prompt's tokens, as long as they are still to be told.
        echoed: Log-probabilities of the first of them, if asked for. They come piece by piece where the prompt is read
            so.
        handle: The pipeline's word for it, while it is there.
    """

    __slots__ = ("echo", "echoed", "handle", "input_ids", "logprobs", "prompt_tokens", "sampling", "scoring")

    def __init__(
        self, input_ids: list[int], prompt_tokens: int, sampling: Any, *, logprobs: bool, echo: tuple[int, ...]
    ) -> None:
        self.input_ids = input_ids
        self.prompt_tokens = prompt_tokens
        self.sampling = sampling
        self.logprobs = logprobs
        self.scoring = bool(echo) and logprobs
        self.echo = echo
        self.echoed: list[float] = []
        self.handle: Any = None


class Worker:
    """Drives one pipeline.

    Args:
        pipeline: An `openvino_genai.ContinuousBatchingPipeline`.
        max_context: Prompt and generated tokens together, at most. The pipeline itself does not check it.
        prefix_caching: Whether the pipeline keeps the KV cache of finished requests.

    Attributes:
        tokens: The tokens by id, without special tokens: those that decoding leaves out.
    """

    def __init__(self, pipeline: Any, max_context: int, *, prefix_caching: bool = False) -> None:
        import openvino_genai as genai

        self._pipeline = pipeline
        self._tokenizer = pipeline.get_tokenizer()
        self._max_context = max_context
        self._prefix_caching = prefix_caching
        vocabulary: dict[bytes, int] = self._tokenizer.get_vocab()
        self._num_embeddings = max(vocabulary.values()) + 1
        self.tokens = self._spell_tokens(vocabulary)
        self._special = {token: token_id for token, token_id in vocabulary.items() if token_id not in self.tokens}
        self._waiting: deque[tuple[int, _Running]] = deque()
        self._running: dict[int, _Running] = {}
        self._cancelled: list[tuple[int, _Running]] = []
        self._outputs: list[Output] = []
        self._ignored = genai.GenerationStatus.IGNORED
        self._finish_reasons: dict[Any, FinishReason] = {
            genai.GenerationFinishReason.STOP: "stop",
            genai.GenerationFinishReason.LENGTH: "length",
        }

    @classmethod
    def load(cls, load: Load) -> Worker:
        """Return a worker with the model loaded.

        Raises:
            EngineStartError: OpenVINO is not installed, or cannot load the model.
        """
        try:
            import openvino_genai as genai
        except ImportError as error:
            raise EngineStartError(
                f"cannot import openvino_genai ({error}); install it with: pip install 'raylm[cpu]'"
            ) from error
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = load.cache_size_gb
        # Wrong text comes of two flaws of it. A prefill that is cancelled leaves blocks in the cache that count as
        # filled and are not. Prompts that extend one partly filled block at once overwrite each other there, for the
        # prompt phase has no copy on write.
        # Source: openvino-genai 2026.4.1, `Scheduler::_schedule_prompt_phase_dynamic_split_fuse`.
        scheduler.enable_prefix_caching = load.prefix_caching
        scheduler.max_num_seqs = load.capacity
        # A decode step needs a token of room for every sequence.
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, load.capacity)
        properties: dict[str, Any] = dict(_DETERMINISTIC) if load.deterministic else {}
        if load.num_threads is not None:
            properties["INFERENCE_NUM_THREADS"] = load.num_threads
        try:
            pipeline = genai.ContinuousBatchingPipeline(load.path, scheduler, "CPU", properties)
        except RuntimeError as error:
            raise EngineStartError(
                f"OpenVINO cannot load {load.path}: {_reason(error)}. Give the path of a complete GGUF file, or of a "
                "folder that optimum-cli exported"
            ) from error
        return cls(pipeline, load.max_context, prefix_caching=load.prefix_caching)

    def _spell_tokens(self, vocabulary: dict[bytes, int]) -> dict[int, bytes]:
        tokens = {token_id: token for token, token_id in vocabulary.items()}
        alone = [[token_id] for token_id in tokens]
        shown = self._tokenizer.decode(alone, skip_special_tokens=True)
        spelled = self._tokenizer.decode(alone, skip_special_tokens=False)
        same = map(str.__eq__, shown, spelled)
        return {token_id: token for (token_id, token), ordinary in zip(tokens.items(), same, strict=True) if ordinary}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._pipeline.has_non_finished_requests() or self._waiting or self._cancelled)

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        # The pipeline's figure is that of its last step; what has finished since holds nothing.
        return 0.0 if self.idle else float(self._pipeline.get_metrics().cache_usage) / 100

    def add(self, key: int, request: Request) -> None:
        """Hand a request to the pipeline. A failure is an output."""
        try:
            self._add(key, request)
        except RaylmError as error:
            self._outputs.append(Output(key, 0, error=to_message(error)))

    def _add(self, key: int, request: Request) -> None:
        prompt_ids = self._prompt_ids(request)
        if not prompt_ids:
            raise InvalidRequestError("the prompt is empty: it has no tokens; send some text")
        if len(prompt_ids) >= self._max_context:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens and the context holds {self._max_context}, answer included; "
                "shorten the prompt"
            )
        config, generated, input_ids = request.config, request.generated, prompt_ids
        echo = tuple(prompt_ids) if config.echo and generated is None else ()
        num_generated = 0
        if generated is not None:
            num_generated = generated.num_tokens
            input_ids = prompt_ids + (generated.token_ids or self._encode(generated.text, add_special_tokens=False))
        room = min(config.max_new_tokens - num_generated, self._max_context - len(input_ids))
        if room < 1 and not (echo and config.logprobs):
            extra = Extra(prompt_token_ids=echo) if echo else None
            self._outputs.append(Output(key, len(prompt_ids), finish_reason="length", extra=extra))
            return
        sampling = self._sampling(config, num_generated, room, echo=bool(echo))
        running = _Running(input_ids, len(prompt_ids), sampling, logprobs=config.logprobs, echo=echo)
        self._waiting.append((key, running))

    def _hand_in(self) -> None:
        """Hand requests to the pipeline, in their order, as long as they get along with those that are there.

        Prompts that are scored get along with each other alone. In one step with anything else they are told wrong
        log-probabilities, and the others' prompts wrong answers.
        Source: openvino-genai 2026.4.1, as it behaves.
        """
        while self._waiting:
            key, running = self._waiting[0]
            there = next(iter([*self._running.values(), *(cancelled for _, cancelled in self._cancelled)]), running)
            if there.scoring != running.scoring:
                return
            self._waiting.popleft()
            try:
                running.handle = self._add_request(key, running)
            except InvalidRequestError as error:
                self._outputs.append(Output(key, 0, error=to_message(error)))
            else:
                self._running[key] = running

    def _add_request(self, key: int, running: _Running) -> Any:
        import numpy as np
        import openvino as ov

        sampling = running.sampling
        if running.scoring:
            sampling = self._pipeline.get_config()
            sampling.max_new_tokens = 0
            sampling.logprobs = 1
            sampling.echo = True
            sampling.do_sample = False
        try:
            return self._pipeline.add_request(key, ov.Tensor(np.array([running.input_ids], dtype=np.int64)), sampling)
        except RuntimeError as error:
            raise InvalidRequestError(f"OpenVINO refuses the request: {_reason(error)}; change it") from error

    def tokenize(self, key: int, request: Request) -> Tokens:
        """Return the prompt's tokens."""
        try:
            return Tokens(key, tuple(self._prompt_ids(request)))
        except RaylmError as error:
            return Tokens(key, error=to_message(error))

    def _prompt_ids(self, request: Request) -> list[int]:
        if request.messages is not None:
            return self._encode(self._apply_chat_template(request.messages), add_special_tokens=False)
        if request.prompt_token_ids is None:
            return self._encode(request.prompt or "", add_special_tokens=True)
        for token_id in request.prompt_token_ids:
            if not 0 <= token_id < self._num_embeddings:
                raise InvalidRequestError(
                    f"prompt_token_ids: {token_id} is no token of this model, which has {self._num_embeddings}"
                )
        return list(request.prompt_token_ids)

    def _apply_chat_template(self, messages: tuple[Message, ...]) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template; set a meta_template, or send a prompt")
        history = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(history, add_generation_prompt=True))
        except RuntimeError as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {_reason(error)}; change them, or set a "
                "meta_template"
            ) from error

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        input_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).input_ids
        return [int(token_id) for token_id in input_ids.data.flat]

    def _sampling(self, config: GenerationConfig, num_generated: int, room: int, *, echo: bool) -> Any:
        """Return OpenVINO's form of `config` for a request that may generate `room` more tokens."""
        config = config.after(num_generated, left=room)
        if config.top_logprobs:
            raise InvalidRequestError("top_logprobs: OpenVINO tells none but that of the token itself; set it to 0")
        if echo and config.logprobs and self._prefix_caching:
            # It has none for what it finds in the cache, and gives what lies in memory.
            raise InvalidRequestError(
                "echo: with prefix_caching OpenVINO cannot tell the log-probabilities of the prompt; start it without, "
                "or leave logprobs out"
            )
        if config.json_schema is not None:
            # It compiles one in the middle of a step, and one that it cannot compile ends the pipeline for good.
            raise InvalidRequestError("json_schema: raylm does not ask OpenVINO for it; leave it out")
        sampling = self._pipeline.get_config()  # a copy of the model's own, with its end-of-sequence ids
        sampling.max_new_tokens = room
        sampling.min_new_tokens = config.min_new_tokens
        sampling.repetition_penalty = config.repetition_penalty
        sampling.presence_penalty = config.presence_penalty
        sampling.frequency_penalty = config.frequency_penalty
        sampling.logprobs = int(config.logprobs)
        sampling.do_sample = not config.greedy
        if config.ignore_eos:
            sampling.ignore_eos = True
            sampling.stop_token_ids = set()
        # A special token has no text that the parent could find a stop word in.
        words = [word.encode() for word in config.stop_words]
        if stop_ids := {self._special[word] for word in words if word in self._special}:
            if config.ignore_eos:
                # It would ignore these with the end of sequence; and it wants one, which is among these.
                sampling.ignore_eos = False
                sampling.eos_token_id = min(stop_ids)
            sampling.stop_token_ids |= stop_ids
        if sampling.do_sample:
            sampling.temperature = config.temperature
            sampling.top_p = config.top_p
            if config.top_k is not None:
                sampling.top_k = config.top_k
            seed = secrets.randbits(32) if config.seed is None else config.seed
            sampling.rng_seed = seed % (1 << 32)  # the generator takes 32 bits
        return sampling

    def cancel(self, key: int) -> None:
        """Abort a request; the next step frees what it holds."""
        if (running := self._running.pop(key, None)) is not None:
            running.handle.cancel()
            self._cancelled.append((key, running))
            return
        for waiting in self._waiting:
            if waiting[0] == key:
                self._waiting.remove(waiting)
                self._outputs.append(Output(key, waiting[1].prompt_tokens, finish_reason="cancelled"))
                return

    def step(self) -> None:
        """Do one decode step."""
        self._hand_in()
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        for key, cancelled in self._cancelled:
            self._outputs.append(Output(key, cancelled.prompt_tokens, finish_reason="cancelled"))
        self._cancelled.clear()
        finished: list[int] = []
        scored: list[int] = []
        for key, running in self._running.items():
            if running.handle.can_read():
                output = self._read(key, running)
                if running.echo and output.error is None:
                    continue  # the prompt is not read to its end
                self._outputs.append(output)
                if output.finish_reason is not None or output.error is not None:
                    finished.append(key)
                    if running.scoring and output.error is None and running.sampling.max_new_tokens:
                        output.finish_reason = None
                        scored.append(key)
        for key in reversed(scored):
            running = self._running[key]
            running.scoring = False
            self._waiting.appendleft((key, running))
        for key in finished:
            del self._running[key]

    def _read(self, key: int, running: _Running) -> Output:
        output = Output(key, running.prompt_tokens)
        while output.finish_reason is None and running.handle.can_read():
            results = running.handle.read()
            if not results:  # how the pipeline gives a request up
                output.error = to_message(self._given_up(running.handle.get_status()))
                break
            (result,) = results.values()
            token_ids = tuple(result.generated_ids)
            logprobs = tuple(result.generated_log_probs) if running.logprobs else ()
            if running.echo:
                token_ids, logprobs = self._take_echo(running, output, token_ids, logprobs)
            output.token_ids += token_ids
            output.logprobs += logprobs
            output.finish_reason = self._finish_reasons.get(result.finish_reason)
        return output

    def _take_echo(
        self, running: _Running, output: Output, token_ids: tuple[int, ...], logprobs: tuple[float, ...]
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Take the prompt off the tokens that came, and put it into `output` when it is whole. Return the rest."""
        if running.logprobs:
            start, end = len(running.echoed), len(running.echo)
            running.echoed += logprobs[: end - start]
            token_ids, logprobs = token_ids[end - start :], logprobs[end - start :]
            if len(running.echoed) < end:
                return (), ()
        told = (0.0, *running.echoed[1:]) if running.logprobs else ()  # OpenVINO's word on the first is 1.0
        output.extra = Extra(prompt_token_ids=running.echo, prompt_logprobs=told)
        running.echo = ()
        return token_ids, logprobs

    def _given_up(self, status: Any) -> EngineError:
        if status == self._ignored:
            return EngineError(
                "the KV cache is full: this request alone needs more than all of it; raise cache_size_gb, or lower "
                "max_context"
            )
        return EngineError(f"OpenVINO gave the request up with status {status}; send it again")

    def take_outputs(self) -> list[Output]:
        """Return the outputs since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs


def _reason(error: RuntimeError) -> str:
    """Return the reason in an exception of OpenVINO, without the source location in its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[1:] or lines).rstrip(".")


class _Commands:
    """Reads commands from a file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._frames = Frames()

    def read(self, *, wait: bool) -> list[Command]:
        """Return the commands that have come; with `wait`, wait for more bytes first.

        Raises:
            EOFError: the parent is gone.
        """
        if not wait and not select.select([self._descriptor], [], [], 0)[0]:
            return []
        chunk = os.read(self._descriptor, 1 << 20)
        if not chunk:
            raise EOFError
        return [_decode_command.decode(body) for body in self._frames.feed(chunk)]


def _serve(descriptor: int, reports: BinaryIO) -> None:
    """Load the model and decode until the parent is gone."""

    def send(report: Report) -> None:
        reports.write(pack(report))
        reports.flush()

    load = _decode_load.decode(first_body(descriptor))
    try:
        worker = Worker.load(load)
    except RaylmError as error:
        send(Failure(to_message(error)))
        return
    send(Ready(version("openvino-genai"), worker.tokens, load.max_context, load.capacity))
    commands = _Commands(descriptor)
    while True:
        for command in commands.read(wait=worker.idle):
            match command:
                case Add(key, request):
                    worker.add(key, request)
                case Cancel(key):
                    worker.cancel(key)
                case Ping(key):
                    send(Pong(key))
                case Tokenize(key, request):
                    send(worker.tokenize(key, request))
        if not worker.idle:
            worker.step()
        if outputs := worker.take_outputs():
            send(Step(outputs, worker.cache_usage))


def main() -> None:
    """Run the worker on this process's stdin and stdout."""
    reports = start_child()
    try:
        _serve(0, reports)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is gone: nobody is there to wait for an orderly end


if __name__ == "__main__":
    main()
