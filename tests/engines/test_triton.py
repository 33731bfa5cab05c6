"""What the Triton engine promises beyond the conformance suite, against a real server with models of our own."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from tritonclient.grpc.aio import InferenceServerClient

from raylm.config import TritonConfig
from raylm.engines import triton_turbomind
from raylm.engines.triton import STATUSES, TritonEngine
from raylm.engines.triton_dialects import CallFailedError
from raylm.errors import (
    ContextLengthError,
    EngineError,
    EngineStartError,
    InvalidRequestError,
    ProtocolError,
    RequestTimeoutError,
    UpstreamError,
)
from raylm.messages import Generated, Request
from tests.ports import kept_port

from .conftest import Record, ask, make_request, run, until
from .triton_server import MODELS, TritonServer, make_repository

sys.path.append(str(MODELS / "lib"))
from toy import greedy_text

STORY = "Once upon a time"
TEXT_MODELS = ["vllm", "ensemble", "tensorrt_llm"]
ALL_MODELS = [*TEXT_MODELS, "turbomind"]
TURBOMIND = ["turbomind", "preprocessing", "postprocessing"]
SILENCE_S = 17
"""A silence that is none of a server on a busy machine."""


@pytest.fixture(autouse=True)
def _patient_turbomind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a call may come late on a busy machine, where a request to stop it would be one more in the log."""
    monkeypatch.setattr(triton_turbomind, "_STOP_PATIENCE_S", 20)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models as they are, and changed copies of them."""
    whole = {name: (name, {}) for name in [*ALL_MODELS, *TURBOMIND, "classifier"]}
    copies: dict[str, tuple[str, dict[str, str]]] = {
        "accumulating": ("ensemble", {'"false"': '"true"'}),
        "unsigned": (
            "ensemble",
            {
                '"max_tokens" data_type: TYPE_INT32': '"max_tokens" data_type: TYPE_UINT32',
                '"end_id" data_type: TYPE_INT32': '"end_id" data_type: TYPE_UINT32',
            },
        ),
        "whole": ("ensemble", {"model_transaction_policy { decoupled: true }\n": ""}),
        "unary": ("tensorrt_llm", {"model_transaction_policy { decoupled: true }\n": ""}),
        "echo": (
            "tensorrt_llm",
            {
                "model_transaction_policy { decoupled: true }\n": "",
                "sampling_param_exclude_input_from_output": "unused",
            },
        ),
    }
    folder = make_repository(tmp_path_factory.mktemp("models"), {**whole, **copies})
    for name, part in (("composed", "ensemble"), ("composed_whole", "whole")):
        (folder / name / "1").mkdir(parents=True)
        text = COMPOSED.replace('name: "composed"', f'name: "{name}"')
        (folder / name / "config.pbtxt").write_text(text.replace('model_name: "ensemble"', f'model_name: "{part}"'))
    return folder


COMPOSED = """
name: "composed"
platform: "ensemble"
max_batch_size: 64
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
input [ { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] } ]
input [ { name: "top_k" data_type: TYPE_INT32 dims: [ 1 ] optional: true } ]
input [ { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
ensemble_scheduling { step [ {
  model_name: "ensemble" model_version: -1
  input_map { key: "text_input" value: "text_input" }
  input_map { key: "max_tokens" value: "max_tokens" }
  input_map { key: "top_k" value: "top_k" }
  input_map { key: "stream" value: "stream" }
  output_map { key: "text_output" value: "text_output" }
} ] }
"""


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    """A server with all of them."""
    with TritonServer(repository) as server:
        yield server


@asynccontextmanager
async def connect(server: TritonServer, model: str = "vllm", **settings: Any) -> AsyncIterator[TritonEngine]:
    """A started engine."""
    settings = {"session_len": 1024, "idle_timeout_s": 60, "start_timeout_s": 60, **settings}
    engine = TritonEngine(TritonConfig(address=server.address, model_name=model, **settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def prompt_of(text: str) -> str:
    """Return a prompt after which no model ends its sequence."""
    return f"[[endless]] {text}"


async def log_of(server: TritonServer, ask: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return what the models wrote down while a request ran."""
    num_lines = len(server.journal())
    await ask()
    return server.journal()[num_lines:]


def requests_in(log: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """Return the flat input tensors of each request to a model."""
    return [
        {name: values for name, (_, _, values) in line["inputs"].items()}
        for line in log
        if (line["event"], line["model"]) == ("request", model)
    ]


# What is found at the start


@pytest.mark.parametrize(
    ("model", "dialect"),
    [
        ("vllm", "vLLM"),
        ("ensemble", "TensorRT-LLM"),
        ("accumulating", "TensorRT-LLM"),
        ("composed", "TensorRT-LLM"),
        ("whole", "TensorRT-LLM"),
        ("tensorrt_llm", "TensorRT-LLM LLM API"),
        ("unary", "TensorRT-LLM LLM API"),
        ("turbomind", "TurboMind"),
        ("internlm2-chat-7b", "TurboMind"),
    ],
)
async def test_dialects(server: TritonServer, model: str, dialect: str) -> None:
    """The dialect is found from the tensors, whatever the model is called, and the text is the model's."""
    engine = TritonEngine(TritonConfig(address=server.address, model_name=model, session_len=512, capacity=7))
    info = await engine.start()
    record = await run(engine, make_request(prompt_of(STORY), max_new_tokens=20))
    await engine.close()
    assert (info.engine, info.engine_version, info.model) == ("triton", "2.51.0", model)
    assert (info.max_context, info.capacity) == (512, 7)
    assert info.device == f"triton {dialect} at {server.address}"
    assert record.text == greedy_text(prompt_of(STORY), 20)
    assert record.finish_reason == "length"


async def test_unknown_model(server: TritonServer) -> None:
    """A model that is not there is an error that says which ones are."""
    with pytest.raises(EngineStartError, match=r"not loaded the model 'nope'; it has .*vllm \(ready\)"):
        async with connect(server, "nope"):
            pass


async def test_unknown_dialect(server: TritonServer) -> None:
    """A model that generates no text is an error with the tensors that it has."""
    with pytest.raises(EngineStartError, match="classifier takes pixels and gives scores"):
        async with connect(server, "classifier"):
            pass


async def test_incomplete_turbomind(repository: Path) -> None:
    """TurboMind without the models that know its tokens is an error that names them."""
    with TritonServer(repository, models=["turbomind", "postprocessing"]) as server:
        engine = TritonEngine(TritonConfig(address=server.address, model_name="turbomind"))
        with pytest.raises(EngineStartError, match="turbomind without preprocessing"):
            await engine.start()


async def test_no_server() -> None:
    """Where nothing listens the start fails in its time, says so, and may be tried again."""
    with kept_port() as port:
        engine = TritonEngine(TritonConfig(address=f"127.0.0.1:{port}", model_name="vllm", start_timeout_s=0.3))
        for _ in range(2):
            with pytest.raises(EngineStartError, match=r"did not answer in 0\.3 s"):
                await engine.start()
    with pytest.raises(EngineError, match="not started"):
        await engine.check_health()


# What is sent


SENT: dict[str, dict[str, Any]] = {
    "ensemble": {
        "max_tokens": ["int32", [1, 1], [9]],
        "temperature": ["float32", [1, 1], [0.5]],
        "top_p": ["float32", [1, 1], [0.75]],
        "top_k": ["int32", [1, 1], [5]],
        "seed": ["uint64", [1, 1], [2**40]],
        "repetition_penalty": ["float32", [1, 1], [1.5]],
        "min_tokens": ["int32", [1, 1], [2]],
        "stop_words": ["object", [1, 2], ["#", "你"]],
        "end_id": ["int32", [1, 1], [-1]],
    },
    "unsigned": {"max_tokens": ["uint32", [1, 1], [9]]},
    "tensorrt_llm": {
        "sampling_param_max_tokens": ["int32", [1], [9]],
        "sampling_param_temperature": ["float32", [1], [0.5]],
        "sampling_param_top_p": ["float32", [1], [0.75]],
        "sampling_param_top_k": ["int32", [1], [5]],
        "sampling_param_seed": ["uint64", [1], [2**40]],
        "sampling_param_stop": ["object", [2], ["#", "你"]],
        "sampling_param_presence_penalty": ["float32", [1], [0.5]],
        "sampling_param_frequency_penalty": ["float32", [1], [-0.5]],
    },
    "turbomind": {
        "request_output_len": ["uint32", [1, 1], [9]],
        "temperature": ["float32", [1, 1], [0.5]],
        "runtime_top_p": ["float32", [1, 1], [0.75]],
        "runtime_top_k": ["uint32", [1, 1], [5]],
        "random_seed": ["uint64", [1, 1], [2**40]],
        "repetition_penalty": ["float32", [1, 1], [1.5]],
        "bad_words_list": ["int32", [1, 2, 1], [2, 1]],
        "START": ["int32", [1, 1], [1]],
        "END": ["int32", [1, 1], [1]],
        "step": ["int32", [1, 1], [0]],
    },
}


@pytest.mark.parametrize(("model", "expected"), SENT.items(), ids=SENT)
async def test_parameters(server: TritonServer, model: str, expected: dict[str, Any]) -> None:
    """Each parameter is sent as the tensor that the model declares, with its type and shape."""
    can: dict[str, dict[str, Any]] = {
        "ensemble": {"repetition_penalty": 1.5, "min_new_tokens": 2, "ignore_eos": True},
        "turbomind": {"repetition_penalty": 1.5, "ignore_eos": True},
        "tensorrt_llm": {"presence_penalty": 0.5, "frequency_penalty": -0.5},
    }
    request = make_request(
        prompt_of(STORY), max_new_tokens=9, temperature=0.5, top_p=0.75, top_k=5, seed=2**40, stop_words=["#", "你"],
        **can.get(model, {}),
    )  # fmt: skip
    async with connect(server, model) as engine:
        log = await log_of(server, lambda: run(engine, request))
    sent = next(line["inputs"] for line in log if (line["event"], line["model"]) == ("request", model))
    assert {name: sent[name] for name in expected} == expected


async def test_parameters_of_vllm(server: TritonServer) -> None:
    """VLLM gets its parameters as one JSON object."""
    request = make_request(
        prompt_of(STORY), max_new_tokens=9, temperature=0.5, top_p=0.75, top_k=5, seed=2**40, repetition_penalty=1.5,
        min_new_tokens=2, ignore_eos=True, stop_words=["#"], presence_penalty=0.5, frequency_penalty=-0.5,
    )  # fmt: skip
    async with connect(server) as engine:
        log = await log_of(server, lambda: run(engine, request))
    (sent,) = requests_in(log, "vllm")
    assert json.loads(sent["sampling_parameters"][0]) == {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.75, "top_k": 5, "seed": 2**40, "repetition_penalty": 1.5,
        "min_tokens": 2, "ignore_eos": True, "stop": ["#"], "include_stop_str_in_output": True,
        "presence_penalty": 0.5, "frequency_penalty": -0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "parameter", "value"),
    [
        *[(model, "logprobs", True) for model in ALL_MODELS],
        ("tensorrt_llm", "repetition_penalty", 1.1),
        ("tensorrt_llm", "min_new_tokens", 3),
        ("tensorrt_llm", "ignore_eos", True),
        ("unsigned", "ignore_eos", True),
        ("ensemble", "top_k", 2**40),
        ("turbomind", "min_new_tokens", 3),
        ("turbomind", "presence_penalty", 0.5),
        ("ensemble", "frequency_penalty", 0.5),
        ("composed", "stop_words", ["#"]),
        ("composed", "seed", 1),
    ],
)
async def test_refusals(server: TritonServer, model: str, parameter: str, value: Any) -> None:
    """What a model cannot honour is refused by name before anything is sent; its neutral value never is."""
    neutral = {
        "repetition_penalty": 1.0, "min_new_tokens": 0, "ignore_eos": False, "seed": None, "stop_words": (),
        "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    settings: dict[str, Any] = {
        parameter: value,
        **({"temperature": 1.0, "top_p": 1.0} if parameter == "top_k" else {}),
    }
    if parameter == "seed":
        settings |= {"temperature": 1.0, "top_p": 1.0, "top_k": None}
    async with connect(server, model) as engine:

        async def refused() -> None:
            with pytest.raises(InvalidRequestError, match=f"^{parameter}: "):
                await run(engine, make_request(prompt_of(STORY), max_new_tokens=4, **settings))

        assert await log_of(server, refused) == []
        await run(engine, make_request(prompt_of(STORY), max_new_tokens=4, **neutral))


@pytest.mark.parametrize(
    ("prompt", "named"),
    [(ask("Hi"), "meta_template"), ("", "empty"), ("a lone surrogate: \ud800", "Unicode")],
    ids=["messages", "empty", "unicode"],
)
async def test_invalid_requests(server: TritonServer, prompt: Any, named: str) -> None:
    """What no model on a Triton server takes is an error that says what to do."""
    async with connect(server) as engine:
        with pytest.raises(InvalidRequestError, match=named):
            await run(engine, make_request(prompt))
        assert engine.statistics().num_running == 0


@pytest.mark.parametrize("model", ["vllm", "turbomind"])
async def test_big_prompt(server: TritonServer, model: str) -> None:
    """A prompt of 16 MiB arrives, far above gRPC's usual limit of 4 MiB."""
    prompt = prompt_of("x" * (16 << 20))
    async with connect(server, model) as engine:
        assert (await run(engine, make_request(prompt, max_new_tokens=3))).text == greedy_text(prompt, 3)


# What comes back


@pytest.mark.parametrize("model", ["vllm", "ensemble", "accumulating", "tensorrt_llm"])
@pytest.mark.parametrize("order", ["", "[[chunk=3]]", "[[chunk=7]]"])
async def test_chunks(server: TritonServer, model: str, order: str) -> None:
    """However the server cuts a text, deltas are new text in whole characters, and counts are right."""
    prompt = prompt_of(f"{order} 😀 🚀")
    async with connect(server, model) as engine:
        record = await run(engine, make_request(prompt, max_new_tokens=40))
    assert record.text == greedy_text(prompt, 40)
    assert any(character in record.text for character in "😀🚀🌍")
    assert all("\ufffd" not in delta.text for delta in record.deltas)
    assert (record.finish_reason, record.usage.completion_tokens) == ("length", 40)


@pytest.mark.parametrize("model", ["vllm", "ensemble", "accumulating", "tensorrt_llm", "turbomind", "unary"])
@pytest.mark.parametrize("order", ["", "[[chunk=3]]"])
async def test_stop_words(server: TritonServer, model: str, order: str) -> None:
    """No part of a stop word shows, whether the server cuts it off, leaves it in, or has shown its beginning."""
    prompt = prompt_of(f"{order} {STORY}")
    text = greedy_text(prompt, 30)
    async with connect(server, model) as engine:
        for word in (text[30:32], text[29:41], text[-9:]):
            record = await run(engine, make_request(prompt, max_new_tokens=30, stop_words=[word, "#"]))
            assert record.text == text.partition(word)[0]
            assert record.finish_reason == "stop"
            assert word not in "".join(delta.text for delta in record.deltas)


@pytest.mark.parametrize("model", ["vllm", "ensemble", "accumulating", "tensorrt_llm", "turbomind", "unary"])
async def test_stop_word_of_half_characters(server: TritonServer, model: str) -> None:
    """A stop word ends the text though its characters come in halves: an emoji is two tokens."""
    prompt = prompt_of("😀 🚀")
    text = greedy_text(prompt, 40)
    at = next(at for at, character in enumerate(text) if character in "😀🚀🌍" and at > 10)
    word = text[at - 4 : at + 3]
    async with connect(server, model) as engine:
        record = await run(engine, make_request(prompt, max_new_tokens=40, stop_words=[word]))
    assert (record.text, record.finish_reason) == (text.partition(word)[0], "stop")


@pytest.mark.parametrize("model", ["unary", "echo"])
async def test_one_response(server: TritonServer, model: str) -> None:
    """A model that is not decoupled answers at once, and an echo of the prompt is removed."""
    async with connect(server, model) as engine:
        record = await run(engine, make_request(prompt_of(STORY), max_new_tokens=12))
    (delta,) = record.deltas
    assert delta.text == greedy_text(prompt_of(STORY), 12)
    assert delta.num_tokens > 0


async def test_end_of_sequence(server: TritonServer) -> None:
    """The end of the sequence is the reason of a short answer."""
    prompts = [f"{STORY} {number}" for number in range(8)]
    for model in ("vllm", "ensemble", "turbomind"):
        async with connect(server, model) as engine:
            records = [await run(engine, make_request(prompt, max_new_tokens=300)) for prompt in prompts]
        ended = [record for record in records if record.usage.completion_tokens < 300]
        assert ended
        assert all(record.finish_reason == "stop" for record in ended)


@pytest.mark.parametrize("model", TEXT_MODELS)
async def test_continuation(server: TritonServer, model: str) -> None:
    """Text alone, with its number of tokens, is enough to continue."""
    async with connect(server, model) as engine:
        whole = await run(engine, make_request(prompt_of("😀 🚀"), max_new_tokens=24))
        for cut in range(1, len(whole.deltas)):
            part = whole.generated(cut)
            rest = await run(engine, make_request(prompt_of("😀 🚀"), part, max_new_tokens=24))
            assert part.text + rest.text == whole.text
            assert rest.usage == whole.usage


async def test_an_ensemble_of_what_does_not_stream(server: TritonServer) -> None:
    """It is not asked to."""
    async with connect(server, "composed_whole") as engine:
        record = await run(engine, make_request(prompt_of(STORY), max_new_tokens=20))
    assert record.text == greedy_text(prompt_of(STORY), 20)


@pytest.mark.parametrize("model", ["vllm", "ensemble"])
@pytest.mark.parametrize(("num_before", "least"), [(2, 8), (8, 2), (10, None), (11, None), (12, None)])
async def test_what_a_continuation_asks_for(
    server: TritonServer, model: str, num_before: int, least: int | None
) -> None:
    """It asks for what is left of the least number of tokens, and draws with another seed than the beginning."""
    part = Generated("and so", [], num_before)
    config: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 10, "temperature": 0.5, "seed": 7}
    async with connect(server, model) as engine:
        log = await log_of(server, lambda: run(engine, make_request(prompt_of(STORY), part, **config)))
    for sent in requests_in(log, model):
        asked = json.loads(sent["sampling_parameters"][0]) if model == "vllm" else {n: v[0] for n, v in sent.items()}
        assert asked.get("min_tokens") == least
        assert asked["seed"] == 7 + num_before


async def test_continuation_of_tokens_by_text(server: TritonServer) -> None:
    """TurboMind continues a text whose tokens it is not told."""
    async with connect(server, "turbomind") as engine:
        whole = await run(engine, make_request(prompt_of(STORY), max_new_tokens=16))
        text = greedy_text(prompt_of(STORY), 7)
        rest = await run(engine, make_request(prompt_of(STORY), Generated(text, [], 7), max_new_tokens=16))
    assert text + rest.text == whole.text
    assert rest.usage == whole.usage


@pytest.mark.parametrize("model", ["vllm", "ensemble"])
async def test_continuation_by_another_dialect(server: TritonServer, model: str) -> None:
    """What TurboMind began, which counts every token, a model that is told text alone ends: at halves of emoji too."""
    request = make_request(prompt_of("😀 🚀"), max_new_tokens=24)
    async with connect(server, "turbomind") as engine, connect(server, model) as other:
        whole = await run(engine, request)
        for cut in range(1, len(whole.deltas)):
            part = whole.generated(cut)
            rest = await run(other, msgspec.structs.replace(request, generated=part))
            assert part.text + rest.text == whole.text
            assert rest.usage.completion_tokens == 24


async def test_tokens_of_another_model(server: TritonServer) -> None:
    """Token ids that do not spell the text are refused."""
    async with connect(server, "turbomind") as engine:
        with pytest.raises(InvalidRequestError, match="do not spell"):
            await run(engine, make_request(STORY, Generated("and so", [101, 102], 2)))
        assert engine.statistics().num_running == 0


# What goes wrong


@pytest.mark.parametrize("model", ALL_MODELS)
async def test_failing_model(server: TritonServer, model: str) -> None:
    """A model that fails in the middle of an answer is an error of the server, after what it had said."""
    record = Record()
    async with connect(server, model) as engine:
        with pytest.raises(UpstreamError):
            await engine.generate(make_request(prompt_of("[[fail=9]] [[pace=0.01]]"), max_new_tokens=30), record.emit)
        assert record.deltas
        assert all(delta.finish_reason is None for delta in record.deltas)
        assert (await run(engine, make_request(STORY, max_new_tokens=2))).text


@pytest.mark.parametrize("model", [*TEXT_MODELS, "unary"])
async def test_over_long_prompt(server: TritonServer, model: str) -> None:
    """What the server says of an over-long prompt is recognised, whichever server it is."""
    async with connect(server, model, session_len=100_000) as engine:
        with pytest.raises(ContextLengthError, match="1024"):
            await run(engine, make_request("word " * 2000))


@pytest.mark.parametrize(
    ("model", "order", "error"),
    [
        ("vllm", "nonsense", ProtocolError),
        ("tensorrt_llm", "nonsense", ProtocolError),
        ("vllm", "mute", ProtocolError),
        ("unary", "mute", ProtocolError),
        ("vllm", "abort", UpstreamError),
    ],
)
async def test_nonsense(server: TritonServer, model: str, order: str, error: type[Exception]) -> None:
    """An answer that cannot be understood is an error, not a text."""
    async with connect(server, model) as engine:
        with pytest.raises(error):
            await run(engine, make_request(prompt_of(f"[[{order}]]"), max_new_tokens=8))


@pytest.mark.parametrize("model", ["vllm", "tensorrt_llm"])
@pytest.mark.parametrize("order", ["cut", "lapse"])
async def test_an_answer_that_is_cut_off(server: TritonServer, model: str, order: str) -> None:
    """An answer that ends without the reason that was asked for is an error, after what came of it."""
    record = Record()
    request = make_request(prompt_of(f"[[{order}=5]] [[pace=0.01]]"), max_new_tokens=12)
    async with connect(server, model) as engine:
        with pytest.raises(UpstreamError, match="without a reason"):
            await engine.generate(request, record.emit)
    assert record.deltas
    assert all(delta.finish_reason is None for delta in record.deltas)


@pytest.mark.parametrize("at_token", [1, 5])
async def test_a_sequence_that_is_cut_off(server: TritonServer, at_token: int) -> None:
    """TurboMind's call that ends before the last token is an error, after what came; the session goes on then."""
    record = Record()
    prompt = prompt_of(f"[[cut={at_token}]] [[pace=0.01]]")
    async with connect(server, "turbomind") as engine:
        with pytest.raises(ProtocolError, match="in its middle"):
            await engine.generate(msgspec.structs.replace(make_request(prompt), session_id="s"), record.emit)
        assert len(record.token_ids) == at_token - 1
        assert all(delta.finish_reason is None for delta in record.deltas)
        request = make_request(prompt_of(STORY), max_new_tokens=5)
        whole = await run(engine, msgspec.structs.replace(request, session_id="s"))
    assert whole.text == greedy_text(prompt_of(STORY), 5)


async def test_silence(server: TritonServer) -> None:
    """A server that goes silent within an answer is given up after `idle_timeout_s`, and one that is slow is not."""

    async def check(model: str) -> None:
        record = Record()
        async with connect(server, model, idle_timeout_s=SILENCE_S) as engine:
            slow = make_request(prompt_of("[[pace=2]]"), max_new_tokens=10)  # 18 s
            answer = asyncio.create_task(run(engine, slow))
            with pytest.raises(RequestTimeoutError, match="idle_timeout_s"):
                await engine.generate(make_request(prompt_of("[[hang=5]]"), max_new_tokens=8), record.emit)
            assert record.deltas
            assert (await answer).usage.completion_tokens == 10

    await asyncio.gather(*map(check, ALL_MODELS))


async def test_requests_may_wait_for_their_turn_in_the_server(server: TritonServer) -> None:
    """Before its first token a request is left where it is while others get theirs, and no longer."""

    async def check(model: str) -> None:
        busy = Record()
        async with connect(server, model, idle_timeout_s=SILENCE_S) as engine:
            request = make_request(prompt_of("[[pace=0.05]]"), max_new_tokens=900)
            running = asyncio.create_task(engine.generate(request, busy.emit))
            waiting = asyncio.create_task(run(engine, make_request(prompt_of("[[hang=1]]"), max_new_tokens=3)))
            await until(lambda: bool(busy.deltas) and busy.deltas[-1].num_tokens >= 400)  # 20 s
            assert not waiting.done()
            running.cancel()
            with pytest.raises(RequestTimeoutError, match="idle_timeout_s"):
                await waiting
            await asyncio.wait([running])

    await asyncio.gather(*map(check, ["vllm", "turbomind"]))


@pytest.mark.parametrize("model", TEXT_MODELS)
async def test_cancellation_reaches_the_server(server: TritonServer, model: str) -> None:
    """The server stops working on a request that was cancelled."""
    record = Record()
    async with connect(server, model) as engine:
        num_lines = len(server.journal())
        request = make_request(prompt_of(f"[[pace=0.05]] {STORY}"), max_new_tokens=1000)
        task = asyncio.create_task(engine.generate(request, record.emit))
        await record.wait(3)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await until(lambda: {"cancelled"} == {line.get("reason") for line in server.journal()[num_lines:]} - {None})


async def test_failing_receiver(server: TritonServer) -> None:
    """When a receiver raises, `generate` raises that, and the server stops."""

    def fail(_: object) -> None:
        raise KeyError("receiver")

    async with connect(server) as engine:
        num_lines = len(server.journal())
        with pytest.raises(KeyError, match="receiver"):
            await engine.generate(make_request(prompt_of(f"[[pace=0.05]] {STORY}"), max_new_tokens=1000), fail)
        await until(lambda: any(line.get("reason") == "cancelled" for line in server.journal()[num_lines:]))


async def test_dead_back_end(repository: Path) -> None:
    """Requests at a back end that dies end by their idle timeout: the server itself never ends them."""
    with TritonServer(repository, models=["vllm"]) as server:
        async with connect(server, idle_timeout_s=SILENCE_S) as engine:
            record = Record()
            request = make_request(prompt_of(f"[[pace=0.05]] {STORY}"), max_new_tokens=1000)
            task = asyncio.create_task(engine.generate(request, record.emit))
            await record.wait(3)
            for child in psutil.Process(server.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # it has ended with another
                    child.kill()
            with pytest.raises((RequestTimeoutError, UpstreamError)):
                await task


async def test_server_back_at_start(repository: Path) -> None:
    """An engine that starts while the server is down waits for it."""
    with ExitStack() as stack:
        server = stack.push(TritonServer(repository, models=["vllm"]))
        engine = TritonEngine(TritonConfig(address=server.address, model_name="vllm", start_timeout_s=250))
        starting = asyncio.create_task(engine.start())
        _, pending = await asyncio.wait([starting], timeout=1)
        assert pending
        await asyncio.to_thread(server.start)
        assert (await starting).model == "vllm"
        assert (await run(engine, make_request(prompt_of(STORY), max_new_tokens=2))).text
        await engine.close()


async def test_server_killed(repository: Path) -> None:
    """A server that dies fails what runs and the health check; when it is back, so is the engine."""
    with TritonServer(repository, models=["vllm", *TURBOMIND]) as server:
        async with connect(server) as engine, connect(server, "turbomind") as other:
            records = [Record(), Record()]
            request = make_request(prompt_of(f"[[pace=0.05]] {STORY}"), max_new_tokens=1000)
            tasks = [
                asyncio.create_task(each.generate(request, record.emit))
                for each, record in zip([engine, other], records, strict=True)
            ]
            for record in records:
                await record.wait(2)
            server.kill()
            for task in tasks:
                with pytest.raises(UpstreamError):
                    await task
            for each in (engine, other):
                with pytest.raises(UpstreamError):
                    await each.check_health()
                with pytest.raises(UpstreamError):
                    await run(each, request)
            await asyncio.to_thread(server.start)
            for each in (engine, other):
                while True:
                    try:
                        await each.check_health()
                    except UpstreamError:
                        await asyncio.sleep(0.05)
                    else:
                        break
                assert (await run(each, make_request(prompt_of(STORY), max_new_tokens=2))).text


async def test_unloaded_model(repository: Path) -> None:
    """A model that is unloaded is an error of the server that names it, and works again when it is back."""
    with TritonServer(repository, models=["vllm"]) as server:
        async with connect(server) as engine, InferenceServerClient(server.address) as control:
            tasks = [
                asyncio.create_task(run(engine, make_request(prompt_of(f"{n}"), max_new_tokens=200))) for n in range(8)
            ]
            await until(lambda: engine.statistics().num_tokens > 0)
            await control.unload_model("vllm")
            await asyncio.wait(tasks)
            for task in tasks:
                assert task.exception() is None or isinstance(task.exception(), UpstreamError)
            with pytest.raises(UpstreamError, match="vllm"):
                await run(engine, make_request(STORY))
            with pytest.raises(UpstreamError, match="not loaded the model 'vllm'"):
                await engine.check_health()
            await control.load_model("vllm")
            await engine.check_health()
            assert (await run(engine, make_request(prompt_of(STORY), max_new_tokens=2))).text


async def test_changed_model(repository: Path, tmp_path: Path) -> None:
    """A model that takes other tensors than it took fails one request, which may be sent again, and not the next."""
    folder = make_repository(tmp_path / "models", {"vllm": ("vllm", {})})
    with TritonServer(folder) as server:
        async with connect(server) as engine, InferenceServerClient(server.address) as control:
            config = folder / "vllm" / "config.pbtxt"
            config.write_text(config.read_text().replace('"return_finish_reason"', '"other"'))
            await control.load_model("vllm")
            with pytest.raises(ProtocolError, match="return_finish_reason"):
                await run(engine, make_request(STORY))
            assert (await run(engine, make_request(prompt_of(STORY), max_new_tokens=2))).text


def test_every_status_is_mapped() -> None:
    """Each status that gRPC has is in the table, and nothing else is."""
    assert set(STATUSES) == {status.name for status in grpc.StatusCode}


@pytest.mark.parametrize("status", grpc.StatusCode)
def test_every_error_is_mapped(status: grpc.StatusCode) -> None:
    """Each status becomes its error, with what the server said."""
    engine = TritonEngine(TritonConfig(address="nowhere:1", model_name="x"))
    metadata = grpc.aio.Metadata()
    engine._down = None
    failure = engine._failed(grpc.aio.AioRpcError(status, metadata, metadata, "reason"))
    assert isinstance(failure, CallFailedError)
    mapped = engine._mapped(failure)
    assert type(mapped) is STATUSES[status.name]
    assert "reason" in str(mapped)


def test_every_error_class_is_known() -> None:
    """No error of gRPC has a base that is not caught."""
    caught = (grpc.RpcError, grpc.aio.BaseError)
    for module in (grpc, grpc.aio):
        for found in vars(module).values():
            if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, Warning):
                is_servers = "Abort" in found.__name__  # raised in a server's handler, which this is not
                is_local = found.__module__.startswith("grpc") and "Future" in found.__name__  # of gRPC's blocking API
                assert issubclass(found, caught) or is_servers or is_local, found


@pytest.mark.parametrize("before_start", [True, False])
async def test_not_running(server: TritonServer, before_start: bool) -> None:
    """An engine that has not started, or was closed, says so."""
    engine = TritonEngine(TritonConfig(address=server.address, model_name="vllm"))
    if not before_start:
        await engine.start()
        await engine.close()
    match = "not started" if before_start else "closed"
    with pytest.raises(EngineError, match=match):
        await run(engine, make_request(STORY))
    with pytest.raises(EngineError, match=match):
        await engine.check_health()


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate authority, and a key and a certificate of it for a server and for a client."""
    folder = tmp_path_factory.mktemp("certificates")
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)

    def write(name: str, own: ec.EllipticCurvePrivateKey) -> None:
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test" if own is key else name)]))
            .issuer_name(issuer)
            .public_key(own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=own is key, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
            .sign(key, SHA256())
        )
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        encoded = own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / f"{name}.key").write_bytes(encoded)

    write("ca", key)
    for name in ("server", "client"):
        write(name, ec.generate_private_key(ec.SECP256R1()))
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["tls", "mutual"])
def tls_server(request: pytest.FixtureRequest, repository: Path, certificates: Path) -> Iterator[TritonServer]:
    """A server that speaks TLS only, and one that wants its clients' certificates too."""
    options = [
        "--grpc-use-ssl=true",
        f"--grpc-server-cert={certificates / 'server.pem'}",
        f"--grpc-server-key={certificates / 'server.key'}",
        f"--grpc-root-cert={certificates / 'ca.pem'}",
        f"--grpc-use-ssl-mutual={str(request.param).lower()}",
    ]
    with TritonServer(repository, models=["vllm"], options=options) as server:
        server.mutual = request.param  # type: ignore[attr-defined]
        yield server


async def test_tls(tls_server: TritonServer, certificates: Path) -> None:
    """With the right certificates the server answers."""
    files = {"ca_file": str(certificates / "ca.pem")}
    if tls_server.mutual:  # type: ignore[attr-defined]
        files |= {"key_file": str(certificates / "client.key"), "certificate_file": str(certificates / "client.pem")}
    async with connect(tls_server, ssl=True, **files) as engine:
        assert (await run(engine, make_request(prompt_of(STORY), max_new_tokens=2))).text


async def test_tls_without_a_certificate(tls_server: TritonServer, certificates: Path) -> None:
    """Without what the server or this client wants to see, the start fails and speaks of TLS."""
    mutual = tls_server.mutual  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"ca_file": str(certificates / "ca.pem")} if mutual else {}
    with pytest.raises(EngineStartError, match=r"ca_file|ssl"):
        async with connect(tls_server, ssl=True, start_timeout_s=1, **settings):
            pass


async def test_plain_client_of_a_tls_server(tls_server: TritonServer) -> None:
    """A client without TLS at a server with TLS is an error that speaks of it."""
    with pytest.raises(EngineStartError, match="ssl"):
        async with connect(tls_server, start_timeout_s=0.5):
            pass


async def test_tls_client_of_a_plain_server(server: TritonServer, certificates: Path) -> None:
    """A client with TLS at a server without is an error at once that speaks of it."""
    with pytest.raises(EngineStartError, match="TLS"):
        async with connect(server, ssl=True, ca_file=str(certificates / "ca.pem")):
            pass


async def test_no_certificate_file(server: TritonServer) -> None:
    """A file that is not there is an error that names it."""
    with pytest.raises(EngineStartError, match=r"nowhere\.pem"):
        async with connect(server, ssl=True, ca_file="/nowhere.pem"):
            pass


# TurboMind's sequences


def turn(prompt: str, *, session: str = "s", end: bool = False, limit: int = 12, **settings: Any) -> Request:
    """Return one turn of a session."""
    request = make_request(prompt, max_new_tokens=limit, **settings)
    return msgspec.structs.replace(request, session_id=session, session_end=end)


def sent_in(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what matters of the requests to turbomind: their sequence's number, flags, step and number of tokens."""
    names = {"START": "start", "END": "end", "STOP": "stop", "step": "step", "input_lengths": "num", "CORRID": "number"}
    return [
        {short: sent[name][0] for name, short in names.items() if name in sent}
        for sent in requests_in(log, "turbomind")
    ]


async def test_session(server: TritonServer) -> None:
    """A turn sends only what the server does not have, and the text is that of the whole transcript."""
    async with connect(server, "turbomind") as engine:
        transcript = prompt_of(STORY)
        log = []
        for number in range(3):
            record = Record()
            request = turn(transcript, end=number == 2)
            log += await log_of(server, lambda request=request, record=record: engine.generate(request, record.emit))
            assert record.text == greedy_text(transcript, 12)
            transcript += f"{record.text} and question {number}"
        first, second, third = sent_in(log)
    assert first == {"start": 1, "end": 0, "stop": 0, "step": 0, "num": 6, "number": first["number"]}
    assert second == {"start": 0, "end": 0, "stop": 0, "step": 18, "num": 3, "number": first["number"]}
    assert third == {"start": 0, "end": 1, "stop": 0, "step": 33, "num": 3, "number": first["number"]}


@pytest.mark.parametrize("ending", ["stop word", "end of sequence"])
async def test_session_after_an_end(server: TritonServer, ending: str) -> None:
    """What ended an answer is no part of what the server is taken to have."""
    async with connect(server, "turbomind") as engine:
        settings: dict[str, Any] = {"limit": 300}
        transcript = STORY
        if ending == "stop word":
            transcript = prompt_of(STORY)
            settings["stop_words"] = [greedy_text(transcript, 9)[-8:]]
        record = await run(engine, turn(transcript, **settings))
        assert record.finish_reason == "stop"
        transcript += f"{record.text} [[endless]] and then"
        second = Record()
        log = await log_of(server, lambda: engine.generate(turn(transcript), second.emit))
        assert second.text == greedy_text(transcript, 12)
        (sent,) = sent_in(log)
        assert sent["start"] == 0
        assert sent["num"] < 12


async def test_session_with_another_history(server: TritonServer) -> None:
    """A prompt that does not begin with what the server has is sent whole, and so is one with a seed."""
    async with connect(server, "turbomind") as engine:
        await run(engine, turn(prompt_of(STORY)))
        for request in (turn(prompt_of("Another story")), turn(prompt_of(STORY), temperature=1.0, seed=7)):
            log = await log_of(server, lambda request=request: run(engine, request))
            assert [sent["start"] for sent in sent_in(log)] == [1]


async def test_session_after_a_cancellation(server: TritonServer) -> None:
    """A cancelled turn is stopped in the server, and the next one goes on from before it."""
    async with connect(server, "turbomind") as engine:
        first = await run(engine, turn(prompt_of(STORY)))
        transcript = prompt_of(STORY) + first.text
        record = Record()
        num_lines = len(server.journal())
        more = turn(f"{transcript} [[pace=0.05]] tell more", limit=900)
        task = asyncio.create_task(engine.generate(more, record.emit))
        await record.wait(3)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert [line["reason"] for line in server.journal()[num_lines:] if line["event"] == "end"] == ["stopped"]
        transcript += " stop, rather this"
        second = Record()
        log = await log_of(server, lambda: engine.generate(turn(transcript), second.emit))
        assert second.text == greedy_text(transcript, 12)
        (sent,) = sent_in(log)
        assert (sent["start"], sent["step"], sent["num"]) == (0, 18, 3)


async def test_session_after_a_restart(repository: Path) -> None:
    """A server that has lost a sequence gets the whole of it again."""
    with TritonServer(repository, models=TURBOMIND) as server:
        async with connect(server, "turbomind") as engine, InferenceServerClient(server.address) as control:
            first = await run(engine, turn(prompt_of(STORY)))
            transcript = f"{prompt_of(STORY)}{first.text} and then"
            await control.load_model("turbomind", config=None)
            await control.unload_model("turbomind")
            await until_ready(control, ready=False)
            await control.load_model("turbomind")
            second = Record()
            log = await log_of(server, lambda: engine.generate(turn(transcript), second.emit))
            assert second.text == greedy_text(transcript, 12)
            assert [sent["start"] for sent in sent_in(log)] == [0, 1]
            third = f"{transcript}{second.text} and on"
            log = await log_of(server, lambda: run(engine, turn(third)))
            assert [sent["start"] for sent in sent_in(log)] == [0]


async def until_ready(control: InferenceServerClient, *, ready: bool) -> None:
    """Return when turbomind is ready, or is not."""
    while await control.is_model_ready("turbomind") is not ready:
        await asyncio.sleep(0.02)


async def test_session_out_of_limit(server: TritonServer) -> None:
    """A transcript that outgrows the context is an error, and the session goes on without that turn."""
    async with connect(server, "turbomind") as engine:
        first = await run(engine, turn(prompt_of(STORY)))
        transcript = prompt_of(STORY) + first.text
        with pytest.raises(ContextLengthError, match="1024"):
            await run(engine, turn(transcript + " word" * 1010))
        record = Record()
        log = await log_of(server, lambda: engine.generate(turn(f"{transcript} and then"), record.emit))
        assert record.text == greedy_text(f"{transcript} and then", 12)
        assert [sent["start"] for sent in sent_in(log)] == [0]


async def test_context_in_the_servers_words(repository: Path) -> None:
    """TurboMind's own word for an over-long sequence is recognised too."""
    with TritonServer(repository, models=TURBOMIND) as server:
        async with connect(server, "turbomind") as engine:
            assert engine._turbomind is not None
            engine._turbomind._session_len = 5000
            with pytest.raises(ContextLengthError):
                await run(engine, make_request("word " * 2000))


async def test_two_requests_of_one_session(server: TritonServer) -> None:
    """Requests of one session at the same time take turns; the server never sees two of them."""
    prompts = [prompt_of(f"{STORY} {number}") for number in range(4)]
    async with connect(server, "turbomind") as engine:
        num_lines = len(server.journal())
        requests = [turn(prompt, end=number % 2 == 1) for number, prompt in enumerate(prompts)]
        records = await asyncio.gather(*(run(engine, request) for request in requests))
    assert [record.text for record in records] == [greedy_text(prompt, 12) for prompt in prompts]
    assert not [line for line in server.journal()[num_lines:] if line["event"] == "refused"]


async def test_two_clients_on_one_session(server: TritonServer) -> None:
    """Sessions of one name at two clients of one server are different sequences there."""
    prompts = [prompt_of(f"{STORY} {number}") for number in range(2)]
    async with connect(server, "turbomind") as one, connect(server, "turbomind") as other:
        for _ in range(2):
            records = await asyncio.gather(
                *(run(engine, turn(prompt)) for engine, prompt in zip((one, other), prompts, strict=True))
            )
            assert [record.text for record in records] == [greedy_text(prompt, 12) for prompt in prompts]
            prompts = [f"{prompt}{record.text} and on" for prompt, record in zip(prompts, records, strict=True)]


async def test_number_of_sessions(server: TritonServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session that was used longest ago is ended to make room, and those that remain at the close."""
    monkeypatch.setattr(triton_turbomind, "MAX_SEQUENCES", 2)
    num_lines = len(server.journal())
    async with connect(server, "turbomind") as engine:
        for session in ("a", "b", "a", "c"):
            await run(engine, turn(prompt_of(STORY), session=session))
        sent = sent_in(server.journal()[num_lines:])
    a, b = sent[0]["number"], sent[1]["number"]
    assert [each["number"] for each in sent if each["end"]] == [b]
    closed = sent_in(server.journal()[num_lines:])[len(sent) :]
    assert all(each["end"] for each in closed)
    assert {each["number"] for each in closed} == {a, sent[-1]["number"]}


async def test_requests_without_session(server: TritonServer) -> None:
    """A request of no session has a sequence of its own, which ends with it."""
    async with connect(server, "turbomind") as engine:
        log = await log_of(
            server,
            lambda: asyncio.gather(*(run(engine, make_request(prompt_of(STORY), max_new_tokens=3)) for _ in range(3))),
        )
    sent = sent_in(log)
    assert [(each["start"], each["end"]) for each in sent] == [(1, 1)] * 3
    assert len({each["number"] for each in sent}) == 3
