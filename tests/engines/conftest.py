"""The engines that the conformance suite runs on, and what tests of engines have in common."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest

from raylm.config import EngineConfig, HTTPConfig, OpenVINOConfig, SimulatedConfig, TritonConfig
from raylm.engines import http, triton
from raylm.engines.base import Engine
from raylm.messages import Delta, Details, FinishReason, Generated, GenerationConfig, Message, Request, Usage

from .http_server import Toy
from .triton_server import TritonServer

MODEL = "smollm2-135m-instruct"
ROOMY = 16_384
"""A context that takes half a minute to fill with 500 tokens a second."""


@pytest.fixture(scope="package", autouse=True)
def _patience() -> Iterator[None]:
    """Servers on a busy machine may take more than seconds to answer what is no generation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "_HEALTH_TIMEOUT_S", 60)
        patch.setattr(triton, "_CALL_TIMEOUT_S", 60)
        yield


@contextmanager
def http_config() -> Iterator[EngineConfig]:
    """Settings of a client, as long as its server runs."""
    with Toy(max_context=ROOMY).in_thread() as server:
        yield HTTPConfig(url=server.url, capacity=8, max_context=server.max_context)


@contextmanager
def triton_config(model_name: str, *helpers: str) -> Iterator[EngineConfig]:
    """Settings of a client, as long as a server with a model and its helpers runs."""
    with TritonServer(models=[model_name, *helpers]) as server:
        yield TritonConfig(address=server.address, model_name=model_name, capacity=8, session_len=1024)


@dataclass(frozen=True)
class Subject:
    """An engine that the conformance suite runs on. Greedy text must not depend on what else the engine works on.

    Attributes:
        config: Its settings, with what has to run around it.
        refuses: What it cannot honour, and has to refuse by name. Tests that need it do not apply to this engine; any
            other refusal is a failure.
        slowly: What a prompt begins with so that its answer takes its time.
        many_tokens: Of an answer that takes longer than anybody may be late on a busy machine.
    """

    config: Callable[[], AbstractContextManager[EngineConfig]]
    refuses: frozenset[str] = frozenset()
    slowly: str = ""
    many_tokens: int = 900

    def lasting(self, prompt: str) -> Request:
        """Return a request that is under way until a test ends it."""
        return make_request(self.slowly + prompt, max_new_tokens=self.many_tokens, ignore_eos=True)


NOT_HTTP = frozenset({"echo", "top_logprobs", "presence_penalty", "frequency_penalty", "tokenize messages"})
_NOT_TRITON = frozenset(
    {"messages", "prompt_token_ids", "echo", "logprobs", "top_logprobs", "json_schema", "tokenize", "tokenize messages"}
)
_NO_PENALTY = frozenset({"presence_penalty", "frequency_penalty"})
_SLOWLY = "[[pace=0.05]] "  # seconds between two tokens. See `triton_models/lib/toy.py`

SUBJECTS: dict[str, Subject] = {
    "simulated": Subject(
        lambda: nullcontext(SimulatedConfig(tokens_per_s=500, capacity=8, max_context=ROOMY)),
        _NO_PENALTY | {"json_schema"},
        many_tokens=16_000,
    ),
    "openvino": Subject(
        lambda: nullcontext(OpenVINOConfig(path=MODEL, capacity=8, max_context=1024, deterministic=True)),
        frozenset({"top_logprobs", "json_schema"}),
    ),
    "http": Subject(http_config, NOT_HTTP | {"json_schema"}, many_tokens=16_000),
    "triton-vllm": Subject(lambda: triton_config("vllm"), _NOT_TRITON, _SLOWLY),
    "triton-ensemble": Subject(lambda: triton_config("ensemble"), _NOT_TRITON | _NO_PENALTY, _SLOWLY),
    "triton-llmapi": Subject(
        lambda: triton_config("tensorrt_llm"),
        _NOT_TRITON | {"ignore_eos", "min_new_tokens", "repetition_penalty"},
        _SLOWLY,
    ),
    "triton-turbomind": Subject(
        lambda: triton_config("turbomind", "preprocessing", "postprocessing"),
        _NOT_TRITON | _NO_PENALTY | {"min_new_tokens"},
        _SLOWLY,
    ),
}
"""The engines of the conformance suite by name; a new engine is added here."""


Prompt = str | tuple[Message, ...] | tuple[int, ...]
"""A raw prompt, a conversation, or token ids."""


def make_request(prompt: Prompt, generated: Generated | None = None, **parameters: object) -> Request:
    """Return a request with a prompt or a conversation. Greedy, if `parameters` do not say otherwise."""
    return Request(
        request_id="test",
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=prompt if prompt and isinstance(prompt[0], int) else None,
        messages=None if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt,
        generated=generated,
        config=GenerationConfig(temperature=0).updated(parameters),
    )


def ask(text: str) -> tuple[Message, ...]:
    """Return a conversation of one question."""
    return (Message("user", text),)


@dataclass
class Record:
    """Takes the deltas of one request, and lets a test wait for them."""

    deltas: list[Delta] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def emit(self, delta: Delta) -> None:
        """Take the next delta."""
        self.deltas.append(delta)
        self._changed.set()

    async def wait(self, num_deltas: int = 1) -> None:
        """Return when there are `num_deltas`."""
        while len(self.deltas) < num_deltas:
            self._changed.clear()
            await self._changed.wait()

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> list[int]:
        """All of the token ids."""
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def logprobs(self) -> list[float]:
        """All of the log-probabilities."""
        return [logprob for delta in self.deltas for logprob in delta.logprobs]

    @property
    def details(self) -> Details:
        """All that is told beyond the text."""
        return sum([delta.details for delta in self.deltas if delta.details is not None], Details())

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended."""
        reason = self.deltas[-1].finish_reason
        assert reason is not None
        return reason

    @property
    def usage(self) -> Usage:
        """The token counts."""
        usage = self.deltas[-1].usage
        assert usage is not None
        return usage

    def generated(self, num_deltas: int) -> Generated:
        """Return what a continuation after the first `num_deltas` is given."""
        part = Record(self.deltas[:num_deltas])
        return Generated(part.text, part.token_ids, part.deltas[-1].num_tokens)


async def run(engine: Engine, request: Request) -> Record:
    """Generate a request to its end."""
    record = Record()
    await engine.generate(request, record.emit)
    return record


async def run_all(engine: Engine, requests: Sequence[Request]) -> list[Record]:
    """Generate requests together."""
    return await asyncio.gather(*(run(engine, request) for request in requests))


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` is true. The test's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.005)


async def check_special_stop_word(engine: Engine, *, ignore_eos: bool) -> None:
    """Check, on the built-in model, that a stop word which is a special token, and has no text, is one all the same."""
    word, token_id = "<|im_start|>", 1  # not the model's end of sequence
    prompt = "Hello" + (word + "user\nHello") * 6 + word
    plain = await run(engine, make_request(prompt, max_new_tokens=8, ignore_eos=ignore_eos))
    end = plain.token_ids.index(token_id) + 1
    parameters = {"max_new_tokens": 900, "ignore_eos": ignore_eos, "stop_words": [word, "#"]}
    whole = await run(engine, make_request(prompt, **parameters))
    assert (whole.text, whole.finish_reason) == ("user\nHello", "stop")
    assert whole.token_ids == plain.token_ids[:end]
    assert whole.usage.completion_tokens == end
    rest = await run(engine, make_request(prompt, whole.generated(2), **parameters))
    assert whole.generated(2).text + rest.text == whole.text
    assert (rest.finish_reason, rest.usage) == ("stop", whole.usage)
