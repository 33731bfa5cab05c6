"""The faces of the seed: their arguments, and what all of them do alike."""

import inspect
from collections.abc import Callable, Iterator

import pytest

from raylm import (
    AsyncLMDeployClient,
    AsyncLMDeployPipeline,
    AsyncLMDeployServer,
    AsyncTritonClient,
    Chatbot,
    Fault,
    LMDeployClient,
    LMDeployPipeline,
    LMDeployServer,
    SimulatedConfig,
    Status,
    TritonClient,
    TritonConfig,
)
from raylm.engines.simulated import greedy_text
from raylm.errors import (
    InvalidRequestError,
    PartialFailureError,
    RequestTimeoutError,
    SessionNotFoundError,
)

FACES: list[Callable[..., object]] = [LMDeployPipeline, LMDeployServer, LMDeployClient, TritonClient]
SAMPLING = {
    "meta_template": None,
    "max_new_tokens": 512,
    "top_p": 0.8,
    "top_k": 40,
    "temperature": 0.8,
    "repetition_penalty": 1.0,
    "stop_words": None,
}
OWN = {
    LMDeployPipeline: {"model_name": None, "tp": 1},
    LMDeployServer: {"model_name": None, "server_name": "0.0.0.0", "server_port": 23333, "tp": 1},  # noqa: S104
    LMDeployClient: {"model_name": None},
    TritonClient: {"session_len": 32768},
}
FIRST = {
    LMDeployPipeline: ["path", "model_name", "tp"],
    LMDeployServer: ["path", "model_name", "server_name", "server_port", "tp"],
    LMDeployClient: ["url", "model_name"],
    TritonClient: ["tritonserver_addr", "model_name", "session_len"],
}


def defaults(function: Callable[..., object]) -> dict[str, object]:
    """Return a function's parameters that have a default, with it."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


@pytest.mark.parametrize("face", FACES)
def test_constructors_have_the_seeds_arguments(face: Callable[..., object]) -> None:
    """Every argument of the seed is there, with its default and in its order."""
    expected = {**SAMPLING, **OWN[face]}
    assert {name: default for name, default in defaults(face).items() if name in expected} == expected
    names = list(inspect.signature(face).parameters)
    assert names[: len(FIRST[face])] == FIRST[face]
    assert [name for name in names if name in SAMPLING] == list(SAMPLING)


def test_the_third_argument_of_a_triton_client(cluster: str) -> None:
    """It is the length of a session, as in the seed."""
    (engine,) = AsyncTritonClient("127.0.0.1:1", "model", 4096)._engines
    assert isinstance(engine, TritonConfig)
    assert engine.session_len == 4096


@pytest.mark.parametrize(
    ("face", "async_face"),
    [
        (LMDeployPipeline, AsyncLMDeployPipeline),
        (LMDeployServer, AsyncLMDeployServer),
        (LMDeployClient, AsyncLMDeployClient),
        (TritonClient, AsyncTritonClient),
    ],
)
def test_both_kinds_of_a_face_take_the_same(face: Callable[..., object], async_face: Callable[..., object]) -> None:
    """A face and its async form have one signature."""
    assert inspect.signature(face) == inspect.signature(async_face)


@pytest.mark.parametrize("face", [Chatbot, AsyncLMDeployPipeline])
def test_calls_have_the_seeds_arguments(face: type[Chatbot]) -> None:
    """`generate` and `stream_chat` take every argument of the seed, on all faces."""
    common = {
        "session_id": None,
        "request_id": None,
        "sequence_start": True,
        "sequence_end": True,
        "ignore_eos": False,
        "timeout": 30,
    }
    assert defaults(face.generate) == {**common, "return_dict": False}
    assert defaults(face.stream_chat) == {**common, "stream": True}


@pytest.mark.parametrize(
    ("face", "wrong"),
    [
        (AsyncLMDeployServer, {"path": "m", "replicas": 2}),
        (AsyncLMDeployServer, {"path": "m", "backend": "turbomind", "device": "cpu"}),
        (AsyncLMDeployServer, {"path": ""}),
        (AsyncLMDeployClient, {"url": "10.0.0.5:23333"}),
        (AsyncLMDeployClient, {"url": []}),
        (AsyncTritonClient, {"tritonserver_addr": "10.0.0.5", "model_name": "m"}),
        (AsyncTritonClient, {"tritonserver_addr": "h:1", "model_name": "m", "top_p": 1.5}),
    ],
)
def test_wrong_arguments_raise(face: Callable[..., object], wrong: dict[str, object]) -> None:
    """What cannot work raises InvalidRequestError before anything is started."""
    with pytest.raises(InvalidRequestError):
        face(**wrong)


@pytest.fixture(scope="module")
def chatbot(cluster: str) -> Iterator[Chatbot]:
    """A simulated engine."""
    with Chatbot([SimulatedConfig(tokens_per_s=200)], temperature=0, max_new_tokens=5) as chatbot:
        yield chatbot


def test_generate_keeps_a_session_of_raw_text(chatbot: Chatbot) -> None:
    """A prompt that continues a session is answered as the text of all its turns."""
    first = chatbot.generate("one", session_id=1, sequence_end=False)
    second = chatbot.generate(" two", session_id=1, sequence_start=False, sequence_end=True)
    assert first == greedy_text("one", 5)
    assert second == greedy_text(f"one{first} two", 5)
    with pytest.raises(SessionNotFoundError):
        chatbot.generate("three", session_id=1, sequence_start=False)


def test_raw_text_and_conversation_do_not_mix(chatbot: Chatbot) -> None:
    """A session begun with `generate` does not go on with `stream_chat`, nor the other way round."""
    chatbot.generate("one", session_id="raw", sequence_end=False)
    with pytest.raises(InvalidRequestError, match="raw text"):
        list(chatbot.stream_chat("two", session_id="raw", sequence_start=False))
    list(chatbot.stream_chat("one", session_id="chat", sequence_end=False))
    with pytest.raises(InvalidRequestError, match="conversation"):
        chatbot.generate("two", session_id="chat", sequence_start=False)
    assert [message["role"] for message in chatbot.history("raw")] == ["raw", "assistant"]


def test_a_list_takes_the_arguments_of_a_session(chatbot: Chatbot) -> None:
    """Each prompt of a list is a session that begins and ends with the call; going on with one is refused."""
    assert chatbot.generate(["a", "b"], session_id=2, request_id="x") == [greedy_text("a", 5), greedy_text("b", 5)]
    with pytest.raises(InvalidRequestError, match="one prompt at a time"):
        chatbot.generate(["a", "b"], session_id=2, sequence_end=False)


def test_a_request_id_may_be_used_again(chatbot: Chatbot) -> None:
    """Requests of one name are different requests."""
    texts = [chatbot.generate(prompt, request_id="same") for prompt in ("a", "b")]
    assert texts == [greedy_text("a", 5), greedy_text("b", 5)]


def test_stream_false_yields_once(chatbot: Chatbot) -> None:
    """With `stream=False` there is the end alone, with the whole text."""
    (step,) = chatbot.stream_chat("hello", stream=False)
    assert step == (Status.END, greedy_text("user: hello\n", 5), 5)


def test_a_triton_server_needs_a_meta_template(cluster: str) -> None:
    """Messages for a pool with a Triton server raise where no template makes a prompt of them."""
    chatbot = AsyncTritonClient("127.0.0.1:1", "model")
    assert isinstance(chatbot._engines[0], TritonConfig)
    with pytest.raises(InvalidRequestError, match="meta_template"):
        chatbot.request(messages=[{"role": "user", "content": "hello"}])


def test_a_silent_list_times_out(cluster: str) -> None:
    """When no prompt of a list gets a token for `timeout`, those that are left fail, and what was done is kept."""
    engine = SimulatedConfig(tokens_per_s=200, faults=(Fault(match="hang", at_token=3, action="hang"),))
    with Chatbot([engine], temperature=0, max_new_tokens=5) as chatbot, pytest.raises(PartialFailureError) as caught:
        chatbot.generate(["hang now", "hang too"], timeout=1.0)
    assert all(isinstance(result, RequestTimeoutError) for result in caught.value.results)
