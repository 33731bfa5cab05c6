"""What an HTTP server understands, and how a request is said to it. Pure: no I/O.

The same parameter has another name, or none, at each server that speaks OpenAI's protocol. Servers say in their
`/openapi.json` which fields each route takes; where they say nothing, their kind tells. A parameter that a server would
pass over in silence is an error here.

    what the request is             where it goes
    a raw prompt, token ids         /v1/completions
    ... at lmdeploy 0.18            /generate, which tells the token ids; it takes no seed
    ... that needs what both lack   /v1/chat/completions with token ids instead of messages (lmdeploy 0.18)
    messages                        /v1/chat/completions
    ... at lmdeploy before 0.5      /v1/chat/interactive, stateless: its streams alone tell token counts there
    what tokens a prompt has        /tokenize, at lmdeploy /v1/encode
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from raylm.errors import InvalidRequestError, ProtocolError, UpstreamError
from raylm.messages import Candidates, FinishReason, GenerationConfig, Message, Request

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
INTERACTIVE = "/v1/chat/interactive"
GENERATE = "/generate"
ENCODE = "/v1/encode"
TOKENIZE = "/tokenize"

Kind = Literal["lmdeploy", "vllm", "sglang", "openai"]

# Taken to be known where a server does not say.
_OPENAI_FIELDS = frozenset(
    {"max_tokens", "temperature", "top_p", "stop", "seed", "stream_options", "presence_penalty", "frequency_penalty"}
)
_EXTENSIONS: dict[Kind, frozenset[str]] = {
    "lmdeploy": frozenset({"top_k", "repetition_penalty", "ignore_eos"}),
    "vllm": frozenset({"top_k", "repetition_penalty", "ignore_eos", "min_tokens"}),
    "sglang": frozenset({"top_k", "repetition_penalty", "ignore_eos", "min_tokens"}),
    "openai": frozenset(),
}

_SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>")  # "<|im_end|>", "</s>", "<end_of_turn>"

_FINISH_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "stop",
    "function_call": "stop",
    # Source: text-generation-inference 3, `FinishReason`.
    "eos_token": "stop",
    "stop_sequence": "stop",
}


@dataclass(frozen=True)
class Server:
    """What a server said of itself.

    Attributes:
        kind: Whose server it is; `openai` when it is none of the others.
        version: Its version, or "unknown".
        models: The models that it serves; LoRA adapters are among them.
        max_context: The first model's limit; None where the server does not tell.
        paths: Its routes; empty where it does not tell.
        fields: Fields of a route's body, for routes of which the server tells them.
    """

    kind: Kind
    version: str
    models: tuple[str, ...]
    max_context: int | None
    paths: frozenset[str]
    fields: Mapping[str, frozenset[str]]

    def fields_of(self, path: str) -> frozenset[str]:
        """Return the fields that a route understands."""
        known = self.fields.get(path)
        if known is None:
            return _OPENAI_FIELDS | _EXTENSIONS[self.kind] | ({"response_format"} if path == CHAT else frozenset())
        return known

    @property
    def interactive(self) -> bool:
        """Whether messages go to `/v1/chat/interactive`."""
        return INTERACTIVE in self.paths and CHAT in self.fields and "stream_options" not in self.fields[CHAT]

    @property
    def takes_token_ids(self) -> bool:
        """Whether `/v1/chat/completions` takes token ids, and `/v1/encode` gives them."""
        return ENCODE in self.paths and "input_ids" in self.fields_of(CHAT)

    @property
    def health_path(self) -> str:
        """The route that tells whether the server works."""
        return "/health" if self.kind != "openai" or "/health" in self.paths else "/v1/models"


def describe(models: object, openapi: object, version: object) -> Server:
    """Make sense of what a server said.

    Args:
        models: Answer of `/v1/models`.
        openapi: Answer of `/openapi.json`; None when it has none.
        version: Answer of `/version`; None when it has none.

    Raises:
        ProtocolError: `models` is no list of models.
    """
    try:
        cards = msgspec.convert(models, _ModelList).data
    except msgspec.ValidationError as error:
        raise ProtocolError(f"/v1/models is no list of models: {error}") from None
    if not cards:
        raise ProtocolError("/v1/models lists no model")
    owner = cards[0].owned_by
    kind: Kind = owner if owner in ("lmdeploy", "vllm", "sglang") else "openai"  # type: ignore[assignment]
    paths, fields = _parse_openapi(openapi)
    return Server(
        kind=kind,
        version=str(version["version"]) if isinstance(version, dict) and "version" in version else "unknown",
        models=tuple(card.id for card in cards),
        max_context=cards[0].max_model_len,
        paths=paths,
        fields=fields,
    )


class _ModelCard(msgspec.Struct):
    id: str
    owned_by: str = ""
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


def _parse_openapi(document: object) -> tuple[frozenset[str], dict[str, frozenset[str]]]:
    """Return the paths, and the fields of each body that has a schema. What is not there, or odd, is passed over."""
    paths = _get(document, "paths")
    fields: dict[str, frozenset[str]] = {}
    for path, operations in paths.items():
        schema = _get(operations, "post", "requestBody", "content", "application/json", "schema")
        reference = schema.get("$ref")
        if isinstance(reference, str):
            schema = _get(document, *reference.removeprefix("#/").split("/"))
        if properties := _get(schema, "properties"):
            fields[path] = frozenset(properties)
    return frozenset(paths), fields


def _get(value: object, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


@dataclass
class Call:
    """One request as a server understands it.

    Attributes:
        path: The route.
        body: What it is sent.
        skip: Text at the beginning of the answer that the client has already.
        num_before: Tokens generated before the answer's first one.
        encode: Text whose token ids are to be put into `body` as `input_ids`; None: nothing is missing.
    """

    path: str
    body: dict[str, Any]
    skip: str = ""
    num_before: int = 0
    encode: str | None = None

    def counting(self) -> Call:
        """Return a call whose answer tells the number of the prompt's tokens, and nothing else worth knowing."""
        if self.path == INTERACTIVE:
            shown = {**self.body, "stream": False, "request_output_len": 1}
        else:
            dropped = ("stream_options", "min_new_tokens", "min_tokens", "return_logprob", "logprobs")
            shown = {name: value for name, value in self.body.items() if name not in dropped}
            shown |= {"stream": False, "max_tokens" if "max_tokens" in shown else "max_completion_tokens": 1}
        return Call(self.path, shown, encode=self.encode)


def plan(server: Server, model: str, request: Request, *, repeat: bool = True) -> Call:
    """Say `request` as `server` understands it.

    A raw prompt is continued by adding what was generated, token ids by adding those. A conversation is continued
    within its last message where the server does that. Where it does not, or where that would be another answer, the
    answer is generated again from its start, and `Call.skip` is what the client has of it already.

    Args:
        server: What it said of itself.
        model: Which of its models.
        request: What to generate.
        repeat: Whether to generate again what could be continued, though not exactly.

    Raises:
        InvalidRequestError: the server cannot honour a parameter; the text names it.
        UpstreamError: the answer cannot be continued exactly: the server does not continue messages, and a sampled
            answer is another one each time.
    """
    config, generated = request.config, request.generated
    if config.echo:
        raise InvalidRequestError("echo: raylm does not ask a server for the tokens of the prompt; leave it out")
    if generated and repeat and _penalty_forgets(server, config) and _is_repeatable(config):
        call = plan(server, model, msgspec.structs.replace(request, generated=None))
        call.skip = generated.text
        return call
    if request.messages is None:
        return _plan_raw(server, model, request)
    messages = [_message(message) for message in request.messages]
    if server.interactive:
        if generated:
            _check_repeatable(config)
        skip = generated.text if generated else ""
        return Call(INTERACTIVE, {"prompt": messages, **_interactive_parameters(config)}, skip)
    if generated is None or not (generated.num_tokens or generated.text):
        return Call(CHAT, {"model": model, "messages": messages, **_parameters(server, CHAT, config, 0)})
    fields = server.fields_of(CHAT)
    # Chat templates trim messages, so that a text with white space at its ends would not be continued where it ends.
    # A JSON schema is begun anew with each answer.
    trimmed = generated.text == generated.text.strip() != ""
    if trimmed and request.messages[-1].role != "assistant" and config.json_schema is None:
        extra: dict[str, bool] | None = None
        if "continue_final_message" in fields:
            # Source: vllm 0.11, `ChatCompletionRequest.continue_final_message`.
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        elif server.kind == "lmdeploy" and "input_ids" in fields:
            # Source: lmdeploy 0.18.0, `HFChatTemplate.messages2prompt`: a last message of the assistant stays open.
            extra = {}
        if extra is not None:
            parameters = _parameters(server, CHAT, config, generated.num_tokens)
            messages.append({"role": "assistant", "content": generated.text})
            body = {"model": model, "messages": messages, **parameters, **extra}
            return Call(CHAT, body, "", generated.num_tokens)
    _check_repeatable(config)
    body = {"model": model, "messages": messages, **_parameters(server, CHAT, config, 0)}
    return Call(CHAT, body, generated.text)


def _plan_raw(server: Server, model: str, request: Request) -> Call:
    config, generated, ids = request.config, request.generated, request.prompt_token_ids
    skip, num_before = "", 0
    if generated is not None and (generated.num_tokens or generated.text):
        if config.json_schema is not None or (ids is not None and not generated.token_ids):
            _check_repeatable(config)
            skip, generated = generated.text, None
        else:
            num_before = generated.num_tokens
    routes = list(_raw_routes(server, model, token_ids=ids is not None))
    if not routes:
        raise InvalidRequestError("prompt_token_ids: no route of the server takes them; send a prompt")
    path = next((path for path in routes if _honours(server, path, config)), routes[0])
    body = _parameters(server, path, config, num_before)
    if path != GENERATE:
        body["model"] = model
    if path == CHAT:
        body["messages"] = []
    if ids is None:
        prompt = (request.prompt or "") + (generated.text if generated else "")
        if path == CHAT:
            return Call(path, body, skip, num_before, encode=prompt)
        body["prompt"] = prompt
    else:
        body["prompt" if path == COMPLETIONS else "input_ids"] = [*ids, *(generated.token_ids if generated else ())]
    return Call(path, body, skip, num_before)


def ask_for_tokens(server: Server, model: str, request: Request) -> tuple[str, dict[str, Any]]:
    """Return the route and body that ask for the tokens of a prompt.

    Raises:
        InvalidRequestError: the server cannot tell them.
    """
    if ENCODE in server.paths and request.messages is None:
        return ENCODE, {"input": request.prompt}
    if TOKENIZE in server.paths:
        # Source: vllm 0.11, `TokenizeCompletionRequest`, `TokenizeChatRequest`. sglang's has the first alone.
        if request.messages is None:
            return TOKENIZE, {"model": model, "prompt": request.prompt}
        if server.kind == "vllm":
            return TOKENIZE, {"model": model, "messages": [_message(message) for message in request.messages]}
    what = "a prompt" if request.messages is None else "messages"
    raise InvalidRequestError(f"the server cannot count tokens of {what}; ask another engine")


def _penalty_forgets(server: Server, config: GenerationConfig) -> bool:
    """Return whether a continued answer would not be penalised for the tokens of its earlier attempt.

    They are part of the prompt then, of which lmdeploy's PyTorch engine penalises none.
    Source: lmdeploy 0.18.0, `pytorch.strategies.ar.sampling._gather_generated_ids`.
    """
    return server.kind == "lmdeploy" and config.repetition_penalty != 1


def _is_repeatable(config: GenerationConfig) -> bool:
    return config.greedy or config.seed is not None


def _check_repeatable(config: GenerationConfig) -> None:
    if not _is_repeatable(config):
        raise UpstreamError(
            "the answer could not be continued exactly: the server would begin it anew, and a sampled answer is "
            "another one each time. Set temperature to 0, a seed, or a meta_template, which makes messages one "
            "raw prompt"
        )


def _message(message: Message) -> dict[str, str]:
    shown = {"role": message.role, "content": message.content}
    if message.name is not None:
        shown["name"] = message.name
    return shown


def _raw_routes(server: Server, model: str, *, token_ids: bool) -> Iterator[str]:
    """Yield the routes that take a raw prompt, the one that tells most first."""
    generate = server.fields_of(GENERATE)
    # sglang has a route of this name for something else. Adapters cannot be named there.
    needed = {"return_logprob", "input_ids"} if token_ids else {"return_logprob"}
    if server.kind == "lmdeploy" and needed <= generate and model == server.models[0]:
        yield GENERATE
    if not token_ids or server.kind != "lmdeploy":  # which takes a list for several prompts
        yield COMPLETIONS
    if server.takes_token_ids:
        yield CHAT


def _honours(server: Server, path: str, config: GenerationConfig) -> bool:
    """Return whether a route can do what not every route of a server can."""
    fields = server.fields_of(path)
    return (
        (not config.min_new_tokens or not fields.isdisjoint({"min_new_tokens", "min_tokens"}))
        and (not config.logprobs or _tells_logprobs(path, fields))
        and (config.seed is None or config.greedy or "seed" in fields)
        and (config.json_schema is None or "response_format" in fields)
    )


def _tells_logprobs(path: str, fields: frozenset[str]) -> bool:
    # They belong to token ids, so a route that does not tell those is of no use.
    return (path == GENERATE or "return_token_ids" in fields) and not fields.isdisjoint({"return_logprob", "logprobs"})


def _parameters(server: Server, path: str, config: GenerationConfig, num_before: int) -> dict[str, Any]:
    """Return `config` as fields of a route's body."""
    left = config.max_new_tokens - num_before
    config = config.after(num_before, left=left)
    fields = server.fields_of(path)
    limit = "max_tokens" if "max_tokens" in fields else "max_completion_tokens"
    body: dict[str, Any] = {"stream": True, limit: left}

    def refuse(parameter: str, neutral: str) -> None:
        raise InvalidRequestError(
            f"{parameter}: the server's {path} cannot honour it; set it to {neutral}, or use another engine"
        )

    if config.greedy and server.kind == "lmdeploy" and "top_k" in fields:
        # How lmdeploy itself asks for it; not each of its versions takes a temperature of 0.
        body |= {"top_k": 1, "temperature": 1.0, "top_p": 1.0}
    elif config.greedy:
        body |= {"temperature": 0.0, "top_p": 1.0}
    else:
        body |= {"temperature": config.temperature, "top_p": config.top_p}
        if "top_k" in fields:
            unlimited = 0 if server.kind == "lmdeploy" else -1
            body["top_k"] = unlimited if config.top_k is None else config.top_k
        elif config.top_k is not None:
            refuse("top_k", "None")
        if config.seed is not None:
            if "seed" not in fields:
                refuse("seed", "None")
            body["seed"] = config.seed
    if "repetition_penalty" in fields:
        body["repetition_penalty"] = config.repetition_penalty
    elif config.repetition_penalty != 1:
        refuse("repetition_penalty", "1.0")
    for name, value in (
        ("presence_penalty", config.presence_penalty),
        ("frequency_penalty", config.frequency_penalty),
    ):
        if value:
            # lmdeploy takes them and does nothing. Source: lmdeploy 0.18.0, `serve.openai.endpoints`.
            if server.kind == "lmdeploy" or name not in fields:
                refuse(name, "0")
            body[name] = value
    if config.json_schema is not None:
        if "response_format" not in fields:
            refuse("json_schema", "None")
        body["response_format"] = _response_format(config.json_schema)
    if config.ignore_eos:
        if "ignore_eos" not in fields:
            refuse("ignore_eos", "False")
        body["ignore_eos"] = True
    if config.min_new_tokens:
        names = [name for name in ("min_new_tokens", "min_tokens") if name in fields]
        if not names:
            refuse("min_new_tokens", "0")
        body[names[0]] = config.min_new_tokens
    if stop_words := _stop_words(server.kind, config):
        body["stop"] = stop_words
    if "return_token_ids" in fields:
        body["return_token_ids"] = True
    if config.logprobs:
        if not _tells_logprobs(path, fields):
            refuse("logprobs", "False")
        if "return_logprob" in fields:
            # Beside ids, not texts: those of lmdeploy are as its tokenizer stores them.
            if config.top_logprobs:
                refuse("top_logprobs", "0")
            body["return_logprob"] = True
        elif path == CHAT:
            body["logprobs"] = True
            if config.top_logprobs:
                if "top_logprobs" not in fields:
                    refuse("top_logprobs", "0")
                body["top_logprobs"] = config.top_logprobs
        else:
            body["logprobs"] = max(1, config.top_logprobs)
    if "stream_options" in fields:
        body["stream_options"] = {"include_usage": True}
        if server.kind in ("vllm", "sglang"):
            body["stream_options"]["continuous_usage_stats"] = True
    return body


def _stop_words(kind: Kind, config: GenerationConfig) -> list[str]:
    """Return the stop words to tell a server. Its client finds all that are text; a special token has none.

    For lmdeploy each token that has such a word in it ends the sequence: the text is cut before the whole token, and
    with `ignore_eos` the token is banned. So it is told of words alone that are special tokens, as far as their form
    says it, and not when it would ban them.

    Source: lmdeploy 0.18.0, `tokenizer.HuggingFaceTokenizer.indexes_containing_token`,
    `pytorch.messages.SamplingParam.from_gen_config`.
    """
    if kind != "lmdeploy":
        return list(config.stop_words)
    return [] if config.ignore_eos else [word for word in config.stop_words if _SPECIAL_TOKEN.fullmatch(word)]


def _response_format(json_schema: str) -> dict[str, Any]:
    try:
        schema = msgspec.json.decode(json_schema)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequestError(f"json_schema: it is no JSON: {error}") from None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def _interactive_parameters(config: GenerationConfig) -> dict[str, Any]:
    """Return `config` as lmdeploy before 0.5 takes it.

    Source: lmdeploy 0.4, `lmdeploy.serve.openai.protocol.GenerateRequest`.
    """
    for parameter, value, neutral in (
        ("seed", config.seed if not config.greedy else None, None),
        ("min_new_tokens", config.min_new_tokens, 0),
        ("logprobs", config.logprobs, False),
        ("presence_penalty", config.presence_penalty, 0),
        ("frequency_penalty", config.frequency_penalty, 0),
        ("json_schema", config.json_schema, None),
    ):
        if value != neutral:
            raise InvalidRequestError(
                f"{parameter}: the server's {INTERACTIVE} cannot honour it; set it to {neutral}, or use a newer server"
            )
    return {
        "session_id": -1,
        "interactive_mode": False,
        "stream": True,
        "request_output_len": config.max_new_tokens,
        "top_k": 1 if config.greedy else config.top_k or 0,
        "temperature": 1.0 if config.greedy else config.temperature,
        "top_p": 1.0 if config.greedy else config.top_p,
        "repetition_penalty": config.repetition_penalty,
        "ignore_eos": config.ignore_eos,
        "stop": _stop_words("lmdeploy", config) or None,
    }


class TokenCounts(msgspec.Struct):
    """`usage` of an answer, as far as a server tells.

    Attributes:
        prompt_tokens: Of the prompt that was sent.
        completion_tokens: Generated for this call so far; 0 where the server does not tell.
        prompt_tokens_details: Has the number of them that a cache held.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """How many of the prompt's tokens a cache held; None where the server does not tell."""
        return None if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens


class _PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Candidate(msgspec.Struct):
    token: str
    logprob: float


class _TokenLogprob(_Candidate):
    top_logprobs: list[_Candidate] = []


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    content: list[_TokenLogprob] | None = None


class _Text(msgspec.Struct):
    content: str | None = None
    # What a server's parser takes out of the text: lmdeploy's and older vllm's name, newer vllm's name.
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None

    @property
    def whole(self) -> str:
        """The text as the model wrote it, but for the marks around its reasoning."""
        return (self.reasoning_content or self.reasoning or "") + (self.content or "")


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Text | None = None
    finish_reason: str | None = None
    output_ids: list[int] | None = None  # lmdeploy's name
    token_ids: list[int] | None = None  # vllm's name
    output_token_logprobs: list[tuple[float, int]] | None = None
    logprobs: _Logprobs | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: TokenCounts | None = None
    error: Any = None
    object: str | None = None


class _Line(msgspec.Struct):
    text: str = ""
    tokens: int = 0
    input_tokens: int = 0
    finish_reason: str | None = None
    error: Any = None
    object: str | None = None


class _FinishReason(msgspec.Struct):
    type: str


class MetaInfo(msgspec.Struct, frozen=True):
    """What `/generate` of lmdeploy tells beside the text: counts so far, and what came with this event."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: _FinishReason | None = None
    output_token_logprobs: list[tuple[float, int]] | None = None


class _Generated(msgspec.Struct):
    text: str = ""
    output_ids: list[int] | None = None
    meta_info: MetaInfo = MetaInfo()
    error: Any = None
    object: str | None = None


class Piece(msgspec.Struct, gc=False):
    """What one event of an answer says.

    Attributes:
        text: New text.
        num_tokens: How many tokens that probably is, for servers that do not tell.
        token_ids: Ids of the new tokens, or empty.
        logprobs: Log-probability of each of `token_ids`, or empty.
        token_texts: Text of each, where the server tells log-probabilities beside texts.
        top_logprobs: The candidates for each, the likeliest first, where it tells any.
        finish_reason: Set on the last piece with text.
        usage: Token counts so far.
    """

    text: str = ""
    num_tokens: int = 0
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    token_texts: Sequence[str] = ()
    top_logprobs: Sequence[Candidates] = ()
    finish_reason: FinishReason | None = None
    usage: TokenCounts | None = None


class ErrorEventError(Exception):
    """An event is an error object.

    Args:
        body: The object, as JSON.
    """

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self.body = body


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_line = msgspec.json.Decoder(_Line).decode
_decode_generated = msgspec.json.Decoder(_Generated).decode


def read_event(data: bytes) -> Piece:
    """Return what an event of `/v1/completions` or `/v1/chat/completions` says.

    Raises:
        ErrorEventError: it is an error object.
        InvalidRequestError: it says that this prompt gets no answer.
        ProtocolError: it is none of the kind.
        UpstreamError: it says that the generation failed.
    """
    event = _decode(_decode_event, data)
    if not event.choices:
        return Piece(usage=event.usage)
    choice = event.choices[0]
    if choice.delta is not None and choice.delta.refusal:
        raise InvalidRequestError(f"the server's model refuses to answer: {choice.delta.refusal}")
    text = (choice.text or "") if choice.delta is None else choice.delta.whole
    # A part of a character has no text yet. In a chat, an event without text is more likely to tell the role.
    is_token = bool(text) or (choice.delta is None and not choice.finish_reason)
    piece = Piece(text, int(is_token), usage=event.usage)
    if token_ids := choice.output_ids or choice.token_ids:
        piece.token_ids = token_ids
        piece.logprobs = _logprobs(choice.output_token_logprobs, choice.logprobs, len(token_ids))
        if choice.logprobs is not None and piece.logprobs:
            piece.token_texts, piece.top_logprobs = _texts(choice.logprobs, len(token_ids))
    piece.finish_reason = _finish_reason(choice.finish_reason)
    return piece


def read_line(data: bytes) -> Piece:
    """Return what a line of `/v1/chat/interactive` says. Raises as `read_event` does."""
    line = _decode(_decode_line, data)
    usage = TokenCounts(line.input_tokens, line.tokens)
    return Piece(line.text, usage=usage, finish_reason=_finish_reason(line.finish_reason))


def read_generated(data: bytes) -> Piece:
    """Return what an event of `/generate` says. Raises as `read_event` does."""
    event = _decode(_decode_generated, data)
    meta, token_ids = event.meta_info, event.output_ids or ()
    piece = Piece(event.text, token_ids=token_ids, usage=TokenCounts(meta.prompt_tokens, meta.completion_tokens))
    piece.logprobs = _logprobs(meta.output_token_logprobs, None, len(token_ids))
    if meta.finish_reason is not None:
        piece.finish_reason = _finish_reason(meta.finish_reason.type)
    return piece


READERS: Mapping[str, Callable[[bytes], Piece]] = {
    CHAT: read_event,
    COMPLETIONS: read_event,
    GENERATE: read_generated,
    INTERACTIVE: read_line,
}
"""How the events of each route are read."""


def _decode(decode: Any, data: bytes) -> Any:
    try:
        message = decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the server sent an event that is no answer ({error}): {data[:200]!r}") from None
    if message.object == "error" or message.error:
        raise ErrorEventError(data)
    return message


def _finish_reason(reason: str | None) -> FinishReason | None:
    if not reason:  # some servers have an empty one where others have none
        return None
    if reason == "content_filter":
        raise InvalidRequestError("the server's content filter has ended the answer; change the prompt")
    known = _FINISH_REASONS.get(reason)
    if known is None:
        raise UpstreamError(f"the server ended the generation with {reason!r}; look into its log")
    return known


def _logprobs(pairs: Sequence[tuple[float, int]] | None, told: _Logprobs | None, num_tokens: int) -> Sequence[float]:
    if pairs is not None:
        found: list[float | None] = [logprob for logprob, _ in pairs]
    elif told is None:
        return ()
    elif told.token_logprobs is not None:
        found = told.token_logprobs
    else:
        found = [token.logprob for token in told.content or ()]
    logprobs = [logprob for logprob in found if logprob is not None]
    if len(logprobs) != num_tokens:
        raise ProtocolError(f"the server sent {len(logprobs)} log-probabilities for {num_tokens} tokens")
    return logprobs


def _texts(told: _Logprobs, num_tokens: int) -> tuple[Sequence[str], Sequence[Candidates]]:
    """Return the text of each token, and the candidates for each, where there are any."""
    if told.content is not None:
        texts = [token.token for token in told.content]
        places = [[(candidate.token, candidate.logprob) for candidate in token.top_logprobs] for token in told.content]
    else:
        texts = told.tokens
        places = [list((place or {}).items()) for place in told.top_logprobs or ()]
    if len(texts) != num_tokens or (places and len(places) != num_tokens):
        raise ProtocolError(f"the server sent {len(texts)} texts with log-probabilities for {num_tokens} tokens")
    return texts, [tuple(sorted(place, key=lambda candidate: -candidate[1])) for place in places]
