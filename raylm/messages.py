"""Everything that crosses a process boundary, as msgspec structs.

The life of a request in these words: a `Request` goes to an engine, the engine answers with `Delta`s, and the pool adds
them up to a `Completion` with a `Receipt` that says how it came about. Nothing here imports Ray or an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Annotated, Any, Literal

import msgspec

from raylm.errors import InvalidRequestError

_MAX_INT = 2**63 - 1  # what msgpack, and every engine, can hold

FinishReason = Literal["stop", "length", "cancelled"]
"""Why a generation ended: end of sequence or a stop word, the token limit, or its client. A failure is not a finish
reason: failures are raised."""

Lane = Literal["interactive", "batch"]
"""Which queue of the pool a request waits in: `interactive` goes first, `batch` keeps a floor share."""


class Status(IntEnum):
    """What each step of `stream_chat` reports.

    Source: lagent 0.2, `lagent.schema.ModelStatusCode`.
    """

    END = 0
    STREAM_ING = 1
    SESSION_READY = 2
    SERVER_ERR = -1
    SESSION_CLOSED = -2
    SESSION_OUT_OF_LIMIT = -3
    SESSION_INVALID_ARG = -4


RAW_ROLE = "raw"
"""Role of the raw prompts in the transcript of a session that `generate` keeps."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation.

    Attributes:
        role: `system`, `user`, `assistant`, or a role that the meta template defines.
        content: The text.
        name: Who speaks in that role, for meta templates that tell several speakers apart.
    """

    role: str
    content: str
    name: str | None = None


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to generate. Defaults are those of lagent's classes.

    Attributes:
        max_new_tokens: Limit on generated tokens, >= 1; with `echo` also 0, for the prompt alone.
        min_new_tokens: End of sequence is not accepted before this many tokens, >= 0.
        temperature: >= 0; 0 is greedy decoding.
        top_p: In (0, 1]; nucleus of probability mass to sample from.
        top_k: >= 1; how many of the likeliest tokens to sample from. None: no limit.
        repetition_penalty: > 0; 1.0 is none.
        stop_words: Texts that end the generation and are not part of it.
        seed: Seed of the sampling; None lets the engine choose.
        ignore_eos: Go on after the end of sequence, up to `max_new_tokens`.
        logprobs: Also return the log-probability of each generated token, and with `echo` of the prompt's.
        top_logprobs: Also return as many of the likeliest tokens at each place, 0 to 20. Needs `logprobs`.
        echo: Also return the tokens of the prompt.
        presence_penalty: -2 to 2; taken off the score of each token that was generated before. 0 is none.
        frequency_penalty: The same, times how often it was.
        json_schema: The text of a JSON schema that the answer has to match. None: any text.
    """

    max_new_tokens: Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT)] = 512
    min_new_tokens: Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT)] = 0
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.8
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    top_k: Annotated[int, msgspec.Meta(ge=1, le=_MAX_INT)] | None = 40
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    stop_words: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] = ()
    seed: Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT)] | None = None
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] = 0
    echo: bool = False
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] = 0.0
    json_schema: str | None = None

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is taken at every step."""
        return self.temperature == 0 or self.top_k == 1

    def after(self, num_tokens: int, *, left: int) -> GenerationConfig:
        """Return what is to go on after `num_tokens` earlier ones with `left` more at most.

        Fewer tokens are asked for at least, and what is drawn is not what the beginning drew.
        """
        if not self.min_new_tokens and (not num_tokens or self.seed is None):
            return self
        least = min(max(0, self.min_new_tokens - num_tokens), left)
        seed = None if self.seed is None else (self.seed + num_tokens) % (1 << 63)
        return msgspec.structs.replace(self, min_new_tokens=least, seed=seed)

    def updated(self, overrides: Mapping[str, Any]) -> GenerationConfig:
        """Return a copy with `overrides` applied and checked.

        Args:
            overrides: Any of the attributes by name. `stop_words` may be one string, a sequence of them, or None.

        Raises:
            InvalidRequestError: an unknown name, a wrong type or a value out of range. The text names the parameter.
        """
        if not overrides:
            return self
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__struct_fields__}
        if unknown := overrides.keys() - fields.keys():
            raise InvalidRequestError(
                f"unknown parameter {', '.join(sorted(unknown))}; generation parameters are {', '.join(fields)}"
            )
        fields.update(overrides)
        words = fields["stop_words"]
        fields["stop_words"] = () if words is None else (words,) if isinstance(words, str) else words
        try:
            config = msgspec.convert(fields, GenerationConfig)
        except msgspec.ValidationError as error:
            raise InvalidRequestError(_explain(error, fields)) from None
        try:
            "".join(config.stop_words).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(f"stop_words: not valid Unicode: {error}") from None
        if config.min_new_tokens > config.max_new_tokens:
            raise InvalidRequestError(
                f"min_new_tokens is {config.min_new_tokens}, more than max_new_tokens {config.max_new_tokens}"
            )
        if not config.max_new_tokens and not config.echo:
            raise InvalidRequestError("max_new_tokens: expected `int` >= 1, or echo=True, got 0")
        if config.top_logprobs and not config.logprobs:
            raise InvalidRequestError("top_logprobs: needs logprobs=True")
        return config


def _explain(error: msgspec.ValidationError, fields: Mapping[str, Any]) -> str:
    """Turn msgspec's "Expected ... - at `$.top_p`" into a sentence that shows the value."""
    reason, _, path = str(error).partition(" - at `$.")
    name = path.rstrip("`").partition("[")[0]
    reason = reason.partition(", got")[0]  # msgspec names the type where the value tells more
    value = f", got {fields[name]!r}" if name in fields else ""
    return f"{name or 'generation parameters'}: {reason[:1].lower()}{reason[1:]}{value}"


class Generated(msgspec.Struct, frozen=True, omit_defaults=True):
    """What earlier attempts of a request produced. The engine continues after it and counts it as generated.

    Attributes:
        text: The text already delivered.
        token_ids: Every token generated so far, length `num_tokens`, or empty where the engine did not tell.
        num_tokens: How many tokens that was.
    """

    text: str
    token_ids: list[int]
    num_tokens: int


class Request(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One generation. Exactly one of `prompt`, `prompt_token_ids` and `messages` is set.

    Attributes:
        request_id: Chosen by the client, unique among its running requests.
        prompt: Raw text; no template is applied.
        prompt_token_ids: The model's tokens, taken as they are.
        messages: A conversation; the engine applies its model's own chat template.
        config: How to generate.
        stream: True to see deltas as they are produced. False lets the actor hold them back: at most four a second
            leave it before the last.
        generated: What earlier attempts produced, when this one continues them.
        session_id: The session that this is a turn of, for engines whose back end can keep state between turns. The
            prompt or the messages are whole all the same.
        session_end: No turn of that session follows.
    """

    request_id: str
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    config: GenerationConfig = GenerationConfig()
    stream: bool = True
    generated: Generated | None = None
    session_id: str | None = None
    session_end: bool = True


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token counts of one generation.

    Attributes:
        prompt_tokens: Tokens of the prompt, template included.
        completion_tokens: Tokens generated, those of continued attempts included.
        cached_tokens: Prompt tokens that the engine's prefix cache already held; None where the engine does not tell.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


Candidates = tuple[tuple[str, float], ...]
"""The likeliest tokens at one place, the likeliest first: text and log-probability of each. A text is spelled as in
`Details.token_texts`."""


class Details(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    r"""What is told of tokens beyond their text. Each tuple has an entry for each token, or is empty.

    Attributes:
        token_texts: Text of each of the delta's `token_ids`. One that is no whole characters by itself is spelled
            `bytes:\xe2\x82`, with the value of each byte; one that has no text, such as a special token, is "".
        top_logprobs: As many candidates for each of them as `GenerationConfig.top_logprobs` says.
        prompt_token_ids: The prompt's tokens. With `echo` they are in the request's first delta, and in no other.
        prompt_token_texts: The text of each.
        prompt_logprobs: The log-probability of each, after those before it. Nothing is before the first; its own says
            nothing and is 0.0.
        prompt_top_logprobs: The candidates for each; none for the first.
    """

    token_texts: tuple[str, ...] = ()
    top_logprobs: tuple[Candidates, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    prompt_token_texts: tuple[str, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top_logprobs: tuple[Candidates, ...] = ()

    def __add__(self, later: Details) -> Details:
        """Return what this and the delta that followed tell together."""
        return Details(
            self.token_texts + later.token_texts,
            self.top_logprobs + later.top_logprobs,
            self.prompt_token_ids + later.prompt_token_ids,
            self.prompt_token_texts + later.prompt_token_texts,
            self.prompt_logprobs + later.prompt_logprobs,
            self.prompt_top_logprobs + later.prompt_top_logprobs,
        )


def is_part(request_id: str, whole: str) -> bool:
    """Return whether an id is that of a request, or of one of its parts, whose ids go on with `/` and a number."""
    return request_id == whole or request_id.startswith(f"{whole}/")


class Delta(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one request produced since its previous delta.

    Attributes:
        text: New text only, whole characters, never a stop word or a part of one. May be empty.
        num_tokens: Tokens generated so far, those of continued attempts included. One of which text is held back is
            counted with that text, or with the last delta.
        token_ids: Those tokens' ids, or empty where the engine does not tell.
        logprobs: Log-probability of each of `token_ids`, if asked for.
        finish_reason: Set on the last delta alone.
        usage: Set on the last delta alone.
        details: What else there is to tell of tokens; None unless `logprobs` or `echo` asked for it.
    """

    # Tuples, because an empty one costs nothing: a pool keeps all deltas of the requests that are running.
    text: str
    num_tokens: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    details: Details | None = None  # one field for all of it, because nearly every delta has none

    def extend(self, later: Delta) -> None:
        """Append the delta that followed this one, in place."""
        self.text += later.text
        self.num_tokens = later.num_tokens
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.usage = later.usage
        if later.details is not None:
            self.details = later.details if self.details is None else self.details + later.details


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of itself once it has started.

    Attributes:
        engine: Its kind: `openvino`, `simulated`, ...
        engine_version: The version of the library behind it.
        model: Name of the model it serves.
        max_context: Prompt and generated tokens together, at most.
        capacity: How many requests it works on at a time; more would only wait inside it.
        device: Where it computes, for people.
        fingerprint: Digest of the model's files and of what else decides its answers; "" where the engine cannot tell.
    """

    engine: str
    engine_version: str
    model: str
    max_context: int
    capacity: int
    device: str
    fingerprint: str = ""


class EngineStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's load at one moment.

    Attributes:
        num_running: Requests inside the engine.
        num_tokens: Tokens generated since it started.
        cache_usage: Share of the KV cache in use, 0 to 1; None where the engine does not tell.
    """

    num_running: int
    num_tokens: int
    cache_usage: float | None = None


class Receipt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an answer came about.

    Attributes:
        slot: Number of the slot that finished it.
        actor: Id of the actor in that slot.
        node: Host name of the actor's node.
        why: Why that slot: `least-loaded`, `pinned`, or `moved:<cause>` when an earlier attempt was lost.
        queue_ms: Time in the pool's queue, all attempts together.
        attempts: How many actors worked on it.
        usage: Token counts.
        engine: The engine's kind.
        engine_version: The version of the library behind it.
        model: The model that answered.
        fingerprint: As in `EngineInfo`.
    """

    slot: int
    actor: str
    node: str
    why: str
    queue_ms: float
    attempts: int
    usage: Usage
    engine: str
    engine_version: str
    model: str
    fingerprint: str = ""


class Completion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A whole answer.

    Attributes:
        request_id: The request's.
        text: All of the text.
        finish_reason: Why it ended.
        usage: Token counts.
        receipt: How it came about.
        token_ids: Generated token ids, or empty where the engine does not tell.
        logprobs: Log-probability of each of `token_ids`, if asked for.
        details: What else there is to tell of tokens; None unless `logprobs` or `echo` asked for it.
    """

    request_id: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    receipt: Receipt
    token_ids: list[int] = []
    logprobs: list[float] = []
    details: Details | None = None
