"""The HTTP wire and what it means: the only file that knows OpenAI's words.

Bodies are checked here, field by field: what is not listed is refused by name. A `Wire` turns deltas and completions
into the bytes of one kind of answer.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from raylm.errors import InvalidRequestError, RaylmError
from raylm.messages import Completion, Delta, Details, FinishReason, GenerationConfig, Message, Receipt, Usage

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": heartbeat\n\n"

_MAX_SEED = 2**63 - 1
_TOP_LOGPROBS = 20


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorDetail(_Body):
    """What went wrong."""

    message: str
    type: str = Field(description="The class of the error in raylm.errors.")
    param: str | None = Field(description="The field that is wrong, where one is.")
    code: int = Field(description="The HTTP status.")


class ErrorBody(_Body):
    """Every answer that is not a success."""

    error: ErrorDetail


class _Session(_Body):
    model: str | None = Field(None, description="Which model; may be left out where only one is served.")
    session_id: str | int | None = Field(
        None, description="Keeps requests of one name on one actor. See sequence_start for sessions with a transcript."
    )
    request_id: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Names this request in logs and for cancelling it."
    )


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="End with one more chunk that has the usage of all choices.")


class _OpenAI(_Session):
    """What both of OpenAI's routes take."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=_MAX_SEED)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    ignore_eos: bool = False
    user: str | None = Field(None, description="Written into the log.")
    sequence_start: bool | None = Field(
        None, description="Given: this is a turn of a session whose transcript the server keeps; true begins it."
    )
    sequence_end: bool | None = Field(None, description="Given as well: true forgets the session after this turn.")

    @property
    def is_turn(self) -> bool:
        """Whether this is a turn of a session whose transcript is kept here."""
        return self.sequence_start is not None or self.sequence_end is not None

    def _parameters(self) -> dict[str, Any]:
        # OpenAI's defaults where nothing is said; raylm's own are those of the seed's classes.
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        return {
            "temperature": 1.0,
            "top_p": 1.0,
            **{name: value for name, value in given.items() if value is not None},
            "top_k": self.top_k,
            "stop_words": self.stop or (),
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
        }


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """A message of a conversation."""

    role: str
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["text"] | None = Field(None, description="Some evaluation tools send it; it says nothing.")

    def to_message(self) -> Message:
        """Return it as it crosses processes."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, content, self.name)


class JSONSchema(_Body):
    """A schema for the answer."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    of: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """What form the answer has to have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    def to_schema(self) -> str | None:
        """Return the text of the schema, or None for any text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return '{"type": "object"}'
        if self.json_schema is None:
            raise InvalidRequestError("response_format: type json_schema needs json_schema")
        return msgspec.json.encode(self.json_schema.of).decode()


class ChatCompletionBody(_OpenAI):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_SEED)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_MAX_SEED)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    def to_config(self) -> GenerationConfig:
        """Return how to generate.

        Raises:
            InvalidRequestError: fields that exclude each other.
        """
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequestError("max_tokens: give either this or max_completion_tokens")
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs: needs logprobs to be true")
        return GenerationConfig().updated(
            {
                **self._parameters(),
                **({} if limit is None else {"max_new_tokens": limit}),
                "logprobs": bool(self.logprobs),
                "top_logprobs": self.top_logprobs or 0,
                "json_schema": self.response_format.to_schema() if self.response_format else None,
            }
        )


class CompletionBody(_OpenAI):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=_TOP_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="Only the same as n.")

    def to_prompts(self) -> list[str | tuple[int, ...]]:
        """Return the prompts, of text or of token ids.

        Raises:
            InvalidRequestError: there is none.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and all(isinstance(item, int) for item in prompt):
            prompt = [prompt]
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts or not all(prompts):
            raise InvalidRequestError("prompt: it is empty; send at least one character or token")
        return [item if isinstance(item, str) else tuple(item) for item in prompts]

    def to_config(self) -> GenerationConfig:
        """Return how to generate.

        Raises:
            InvalidRequestError: fields that exclude each other.
        """
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequestError("best_of: only the same as n can be honoured")
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens: 0 is for echo alone")
        return GenerationConfig().updated(
            {
                **self._parameters(),
                "max_new_tokens": 16 if self.max_tokens is None else self.max_tokens,  # 16: OpenAI's default
                "logprobs": self.logprobs is not None,
                "top_logprobs": self.logprobs or 0,
                "echo": self.echo,
            }
        )


class _Seed(_Session):
    """What the routes with the seed's words take."""

    sequence_start: bool = Field(True, description="Begin the session, in place of one of that id.")
    sequence_end: bool = Field(True, description="Forget the session when the turn is over.")
    timeout: Annotated[float, Field(gt=0)] | None = Field(30, description="Seconds in which nothing happens, at most.")
    ignore_eos: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, le=_MAX_SEED)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=_MAX_SEED)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop_words: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0, le=_MAX_SEED)] | None = None

    def to_config(self) -> GenerationConfig:
        """Return how to generate; what is not said, or null, is as in the seed's classes. `top_k` may be null."""
        names = set(GenerationConfig.__struct_fields__) & self.model_fields_set
        given = {name: getattr(self, name) for name in names}
        return GenerationConfig().updated(
            {name: value for name, value in given.items() if value is not None or name == "top_k"}
        )


class GenerateBody(_Seed):
    """Body of `POST /generate`."""

    inputs: str | list[str]


class StreamChatBody(_Seed):
    """Body of `POST /stream_chat`."""

    inputs: str | ChatMessage | list[ChatMessage]
    stream: bool = Field(True, description="False: one event, at the end.")

    def to_messages(self) -> tuple[Message, ...]:
        """Return the messages of this turn."""
        if isinstance(self.inputs, str):
            return (Message("user", self.inputs),)
        inputs = [self.inputs] if isinstance(self.inputs, ChatMessage) else self.inputs
        return tuple(message.to_message() for message in inputs)


class TokenizeBody(_Body):
    """Body of `POST /tokenize`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None


class ForkBody(_Body):
    """Body of `POST /sessions/{id}/fork`."""

    session_id: str | int
    model: str | None = None


# Answers


def error_body(error: RaylmError, param: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error. The field it names, where it names one, is what its text begins with."""
    if param is None and (found := re.match(r"([a-z_]+)(\[\d+\])?: ", error.message)):
        param = found[1]
    kind = type(error)
    return {"error": {"message": error.message, "type": kind.__name__, "param": param, "code": kind.status_code}}


def event(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _encode(value) + b"\n\n"


def error_event(error: RaylmError) -> bytes:
    """Return the event that ends a stream which cannot go on."""
    return b"event: error\n" + event(error_body(error))


def receipt_headers(receipt: Receipt) -> dict[str, str]:
    """Return the `x-raylm-*` headers of a whole answer."""
    return {
        "x-raylm-slot": str(receipt.slot),
        "x-raylm-actor": receipt.actor,
        "x-raylm-node": receipt.node,
        "x-raylm-why": receipt.why,
        "x-raylm-queue-ms": f"{receipt.queue_ms:.3f}",
        "x-raylm-attempts": str(receipt.attempts),
        "x-raylm-engine": f"{receipt.engine}/{receipt.engine_version}",
        "x-raylm-prompt-tokens": str(receipt.usage.prompt_tokens),
        "x-raylm-completion-tokens": str(receipt.usage.completion_tokens),
        **({} if receipt.usage.cached_tokens is None else {"x-raylm-cached-tokens": str(receipt.usage.cached_tokens)}),
    }


class Wire(Protocol):
    """How one kind of answer is written. `index` counts choices."""

    def begin(self, index: int) -> bytes:
        """Return what a choice's stream begins with."""
        ...

    def delta(self, index: int, delta: Delta) -> bytes:
        """Return what a delta becomes; called once a delta and stream."""
        ...

    def end(self, index: int, finish_reason: FinishReason, receipt: Receipt) -> bytes:
        """Return what a choice's stream ends with."""
        ...

    def close(self, usages: Sequence[Usage]) -> bytes:
        """Return what comes after the last choice."""
        ...

    def whole(self, completions: Sequence[Completion]) -> Any:
        """Return the answer of a request that is no stream."""
        ...


class _OpenAIWire:
    """What chat and text completions have in common."""

    _streamed: str
    _whole: str

    def __init__(self, answer_id: str, model: str, *, include_usage: bool) -> None:
        self._id = answer_id
        self._model = model
        self._created = int(time.time())
        self._include_usage = include_usage

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._streamed,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }

    def close(self, usages: Sequence[Usage]) -> bytes:
        """Return the usage, if it was asked for, and OpenAI's last event."""
        if not self._include_usage:
            return DONE
        return event(self._chunk([], usage=_usage(usages))) + DONE

    def _answer(self, choices: list[dict[str, Any]], completions: Sequence[Completion]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._whole,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            "usage": _usage([completion.usage for completion in completions]),
            "raylm": [completion.receipt for completion in completions],
        }


class ChatWire(_OpenAIWire):
    """OpenAI's chat completions."""

    _streamed = "chat.completion.chunk"
    _whole = "chat.completion"

    def __init__(self, answer_id: str, model: str, *, include_usage: bool, logprobs: bool) -> None:
        super().__init__(answer_id, model, include_usage=include_usage)
        self._logprobs = logprobs
        # A chunk with text is the hot path: all of it but index and text is the same each time.
        head = event(self._chunk([{"index": 0}])).partition(b"0}]}")[0]
        self._head = head

    def begin(self, index: int) -> bytes:
        """Return the chunk with the role."""
        return event(self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}}]))

    def delta(self, index: int, delta: Delta) -> bytes:
        """Return a chunk; none for a delta without text."""
        if self._logprobs:
            choice = {
                "index": index,
                "delta": {"content": delta.text},
                "logprobs": {"content": _chat_logprobs(delta.details, delta.logprobs)},
                "finish_reason": None,
            }
            return event(self._chunk([choice]))
        if not delta.text:
            return b""
        return b'%s%d,"delta":{"content":%s},"finish_reason":null}]}\n\n' % (self._head, index, _encode(delta.text))

    def end(self, index: int, finish_reason: FinishReason, receipt: Receipt) -> bytes:
        """Return the chunk with the finish reason and the receipt."""
        return event(self._chunk([{"index": index, "delta": {}, "finish_reason": finish_reason}], raylm=receipt))

    def whole(self, completions: Sequence[Completion]) -> Any:
        """Return a chat completion."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text},
                "logprobs": {"content": _chat_logprobs(completion.details, completion.logprobs)}
                if self._logprobs
                else None,
                "finish_reason": completion.finish_reason,
            }
            for index, completion in enumerate(completions)
        ]
        return self._answer(choices, completions)


class CompletionWire(_OpenAIWire):
    """OpenAI's text completions.

    Args:
        answer_id: Id of the answer.
        model: Name of the model.
        prompts: The prompt of each choice, where it is to be echoed; None for those of token ids.
        include_usage: End a stream with the usage.
        logprobs: Tell log-probabilities.
        echo: Answer with the prompt first.
    """

    _streamed = "text_completion"
    _whole = "text_completion"

    def __init__(
        self,
        answer_id: str,
        model: str,
        prompts: Sequence[str | None],
        *,
        include_usage: bool,
        logprobs: bool,
        echo: bool,
    ) -> None:
        super().__init__(answer_id, model, include_usage=include_usage)
        self._prompts = prompts
        self._logprobs = logprobs
        self._echo = echo
        self._offsets = [0] * len(prompts)  # characters of each choice that were sent
        self._head = event(self._chunk([{"index": 0}])).partition(b"0}]}")[0]

    def begin(self, index: int) -> bytes:  # noqa: ARG002 - chat has something to say here
        """Return nothing."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """Return a chunk; none for a delta without text."""
        if self._logprobs or self._echo:
            choice = {"index": index, **self._choice(index, delta.text, delta.details, delta.logprobs)}
            return event(self._chunk([{**choice, "finish_reason": None}]))
        if not delta.text:
            return b""
        return b'%s%d,"text":%s,"logprobs":null,"finish_reason":null}]}\n\n' % (
            self._head,
            index,
            _encode(delta.text),
        )

    def end(self, index: int, finish_reason: FinishReason, receipt: Receipt) -> bytes:
        """Return the chunk with the finish reason and the receipt."""
        return event(
            self._chunk([{"index": index, "text": "", "logprobs": None, "finish_reason": finish_reason}], raylm=receipt)
        )

    def whole(self, completions: Sequence[Completion]) -> Any:
        """Return a text completion."""
        choices = [
            {
                "index": index,
                **self._choice(index, completion.text, completion.details, completion.logprobs),
                "finish_reason": completion.finish_reason,
            }
            for index, completion in enumerate(completions)
        ]
        return self._answer(choices, completions)

    def _choice(self, index: int, text: str, details: Details | None, logprobs: Sequence[float]) -> dict[str, Any]:
        details = details or Details()
        prompt_texts = details.prompt_token_texts if self._echo else ()
        if self._echo and prompt_texts:
            spelled = self._prompts[index]
            text = (b"".join(map(_bytes, prompt_texts)).decode(errors="replace") if spelled is None else spelled) + text
        if not self._logprobs:
            return {"text": text, "logprobs": None}
        tokens = [*prompt_texts, *details.token_texts]
        values: list[float | None] = [*details.prompt_logprobs[: len(prompt_texts)], *logprobs]
        tops: list[dict[str, float] | None] = [
            dict(candidates)
            for candidates in (*details.prompt_top_logprobs[: len(prompt_texts)], *details.top_logprobs)
        ]
        if prompt_texts:
            values[0] = None  # nothing comes before the first token
            if tops:
                tops[0] = None
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(_bytes(token).decode(errors="replace"))
        return {
            "text": text,
            "logprobs": {
                "tokens": tokens,
                "token_logprobs": values,
                "top_logprobs": tops or None,
                "text_offset": offsets,
            },
        }


class StreamChatWire:
    """The seed's `stream_chat`: status, all of the text so far, number of tokens."""

    def __init__(self, *, stream: bool) -> None:
        self._stream = stream
        self._text = ""
        self._num_tokens = 0

    def begin(self, index: int) -> bytes:  # noqa: ARG002
        """Return nothing."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:  # noqa: ARG002
        """Return an event with the text so far."""
        self._text += delta.text
        self._num_tokens = delta.num_tokens
        if not self._stream:
            return b""
        return event({"status": 1, "text": self._text, "n_tokens": self._num_tokens})

    def end(self, index: int, finish_reason: FinishReason, receipt: Receipt) -> bytes:  # noqa: ARG002
        """Return the event with the whole text and the receipt."""
        return event({"status": 0, "text": self._text, "n_tokens": self._num_tokens, "receipt": receipt})

    def close(self, usages: Sequence[Usage]) -> bytes:  # noqa: ARG002
        """Return nothing: status 0 was the last event."""
        return b""

    def whole(self, completions: Sequence[Completion]) -> Any:  # noqa: ARG002
        """Not used: the seed's `stream_chat` is a stream also where it has one event."""
        raise AssertionError("unreachable: stream_chat is always a stream")


def _usage(usages: Sequence[Usage]) -> dict[str, Any]:
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    shown: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    cached = [usage.cached_tokens for usage in usages if usage.cached_tokens is not None]
    if cached:
        shown["prompt_tokens_details"] = {"cached_tokens": sum(cached)}
    return shown


def _chat_logprobs(details: Details | None, logprobs: Sequence[float]) -> list[dict[str, Any]]:
    details = details or Details()
    texts = details.token_texts or ("",) * len(logprobs)
    tops = details.top_logprobs or ((),) * len(logprobs)
    return [
        {
            **_chat_token(text, logprob),
            "top_logprobs": [_chat_token(other, value) for other, value in candidates],
        }
        for text, logprob, candidates in zip(texts, logprobs, tops, strict=True)
    ]


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(_bytes(text))}


def _bytes(token_text: str) -> bytes:
    """Return the bytes of a token that is spelled as in `Details.token_texts`."""
    if not token_text.startswith("bytes:\\x"):
        return token_text.encode()
    return bytes.fromhex(token_text.removeprefix("bytes:").replace("\\x", ""))
