"""How models that generate text speak on a Triton server: what they take, and what they send back.

Pure: no I/O, no tritonclient. There are four dialects. Three take text and give text, and are told apart by their
inputs; a `Dialect` says what the inputs of one are called, a `TextOutput` turns its responses into deltas. The fourth,
LMDeploy's TurboMind repository, takes and gives token ids: see `triton_turbomind`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from raylm.engines.base import Emit
from raylm.engines.text import StopWords
from raylm.errors import InvalidRequestError, ProtocolError, UpstreamError
from raylm.messages import Delta, FinishReason, GenerationConfig, Request, Usage

Values = dict[str, list[Any]]
"""Contents of input tensors by name, without their batch dimension."""

Outputs = dict[str, bytes]
"""Contents of output tensors by name, as they are on the wire."""

TURBOMIND = frozenset({"input_ids", "input_lengths", "request_output_len", "step", "START", "END", "STOP", "CORRID"})
"""The inputs by which a TurboMind model is known."""

_RANGES = {
    "INT32": (-(2**31), 2**31 - 1),
    "UINT32": (0, 2**32 - 1),
    "INT64": (-(2**63), 2**63 - 1),
    "UINT64": (0, 2**64 - 1),
}

_BYTES_PER_TOKEN = 6  # more than a token of ordinary text has, in any language


@dataclass(frozen=True)
class Model:
    """What a server says of one model.

    Attributes:
        name: Its name.
        inputs: Triton's name of the type (`BYTES`, `INT32`, ...) and the declared dimensions, by input.
        outputs: Names of the outputs.
        batched: Every tensor has a batch dimension first.
        decoupled: It may answer a request with any number of responses.
        parameters: From its configuration.
    """

    name: str
    inputs: Mapping[str, tuple[str, Sequence[int]]]
    outputs: frozenset[str]
    batched: bool
    decoupled: bool
    parameters: Mapping[str, str]


class CallFailedError(Exception):
    """A call to the server failed. The engine turns it into an error of raylm; it never leaves the engine.

    Args:
        status: Name of the gRPC status; None where the model itself sent an error in a stream.
        details: What the server or gRPC said.
    """

    def __init__(self, status: str | None, details: str) -> None:
        super().__init__(details)
        self.status = status
        self.details = details


def first_text(content: bytes) -> bytes:
    """Return the first element of a BYTES tensor.

    Raises:
        ProtocolError: it has none.
    """
    length = int.from_bytes(content[:4], "little")
    if len(content) < 4 + length or len(content) < 4:
        raise ProtocolError("the server sent a text tensor without a text; look at the model's own log")
    return content[4 : 4 + length]


def first_count(content: bytes) -> int:
    """Return the first element of an INT32 or UINT32 tensor."""
    return int.from_bytes(content[:4], "little")


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text has, where nobody tells: a word is at least one, and so are six bytes."""
    return max(len(text.split()), math.ceil(len(text.encode()) / _BYTES_PER_TOKEN))


def fits(values: Sequence[Any], datatype: str) -> bool:
    """Return whether a tensor of a type can hold some values."""
    low, high = _RANGES.get(datatype, (-math.inf, math.inf))
    return all(not isinstance(value, int) or low <= value <= high for value in values)


def refuse(parameter: str, model: Model) -> InvalidRequestError:
    """Return the error for a parameter that a model has no input for."""
    return InvalidRequestError(
        f"{parameter}: the model {model.name!r} on the Triton server cannot do that; leave it out"
    )


@dataclass(frozen=True)
class Dialect:
    """One way to ask for text.

    Attributes:
        name: For people.
        known_by: The inputs that no other dialect has together.
        stream: The input that asks for a stream.
        exclude: The input that asks to leave the prompt out of the text.
        parameters: The input for each generation parameter; the first of them that the model has.
        json: The one input that takes all parameters as JSON; None: each has an input of its own.
        cumulative: Each response repeats the text so far.
        asks: Inputs that ask for more outputs, set where the model has them.
    """

    name: str
    known_by: frozenset[str]
    stream: str
    exclude: str
    parameters: Mapping[str, Sequence[str]]
    json: str | None = None
    cumulative: bool = False
    asks: Sequence[str] = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")

    def repeats(self, model: Model) -> bool:
        """Return whether each response of a model repeats the text so far."""
        return self.cumulative or model.parameters.get("accumulate_tokens", "").lower() == "true"

    def tensors(self, model: Model, prompt: str, config: GenerationConfig, max_new_tokens: int) -> Values:
        """Return the inputs of one request.

        Args:
            model: Whom to ask.
            prompt: The whole text before the answer.
            config: How to generate.
            max_new_tokens: In place of the one in `config`.

        Raises:
            InvalidRequestError: the model cannot honour a parameter; the text names it.
        """
        values: Values = {"text_input": [prompt.encode()]}
        if config.logprobs:
            # The answers have no token ids that log-probabilities could belong to.
            raise refuse("logprobs", model)
        flags = {self.stream: model.decoupled, self.exclude: True, **dict.fromkeys(self.asks, True)}
        values.update({name: [flag] for name, flag in flags.items() if name in model.inputs})
        if self.json is not None:
            values[self.json] = [msgspec.json.encode(vllm_parameters(config, max_new_tokens))]
            return values
        for parameter, (value, neutral) in _settings(config, max_new_tokens).items():
            names = [name for name in self.parameters.get(parameter, ()) if name in model.inputs]
            if names and fits(value, model.inputs[names[0]][0]):
                values[names[0]] = value
            elif not neutral:
                raise refuse(parameter, model)
        return values


def vllm_parameters(config: GenerationConfig, max_new_tokens: int) -> dict[str, Any]:
    """Return vLLM's SamplingParams.

    Source: vLLM 0.10, `vllm.SamplingParams`.
    """
    parameters: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0.0}
    if not config.greedy:
        parameters.update(temperature=config.temperature, top_p=config.top_p)
        if config.top_k is not None:
            parameters["top_k"] = config.top_k
        if config.seed is not None:
            parameters["seed"] = config.seed
    if config.repetition_penalty != 1:
        parameters["repetition_penalty"] = config.repetition_penalty
    if config.presence_penalty:
        parameters["presence_penalty"] = config.presence_penalty
    if config.frequency_penalty:
        parameters["frequency_penalty"] = config.frequency_penalty
    if config.min_new_tokens:
        parameters["min_tokens"] = config.min_new_tokens
    if config.stop_words:
        parameters["stop"] = config.stop_words
        # Otherwise vLLM holds back as many characters as the longest has, and its responses end within tokens.
        parameters["include_stop_str_in_output"] = True
    if config.ignore_eos:
        parameters["ignore_eos"] = True
    return parameters


def _settings(config: GenerationConfig, max_new_tokens: int) -> dict[str, tuple[list[Any], bool]]:
    """Return the contents of each parameter's tensor, and whether leaving it out means the same."""
    settings: dict[str, tuple[list[Any], bool]] = {"max_new_tokens": ([max_new_tokens], False)}
    if config.greedy:
        settings["top_k"] = [1], False
    else:
        # Also where neutral: without top_k and top_p TensorRT-LLM decodes greedily.
        settings["temperature"] = [config.temperature], config.temperature == 1
        settings["top_p"] = [config.top_p], config.top_p == 1
        settings["top_k"] = [config.top_k or 0], config.top_k is None
        if config.seed is not None:
            settings["seed"] = [config.seed], False
    if config.repetition_penalty != 1:
        settings["repetition_penalty"] = [config.repetition_penalty], False
    if config.presence_penalty:
        settings["presence_penalty"] = [config.presence_penalty], False
    if config.frequency_penalty:
        settings["frequency_penalty"] = [config.frequency_penalty], False
    if config.min_new_tokens:
        settings["min_new_tokens"] = [config.min_new_tokens], False
    if config.stop_words:
        settings["stop_words"] = [word.encode() for word in config.stop_words], False
    if config.ignore_eos:
        settings["ignore_eos"] = [-1], False  # the id of the end of sequence; -1 is none
    return settings


DIALECTS = (
    Dialect(
        name="vLLM",
        known_by=frozenset({"text_input", "sampling_parameters"}),
        stream="stream",
        exclude="exclude_input_in_output",
        parameters={},
        json="sampling_parameters",
    ),
    Dialect(
        name="TensorRT-LLM",
        known_by=frozenset({"text_input", "max_tokens"}),
        stream="stream",
        exclude="exclude_input_in_output",
        parameters={
            "max_new_tokens": ["max_tokens"],
            "temperature": ["temperature"],
            "top_p": ["top_p"],
            "top_k": ["top_k"],
            "seed": ["seed", "random_seed"],
            "repetition_penalty": ["repetition_penalty"],
            "presence_penalty": ["presence_penalty"],
            "frequency_penalty": ["frequency_penalty"],
            "min_new_tokens": ["min_tokens", "min_length"],
            "stop_words": ["stop_words"],
            "ignore_eos": ["end_id"],
        },
    ),
    Dialect(
        name="TensorRT-LLM LLM API",
        known_by=frozenset({"text_input", "sampling_param_max_tokens"}),
        stream="streaming",
        exclude="sampling_param_exclude_input_from_output",
        parameters={
            "max_new_tokens": ["sampling_param_max_tokens"],
            "temperature": ["sampling_param_temperature"],
            "top_p": ["sampling_param_top_p"],
            "top_k": ["sampling_param_top_k"],
            "seed": ["sampling_param_seed"],
            "presence_penalty": ["sampling_param_presence_penalty"],
            "frequency_penalty": ["sampling_param_frequency_penalty"],
            "stop_words": ["sampling_param_stop"],
        },
        cumulative=True,
    ),
)
"""The dialects that take text.

Source: Triton's vLLM back end of release 26.09, TensorRT-LLM 1.2 `triton_backend/all_models`.
"""


@dataclass
class TextOutput:
    """Turns the responses to one request into deltas.

    A delta ends where a token ends, and nothing is held back after it: neither part of a character nor what may become
    a stop word. `num_tokens` counts what is shown, until the last delta counts all. So a continuation, for which the
    server is told the text alone, goes on at the right token.

    An answer that ends without the reason that the server was asked for was cut off. Where it cannot be asked, as with
    TensorRT-LLM's ensemble, nobody can tell, and the end of the call is taken for the end of the text.

    Token counts are the server's where it counts. Otherwise a response of a stream is a token, the tokens of a text
    that came at once are estimated, and so are the prompt's.

    Args:
        request: The request.
        emit: Takes the deltas.
        echo: Text that the first response may begin with: the prompt, where the server cannot be asked to omit it.
        cumulative: Each response repeats the text so far.
        streamed: The answer comes in more than one response.
        max_context: Prompt and generated tokens together.
        gives_reason: The server was asked for the reason of the end.
    """

    request: Request
    emit: Emit
    echo: str
    cumulative: bool
    streamed: bool
    max_context: int
    gives_reason: bool = False
    done: bool = False
    num_new: int = 0
    _received: str = ""  # where each response repeats the text
    _part: bytes = b""  # of a character
    _fed: int = 0  # characters that have come since the last delta
    _buffer: str = ""  # those of them that stop words let through
    _ends: deque[tuple[int, int]] = field(default_factory=deque)  # where tokens end in them, and which tokens
    _cut: int = 0  # characters that have come and that the server has taken back
    _prompt_tokens: int | None = None
    _counted: bool = False
    _heard: bool = False

    def __post_init__(self) -> None:
        generated = self.request.generated
        self._base = generated.num_tokens if generated else 0
        self._limit = self.request.config.max_new_tokens
        self._stop_words = StopWords(self.request.config.stop_words)

    def take(self, outputs: Outputs, final: bool) -> bool:
        """Emit what a response brings.

        Args:
            outputs: Its tensors.
            final: The server said that no other follows.

        Returns:
            Whether that was the last delta.

        Raises:
            ProtocolError: the response makes no sense.
            UpstreamError: the server gave the request up, or cut its answer off.
        """
        self._heard = True
        if (content := outputs.get("num_output_tokens")) is not None:
            self._counted = True
            self.num_new += first_count(content)
        else:
            self.num_new += self.streamed
        if self._prompt_tokens is None:
            self.count_prompt(outputs)
        if (content := outputs.get("text_output")) is None:
            raise ProtocolError(f"a response has no text_output, only {', '.join(outputs) or 'nothing'}")
        text, whole = self._new_text(first_text(content))
        shown, hit = self._stop_words.feed(text)
        reason = outputs.get("finish_reason")
        if reason is None and self._counted and self._base + self.num_new >= self._limit:
            final = True
        if reason in _GOES_ON and not hit and not final:
            if whole and not self._fed and len(shown) == len(text):
                if text:  # the usual case
                    self.emit(Delta(text, self._base + self.num_new))
            else:
                self._hold(text, shown, whole=whole)
            return False
        self._buffer += shown
        if hit:
            self._finish("stop")
        elif reason in _GOES_ON:
            self.end()
        else:
            self._finish(self._reason(first_text(reason or b"")))
        return self.done

    def _reason(self, reason: bytes) -> FinishReason:
        """Return the server's reason for the end, and correct what was counted by responses."""
        if reason not in {b"stop", b"length"}:
            raise UpstreamError(f"the Triton server ended the request with {reason.decode(errors='replace')!r}")
        if not self._counted and self.streamed:
            most = self._limit - self._base
            full = reason == b"length" and self.prompt_tokens + self._limit < self.max_context
            self.num_new = most if full else min(self.num_new, most)
        return "length" if reason == b"length" else "stop"

    def count_prompt(self, outputs: Outputs) -> bool:
        """Take nothing from a response but the length of the prompt."""
        if self._prompt_tokens is None and (content := outputs.get("num_input_tokens")) is not None:
            self._prompt_tokens = max(1, first_count(content) - self._base)
        return self._prompt_tokens is not None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, without what earlier attempts generated after it."""
        return self._prompt_tokens or estimate_tokens(self.request.prompt or "")

    def end(self) -> None:
        """Emit the last delta, if it was not: the server has ended its answer without a reason.

        Raises:
            ProtocolError: there was no answer.
            UpstreamError: it was cut off.
        """
        if self.done:
            return
        if not self._heard:
            raise ProtocolError("the Triton server ended the answer before it began; look at the model's own log")
        num_tokens = self._base + self.num_new
        full = (
            num_tokens >= self.request.config.max_new_tokens
            or self._usage().prompt_tokens + num_tokens >= self.max_context
        )
        # What came in one response was not cut off.
        if self.gives_reason and self.streamed and not (full and self._counted):
            raise UpstreamError("the Triton server ended the answer without a reason; look at the model's own log")
        self._finish("length" if full else "stop")

    def _new_text(self, content: bytes) -> tuple[str, bool]:
        """Return the text that a response adds, and whether it ends with a whole character."""
        if self._part:
            content = self._part + content
            self._part = b""
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            if self.cumulative or error.end < len(content) or error.reason != "unexpected end of data":
                raise ProtocolError(f"text_output is not UTF-8: {error}") from None
            text, self._part = content[: error.start].decode(), content[error.start :]
        if self.echo:
            text = text.removeprefix(self.echo)
            if not self.cumulative:
                self.echo = ""
        if not self.cumulative:
            return text, not self._part
        whole = text.rstrip("\ufffd")  # where a server has half a character, it says so
        if whole.startswith(self._received):
            new, self._received = whole[len(self._received) :], whole
            return new, len(whole) == len(text)
        cut = len(self._received) - len(whole)
        if self._received.startswith(whole) and cut <= self._fed:
            self._cut = cut  # the beginning of a stop word, of which nothing was shown
            return "", False
        raise ProtocolError("text_output does not begin with the text that the server sent before")

    def _hold(self, text: str, shown: str, *, whole: bool) -> None:
        """Keep text until a token ends in it, and emit up to the last one that may be shown in full."""
        self._fed += len(text)
        self._buffer += shown
        if whole and text:
            self._ends.append((self._fed, self.num_new))
        until = num_tokens = 0
        while self._ends and self._ends[0][0] <= len(self._buffer):
            until, num_tokens = self._ends.popleft()
        if until:
            delta = Delta(self._buffer[:until], self._base + num_tokens)
            self._buffer = self._buffer[until:]
            self._fed -= until
            self._ends = deque((end - until, number) for end, number in self._ends)
            self.emit(delta)

    def _finish(self, reason: FinishReason) -> None:
        self.done = True
        text = self._buffer + self._stop_words.flush()
        if self._cut:
            text = text[: -self._cut]
        if not self._counted and not self.streamed:
            self.num_new = max(1, estimate_tokens(text))
        usage = self._usage()
        self.emit(Delta(text, usage.completion_tokens, finish_reason=reason, usage=usage))

    def _usage(self) -> Usage:
        return Usage(self.prompt_tokens, self._base + self.num_new)


_GOES_ON = frozenset({None, b"", b"\0\0\0\0", b"\4\0\0\0None"})
"""Contents of finish_reason in a response that is not the last. `None` is what Python makes of its absence."""


def dialect_of(model: Model) -> Dialect | None:
    """Return the dialect of a model that takes text, or None if it speaks none of them."""
    if "text_output" not in model.outputs:
        return None
    return next((dialect for dialect in DIALECTS if dialect.known_by <= model.inputs.keys()), None)


def describe(models: Iterable[Model]) -> str:
    """Return the tensors of some models, for an error message."""
    return "; ".join(
        f"{model.name} takes {', '.join(model.inputs) or 'nothing'} and "
        f"gives {', '.join(sorted(model.outputs)) or 'nothing'}"
        for model in models
    )
