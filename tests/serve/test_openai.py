"""The endpoint as OpenAI's own Python client uses it, and curl."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from raylm.engines.simulated import candidates, greedy_text
from tests.serve.command import ServeCommand, wait_for
from tests.serve.conftest import KEYS

HELLO = [{"role": "user", "content": "hello"}]
ANSWER = greedy_text("user: hello\n", 8)


@pytest.fixture(scope="module")
def client(simulated_endpoint: ServeCommand) -> Iterator[openai.OpenAI]:
    """OpenAI's client, which does not retry, so that tests see what the endpoint says."""
    with openai.OpenAI(base_url=f"{simulated_endpoint.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(simulated_endpoint: ServeCommand) -> AsyncIterator[openai.AsyncOpenAI]:
    """The same for asyncio."""
    async with openai.AsyncOpenAI(base_url=f"{simulated_endpoint.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def strict(strict_endpoint: ServeCommand) -> Iterator[openai.OpenAI]:
    """A client of the endpoint with keys and low limits."""
    with openai.OpenAI(base_url=f"{strict_endpoint.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        yield client


# Chat


def test_chat(client: openai.OpenAI) -> None:
    """A chat completion has the text, why it ended, what it cost and how it came about."""
    answer = client.chat.completions.create(model="sim", messages=HELLO, max_tokens=8, temperature=0)
    assert isinstance(answer, ChatCompletion)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 8, 10)
    assert answer.model_extra is not None
    assert answer.model_extra["raylm"][0]["why"] == "least-loaded"


def test_chat_stream(client: openai.OpenAI) -> None:
    """A stream has the role first, text in pieces, the finish reason, and the usage where it was asked for."""
    stream = client.chat.completions.create(
        model="sim",
        messages=HELLO,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks: list[ChatCompletionChunk] = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    *texts, ended, usage = chunks[1:]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in texts) == ANSWER
    assert ended.choices[0].finish_reason == "length"
    assert ended.model_extra is not None
    assert ended.model_extra["raylm"]["attempts"] == 1
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.total_tokens == 10
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_usage(client: openai.OpenAI) -> None:
    """No chunk lacks a choice where usage was not asked for."""
    stream = client.chat.completions.create(model="sim", messages=HELLO, max_tokens=2, stream=True)
    assert all(chunk.choices for chunk in stream)


@pytest.mark.parametrize("max_tokens", [1, 8])
def test_headers_of_a_stream(client: openai.OpenAI, max_tokens: int) -> None:
    """They say who answers, also where the first event has all of the answer in it."""
    response = client.chat.completions.with_raw_response.create(
        model="sim", messages=HELLO, max_tokens=max_tokens, stream=True
    )
    for name in ("slot", "actor", "why", "queue-ms", "attempts"):
        assert response.headers[f"x-raylm-{name}"]
    assert list(response.parse())


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_any_request_id_in_a_stream(simulated_endpoint: ServeCommand, route: str) -> None:
    """Whatever a request's id looks like, each event is JSON."""
    asked = {"prompt": "hi"} if route == "/v1/completions" else {"messages": HELLO}
    body = {**asked, "model": "sim", "max_tokens": 2, "stream": True, "request_id": '0}]}"0}]}'}
    events = simulated_endpoint.post(route, body).text.strip().split("\n\n")
    assert len({json.loads(event.removeprefix("data: "))["id"] for event in events[:-1]}) == 1


def test_null_is_as_nothing_said(client: openai.OpenAI) -> None:
    """Fields that OpenAI's API has as nullable may be null."""
    nothing: Any = None
    text = client.completions.create(model="sim", prompt="one two", max_tokens=2, stream=nothing, echo=nothing)
    chat = client.chat.completions.create(model="sim", messages=HELLO, max_tokens=2, stream=nothing, n=nothing)
    assert text.choices[0].text
    assert chat.choices[0].message.content


async def test_async(async_client: openai.AsyncOpenAI) -> None:
    """The client for asyncio gets the same texts, whole and streamed."""
    whole = await async_client.chat.completions.create(model="sim", messages=HELLO, max_tokens=8, temperature=0)
    stream = await async_client.chat.completions.create(
        model="sim", messages=HELLO, max_tokens=8, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert whole.choices[0].message.content == "".join(pieces) == ANSWER


def test_message_of_parts(client: openai.OpenAI) -> None:
    """A message may come as a list of texts, as some clients send it."""
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = client.chat.completions.create(
        model="sim", messages=[{"role": "user", "content": parts}], max_completion_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_choices(client: openai.OpenAI, stream: bool) -> None:
    """With `n` there are so many answers; a seed makes them differ, and the same again."""

    def texts() -> list[str]:
        found = ["", "", ""]
        answer = client.chat.completions.create(
            model="sim", messages=HELLO, max_tokens=6, n=3, seed=7, temperature=1, stream=stream
        )
        if isinstance(answer, ChatCompletion):
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 18
            return [choice.message.content or "" for choice in answer.choices]
        for chunk in answer:
            for choice in chunk.choices:
                found[choice.index] += choice.delta.content or ""
        return found

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client: openai.OpenAI, stream: bool) -> None:
    """A stop word ends the text and is no part of it."""
    word = ANSWER.split()[3]
    answer = client.chat.completions.create(
        model="sim", messages=HELLO, max_tokens=8, temperature=0, stop=[word, "never"], stream=stream
    )
    if isinstance(answer, ChatCompletion):
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    else:
        choices = [choice for chunk in answer for choice in chunk.choices]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    assert (text, reason) == (ANSWER.partition(word)[0], "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    """Log-probabilities come with each token and with the likeliest ones at its place."""
    answer = client.chat.completions.create(
        model="sim", messages=HELLO, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2, stream=stream
    )
    if isinstance(answer, ChatCompletion):
        told = [answer.choices[0].logprobs]
    else:
        told = [choice.logprobs for chunk in answer for choice in chunk.choices]
    tokens = [token for logprobs in told if logprobs is not None for token in logprobs.content or ()]
    assert "".join(token.token for token in tokens) == greedy_text("user: hello\n", 4)
    for token in tokens:
        assert token.bytes == list(token.token.encode())
        assert [top.token for top in token.top_logprobs] == [token.token, "z1"]
        assert token.top_logprobs[0].logprob == token.logprob < 0


# Completions


def test_completion(client: openai.OpenAI) -> None:
    """A raw prompt is continued, 16 tokens if nothing is said."""
    answer = client.completions.create(model="sim", prompt="one two", temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == greedy_text("one two", 16)


def test_completion_stream(client: openai.OpenAI) -> None:
    """The stream of a raw prompt has the same text and ends with the usage."""
    *chunks, usage = client.completions.create(
        model="sim", prompt="one two", max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == greedy_text("one two", 8)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
def test_list_of_prompts(client: openai.OpenAI, stream: bool) -> None:
    """Several prompts have an answer each, in their order, also with several choices each."""
    prompts = [f"prompt {number}" for number in range(20)]
    answer = client.completions.create(model="sim", prompt=prompts, max_tokens=5, temperature=0, n=2, stream=stream)
    texts = [""] * 40
    for part in [answer] if isinstance(answer, Completion) else answer:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [greedy_text(prompt, 5) for prompt in prompts for _ in range(2)]


def test_prompts_of_token_ids(client: openai.OpenAI) -> None:
    """Prompts may be token ids, one list or several."""
    one = client.completions.create(model="sim", prompt=[11, 12, 13], max_tokens=3, temperature=0)
    two = client.completions.create(model="sim", prompt=[[11, 12, 13], [7]], max_tokens=3, temperature=0)
    assert one.usage is not None
    assert one.usage.prompt_tokens == 3
    assert two.choices[0].text == one.choices[0].text
    assert len(two.choices) == 2


def test_echo_alone(client: openai.OpenAI) -> None:
    """With `max_tokens` 0 and `echo`, the prompt's own log-probabilities come back and nothing else."""
    prompt = "a bb ccc "
    answer = client.completions.create(model="sim", prompt=prompt, max_tokens=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text == prompt
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a ", "bb ", "ccc "]
    assert choice.logprobs.text_offset == [0, 2, 5]
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_echo_and_more(client: openai.OpenAI, stream: bool) -> None:
    """With `echo` the prompt comes before the text, and offsets count on from it."""
    answer = client.completions.create(
        model="sim", prompt="a bb ", max_tokens=2, temperature=0, echo=True, logprobs=1, stream=stream
    )
    parts = [answer] if isinstance(answer, Completion) else list(answer)
    text = "".join(part.choices[0].text for part in parts)
    told = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs is not None]
    tokens = [token for logprobs in told for token in logprobs.tokens or ()]
    offsets = [offset for logprobs in told for offset in logprobs.text_offset or ()]
    tops = [top for logprobs in told for top in logprobs.top_logprobs or ()]
    assert text == "a bb " + greedy_text("a bb ", 2)
    assert [text[offset : offset + len(token)] for token, offset in zip(tokens, offsets, strict=True)] == tokens
    last = dict(candidates(2, tokens[-1], 1))
    assert tops[0] is None
    assert tops[-1].keys() == last.keys()


# Models


def test_models(client: openai.OpenAI, real_endpoint: ServeCommand) -> None:
    """The models that are served are listed, with the length of their context."""
    assert [(model.id, (model.model_extra or {})["max_model_len"]) for model in client.models.list()] == [("sim", 8192)]
    assert client.models.retrieve("sim").id == "sim"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/another")
    with openai.OpenAI(base_url=f"{real_endpoint.url}/v1", api_key="none") as real:
        assert [model.id for model in real.models.list()] == ["smollm2-135m-instruct"]


def test_real_model(real_endpoint: ServeCommand) -> None:
    """The real model answers a question, and streams the same."""
    with openai.OpenAI(base_url=f"{real_endpoint.url}/v1", api_key="none") as real:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        settings = {"model": "smollm2-135m-instruct", "messages": messages, "max_tokens": 12, "temperature": 0}
        whole = real.chat.completions.create(**settings)
        stream = real.chat.completions.create(**settings, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert streamed == whole.choices[0].message.content


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_the_seeds_fields_on_the_real_model(real_endpoint: ServeCommand, route: str) -> None:
    """Fields that OpenAI does not have do to the answer what they say."""
    question = "What is the capital of France?"
    prompts = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": question}]},
        "/v1/completions": {"prompt": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"},
    }

    def ask(**fields: Any) -> tuple[str, str]:
        body = {**prompts[route], "max_tokens": 40, "temperature": 0, **fields}
        (choice,) = real_endpoint.post(route, body).json()["choices"]
        return choice["finish_reason"], choice.get("text") or choice["message"]["content"]

    assert ask()[0] == "stop"
    reason, greedy = ask(ignore_eos=True)
    assert reason == "length"
    assert ask(ignore_eos=True, temperature=1.5, top_k=1) == ("length", greedy)
    assert ask(ignore_eos=True, repetition_penalty=1.9) != ("length", greedy)


def test_schema_on_the_real_model(real_endpoint: ServeCommand) -> None:
    """A schema that the engine does not hold to is refused by the name it has on the wire, and not left out."""
    schema = {"name": "city", "schema": {"type": "object", "properties": {"name": {"type": "string"}}}}
    with (
        openai.OpenAI(base_url=f"{real_endpoint.url}/v1", api_key="none") as real,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        real.chat.completions.create(
            model="smollm2-135m-instruct",
            messages=HELLO,
            response_format={"type": "json_schema", "json_schema": schema},
        )
    assert caught.value.param == "response_format"


# Errors


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"extra_body": {"tool_resources": {}}}, "tool_resources"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, None),
    ],
)
def test_bad_request(client: openai.OpenAI, wrong: dict[str, object], param: str | None) -> None:
    """A wrong request is a BadRequestError whose `param` names the field."""
    settings: dict[str, object] = {"model": "sim", "messages": HELLO, **wrong}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**settings)
    assert caught.value.param == param


def test_unknown_model(client: openai.OpenAI) -> None:
    """A model that is not served is a NotFoundError that says which ones are."""
    with pytest.raises(openai.NotFoundError, match="there are: sim"):
        client.chat.completions.create(model="another", messages=HELLO)


@pytest.mark.parametrize("stream", [False, True])
def test_wrong_key(strict: openai.OpenAI, stream: bool) -> None:
    """A wrong key is an AuthenticationError."""
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        strict.with_options(api_key="wrong").chat.completions.create(model="slow", messages=HELLO, stream=stream)


def test_too_large(strict: openai.OpenAI) -> None:
    """A body over the limit is a status error 413."""
    with pytest.raises(openai.APIStatusError) as caught:
        strict.completions.create(model="slow", prompt="x" * 200_000)
    assert caught.value.status_code == 413


def test_saturated(strict: openai.OpenAI) -> None:
    """A full queue is a RateLimitError that says when to come again."""
    settings: dict[str, object] = {"model": "slow", "messages": HELLO, "max_tokens": 8000, "stream": True}
    with strict.chat.completions.create(**settings) as running:
        next(iter(running))
        body = {"request_id": "waits"}
        with (
            strict.chat.completions.create(**settings, extra_body=body),  # heartbeats begin it
            pytest.raises(openai.RateLimitError) as caught,
        ):
            strict.chat.completions.create(**settings)
    assert int(caught.value.response.headers["retry-after"]) >= 1


SCALE_TO_NONE = """
import asyncio, sys
from raylm.actors.cluster import connect
from raylm.operate import scale
connect(sys.argv[1])
asyncio.run(scale("none", 0))
"""


def test_no_actor(strict: openai.OpenAI, strict_endpoint: ServeCommand) -> None:
    """Without an actor that could answer, it is status 503 and says when to come again."""
    command = [sys.executable, "-c", SCALE_TO_NONE, strict_endpoint.cluster]
    subprocess.run(command, capture_output=True, timeout=120, check=True)

    def is_gone() -> bool:
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        models = strict_endpoint.get("/state", headers=headers).json().get("models", [])
        return any(model["name"] == "none" and not model["problem"] and not model["slots"] for model in models)

    wait_for(is_gone)  # until then it may work on
    with pytest.raises(openai.InternalServerError) as caught:
        strict.chat.completions.create(model="none", messages=HELLO)
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_failure_in_mid_stream(client: openai.OpenAI) -> None:
    """An engine that fails in the middle of a stream is an error of the client, and not a short text."""
    stream = client.chat.completions.create(
        model="sim", messages=[{"role": "user", "content": "FAIL"}], max_tokens=8, stream=True
    )
    with pytest.raises(openai.APIError, match="simulated failure at token 3"):
        list(stream)


# curl


def _curl(url: str, body: dict[str, object], *options: str) -> str:
    command = ["curl", "--silent", "--show-error", "--fail", "--max-time", "60", *options, url]
    command += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def test_curl(simulated_endpoint: ServeCommand) -> None:
    """A request with curl."""
    body: dict[str, object] = {"model": "sim", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    answer = json.loads(_curl(f"{simulated_endpoint.url}/v1/chat/completions", body))
    assert answer["choices"][0]["message"]["content"] == ANSWER


def test_curl_stream(simulated_endpoint: ServeCommand) -> None:
    """A stream with curl: events, of which the last is [DONE]."""
    body: dict[str, object] = {"model": "sim", "prompt": "one", "max_tokens": 4, "temperature": 0, "stream": True}
    events = _curl(f"{simulated_endpoint.url}/v1/completions", body, "--no-buffer").split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    assert "".join(texts) == greedy_text("one", 4)
