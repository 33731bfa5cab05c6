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
from raylm.statistics import ModelState

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": heartbeat\n\n"

FILES_PATH = "/v1/files"

MAX_INT = 2**63 - 1
"""The highest integer that messages hold."""

_TOP_LOGPROBS = 20
_MAX_MESSAGES = 10_000

Name = Annotated[str, Field(min_length=1, max_length=200)]

RequestId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[!-.0-~]+$")]
"""Visible ASCII, because it is in a header of the answer; no `/`, which is between it and the number of a part."""

SessionId = Name | Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]

StopWords = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, max_length=64)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _example(body: dict[str, Any]) -> ConfigDict:
    """Return the settings of a body for which `/docs` has an example."""
    return ConfigDict(json_schema_extra={"examples": [body]})


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
    model: Name | None = Field(None, description="Which model; may be left out where only one is served.")
    session_id: SessionId | None = Field(
        None, description="Keeps requests of one name on one actor. See sequence_start for sessions with a transcript."
    )
    request_id: RequestId | None = Field(None, description="Names this request in logs and for cancelling it.")


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = Field(False, description="End with one more chunk that has the usage of all choices.")


class _OpenAI(_Session):
    """What both of OpenAI's routes take."""

    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="With `stream` only.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: StopWords | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    ignore_eos: bool = False
    user: Name | None = Field(None, description="Written into the log.")
    sequence_start: bool | None = Field(
        None, description="Given: this is a turn of a session whose transcript the server keeps; true begins it."
    )
    sequence_end: bool | None = Field(None, description="Given as well: true forgets the session after this turn.")

    @property
    def is_turn(self) -> bool:
        """Whether this is a turn of a session whose transcript is kept here."""
        return self.sequence_start is not None or self.sequence_end is not None

    def _parameters(self) -> dict[str, Any]:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options: needs stream to be true")
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
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=_MAX_MESSAGES)]
    name: str | None = None
    type: Literal["text"] | None = Field(None, description="Some evaluation tools send it; it says nothing.")

    def to_message(self) -> Message:
        """Return it as it crosses processes."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(self.role, content, self.name)


Messages = Annotated[list[ChatMessage], Field(fail_fast=True, max_length=_MAX_MESSAGES)]

Texts = Annotated[list[str], Field(fail_fast=True)]

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_INT)]], Field(fail_fast=True)]


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

    model_config = _example(
        {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32}
    )

    messages: Annotated[Messages, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
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

    model_config = _example({"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0})

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=_TOP_LOGPROBS)] | None = None
    echo: bool | None = False
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
                "echo": bool(self.echo),
            }
        )


class _Seed(_Session):
    """What the routes with the seed's words take."""

    sequence_start: bool = Field(
        True,
        description="Begin the session, in place of one of that id. A session that only the header x-session-id names "
        "has a transcript where this or sequence_end is given.",
    )
    sequence_end: bool = Field(True, description="Forget the session when the turn is over.")
    timeout: Annotated[float, Field(gt=0)] | None = Field(30, description="Seconds in which nothing happens, at most.")
    ignore_eos: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop_words: StopWords | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None

    @property
    def is_turn(self) -> bool:
        """Whether this is a turn of a session whose transcript is kept here, if it is one of a session at all."""
        return self.session_id is not None or not self.model_fields_set.isdisjoint({"sequence_start", "sequence_end"})

    def to_config(self) -> GenerationConfig:
        """Return how to generate; what is not said, or null, is as in the seed's classes. `top_k` may be null."""
        names = set(GenerationConfig.__struct_fields__) & self.model_fields_set
        given = {name: getattr(self, name) for name in names}
        return GenerationConfig().updated(
            {name: value for name, value in given.items() if value is not None or name == "top_k"}
        )


class GenerateBody(_Seed):
    """Body of `POST /generate`."""

    model_config = _example({"inputs": ["Once upon a time", "In the beginning"], "max_new_tokens": 16})

    inputs: str | Texts


class StreamChatBody(_Seed):
    """Body of `POST /stream_chat`."""

    model_config = _example({"inputs": "My dog is called Rex.", "session_id": 1, "sequence_end": False})

    inputs: str | ChatMessage | Messages
    stream: bool = Field(True, description="False: one event, at the end.")

    def to_messages(self) -> tuple[Message, ...]:
        """Return the messages of this turn."""
        if isinstance(self.inputs, str):
            return (Message("user", self.inputs),)
        inputs = [self.inputs] if isinstance(self.inputs, ChatMessage) else self.inputs
        return tuple(message.to_message() for message in inputs)


class TokenizeBody(_Body):
    """Body of `POST /tokenize`."""

    model_config = _example({"prompt": "The capital of France is"})

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None


class ForkBody(_Body):
    """Body of `POST /sessions/{id}/fork`."""

    model_config = _example({"session_id": "a-copy"})

    session_id: SessionId
    model: Name | None = None


class ExpiresAfter(_Body):
    """When a file is deleted by itself."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=30 * 24 * 3600)]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
"""Where the rows of a batch would go if each were sent alone."""


class BatchBody(_Body):
    """Body of `POST /v1/batches`."""

    model_config = _example(
        {"input_file_id": "file-0123", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    )

    input_file_id: Name
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = Field(None, description="Of the output and of the error file.")


class UploadForm(_Body):
    """The fields of `POST /v1/files` but for the file."""

    purpose: Literal["batch"]
    expires_after: ExpiresAfter | None = None


# Answers


class ModelCard(msgspec.Struct):
    """A model that is served."""

    id: str
    max_model_len: int | None
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "raylm"


class ModelList(msgspec.Struct):
    """The models that are served."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


class Generated(msgspec.Struct):
    """An answer of `POST /generate`."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    receipt: Receipt


class GeneratedList(msgspec.Struct):
    """The answer or the error of each of several prompts, in their order."""

    results: list[Any]


class CachedTokens(msgspec.Struct):
    """What the engine's prefix cache held."""

    cached_tokens: int


class TotalUsage(msgspec.Struct, omit_defaults=True):
    """Token counts of all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class Candidate(msgspec.Struct):
    """A token, its log-probability, and the bytes of its text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Candidate):
    """A generated token, and the likeliest ones at its place."""

    top_logprobs: list[Candidate]


class ChatLogprobs(msgspec.Struct):
    """What is told of the tokens of a chat answer."""

    content: list[ChatToken]


class AssistantMessage(msgspec.Struct):
    """What the model said."""

    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(msgspec.Struct):
    """One of `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(msgspec.Struct):
    """OpenAI's chat completion; `raylm` has a receipt for each choice."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TotalUsage
    raylm: list[Receipt]
    object: Literal["chat.completion"] = "chat.completion"


class TextLogprobs(msgspec.Struct):
    """What is told of the tokens of a text, column by column. Nothing comes before the first token of a prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    """One text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(msgspec.Struct):
    """OpenAI's text completion; `raylm` has a receipt for each choice."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: TotalUsage
    raylm: list[Receipt]
    object: Literal["text_completion"] = "text_completion"


class Tokens(msgspec.Struct):
    """The tokens of a prompt."""

    tokens: list[int]
    count: int
    max_model_len: int | None


class Transcript(msgspec.Struct):
    """A session."""

    session_id: str
    model: str
    slot: int
    messages: tuple[Message, ...]


class SessionEnded(msgspec.Struct):
    """A session that is forgotten."""

    session_id: str
    ended: bool = True


class SessionForked(msgspec.Struct):
    """A new session with the transcript of another."""

    session_id: str
    model: str
    slot: int


class Cancelled(msgspec.Struct):
    """A request that is cancelled: `asked` where another gateway has it, if any has."""

    request_id: str
    cancelled: Literal["asked"] | bool


class FileObject(msgspec.Struct, kw_only=True):
    """A file: one that was uploaded, or what a batch has made."""

    id: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Literal["batch", "batch_output"]
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class FileList(msgspec.Struct):
    """Some of the files."""

    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class FileDeleted(msgspec.Struct):
    """A file that is gone."""

    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


class BatchError(msgspec.Struct):
    """Why a batch was not begun: what is wrong with its file, and in which line, counted from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(msgspec.Struct):
    """The first of what is wrong with a file."""

    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct):
    """How many rows of a batch were answered, and how many have failed."""

    total: int = 0
    completed: int = 0
    failed: int = 0


BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class Batch(msgspec.Struct, kw_only=True):
    """A batch. Times are in seconds since 1970; those that have not come are null."""

    id: str
    endpoint: Endpoint
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus = "validating"
    model: str | None = None
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None
    object: Literal["batch"] = "batch"


class BatchList(msgspec.Struct):
    """Some of the batches, the latest first."""

    data: list[Batch]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class Health(msgspec.Struct):
    """Every model has an actor."""

    status: Literal["ok"] = "ok"


class State(msgspec.Struct):
    """What all gateways and other clients do with the models."""

    models: list[ModelState]


_FIELDS = {"prompt_token_ids": "prompt", "json_schema": "response_format"}
"""What is called otherwise on the wire, wherever it is there."""

_COMPLETION_FIELDS = _FIELDS | {"top_logprobs": "logprobs"}
"""The same of a text completion, where one field asks for log-probabilities and says how many."""


def error_body(error: RaylmError, param: str | None = None, *, path: str = "") -> dict[str, Any]:
    """Return the JSON of an error.

    Args:
        error: What went wrong. The field it names, where it names one, is what its text begins with.
        param: The field, where it is known already.
        path: Where the request went, whose body may have a name of its own for a field.
    """
    message = error.message
    if param is None and (found := re.match(r"([a-z_]+)(\[\d+\])?: ", message)):
        fields = _COMPLETION_FIELDS if path.endswith("/v1/completions") else _FIELDS
        param = fields.get(found[1], found[1])
        message = param + message[found.end(1) :]
    kind = type(error)
    return {"error": {"message": message, "type": kind.__name__, "param": param, "code": kind.status_code}}


BUG: dict[str, Any] = {
    "message": "the gateway failed; its log says why",
    "type": "InternalError",
    "param": None,
    "code": 500,
}
"""What a client is told of an error that nobody has foreseen."""


def event(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _encode(value) + b"\n\n"


def error_event(error: Exception) -> bytes:
    """Return the event that ends a stream which cannot go on."""
    return b"event: error\n" + event(error_body(error) if isinstance(error, RaylmError) else {"error": BUG})


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

    def __init__(self, answer_id: str, model: str, *, include_usage: bool) -> None:
        self._id = answer_id
        self._model = model
        self._created = int(time.time())
        self._include_usage = include_usage
        # A chunk with text is the hot path: all of it but index and text is the same each time.
        self._head = event(self._chunk([{"index": 0}])).rpartition(b"0}]}")[0]

    def _chunk(self, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
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


class ChatWire(_OpenAIWire):
    """OpenAI's chat completions."""

    _streamed = "chat.completion.chunk"

    def __init__(self, answer_id: str, model: str, *, include_usage: bool, logprobs: bool) -> None:
        super().__init__(answer_id, model, include_usage=include_usage)
        self._logprobs = logprobs

    def begin(self, index: int) -> bytes:
        """Return the chunk with the role."""
        return event(
            self._chunk([{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """Return a chunk; none for a delta without text."""
        if self._logprobs:
            choice = {
                "index": index,
                "delta": {"content": delta.text},
                "logprobs": _chat_logprobs(delta.details, delta.logprobs),
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
            ChatChoice(
                index,
                AssistantMessage(completion.text),
                _chat_logprobs(completion.details, completion.logprobs) if self._logprobs else None,
                completion.finish_reason,
            )
            for index, completion in enumerate(completions)
        ]
        return ChatCompletion(self._id, self._created, self._model, choices, *_totals(completions))


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

    def begin(self, index: int) -> bytes:  # noqa: ARG002 - chat has something to say here
        """Return nothing."""
        return b""

    def delta(self, index: int, delta: Delta) -> bytes:
        """Return a chunk; none for a delta without text."""
        if self._logprobs or self._echo:
            return event(self._chunk([self._choice(index, delta.text, delta.details, delta.logprobs, None)]))
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
            self._choice(index, completion.text, completion.details, completion.logprobs, completion.finish_reason)
            for index, completion in enumerate(completions)
        ]
        return TextCompletion(self._id, self._created, self._model, choices, *_totals(completions))

    def _choice(
        self,
        index: int,
        text: str,
        details: Details | None,
        logprobs: Sequence[float],
        finish_reason: FinishReason | None,
    ) -> TextChoice:
        details = details or Details()
        prompt_texts = details.prompt_token_texts if self._echo else ()
        if self._echo and prompt_texts:
            spelled = self._prompts[index]
            text = (b"".join(map(_bytes, prompt_texts)).decode(errors="replace") if spelled is None else spelled) + text
        if not self._logprobs:
            return TextChoice(index, text, None, finish_reason)
        tokens = [*prompt_texts, *(details.token_texts or ("",) * len(logprobs))]  # some servers do not spell them
        values: list[float | None] = [*details.prompt_logprobs[: len(prompt_texts)], *logprobs]
        tops: list[dict[str, float] | None] = [
            dict(candidates)
            for candidates in (*details.prompt_top_logprobs[: len(prompt_texts)], *details.top_logprobs)
        ]
        if prompt_texts:
            values[0] = None  # nothing comes before the first token
            if tops:
                tops[0] = None
        begin = self._offsets[index]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(_bytes(token).decode(errors="replace"))
        if not details.token_texts:
            self._offsets[index] = begin + len(text)
        return TextChoice(index, text, TextLogprobs(tokens, values, tops or None, offsets), finish_reason)


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


def _totals(completions: Sequence[Completion]) -> tuple[TotalUsage, list[Receipt]]:
    return _usage([completion.usage for completion in completions]), [completion.receipt for completion in completions]


def _usage(usages: Sequence[Usage]) -> TotalUsage:
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    cached = [usage.cached_tokens for usage in usages if usage.cached_tokens is not None]
    return TotalUsage(prompt, completion, prompt + completion, CachedTokens(sum(cached)) if cached else None)


def _chat_logprobs(details: Details | None, logprobs: Sequence[float]) -> ChatLogprobs:
    details = details or Details()
    texts = details.token_texts or ("",) * len(logprobs)
    tops = details.top_logprobs or ((),) * len(logprobs)
    return ChatLogprobs(
        [
            ChatToken(text, logprob, list(_bytes(text)), [_candidate(*candidate) for candidate in candidates])
            for text, logprob, candidates in zip(texts, logprobs, tops, strict=True)
        ]
    )


def _candidate(text: str, logprob: float) -> Candidate:
    return Candidate(text, logprob, list(_bytes(text)))


def _bytes(token_text: str) -> bytes:
    """Return the bytes of a token that is spelled as in `Details.token_texts`."""
    if not token_text.startswith("bytes:\\x"):
        return token_text.encode()
    return bytes.fromhex(token_text.removeprefix("bytes:").replace("\\x", ""))
