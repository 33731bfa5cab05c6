"""The seed's LMDeployPipeline as its users call it, on the simulated engine."""

import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest

from raylm import (
    INTERNLM2_META,
    APIServerConfig,
    AsyncLMDeployClient,
    AsyncLMDeployPipeline,
    AsyncLMDeployServer,
    AsyncTritonClient,
    Fault,
    LMDeployConfig,
    LMDeployPipeline,
    OpenVINOConfig,
    SessionConfig,
    SimulatedConfig,
    Status,
)
from raylm.chatbot import LoopThread
from raylm.config import EngineConfig
from raylm.engines.simulated import greedy_text
from raylm.errors import (
    EngineStartError,
    InvalidRequestError,
    NoActorError,
    PartialFailureError,
    PlacementError,
    PoisonRequestError,
    SessionBusyError,
    SessionNotFoundError,
)

ENGINE = SimulatedConfig(tokens_per_s=500, max_context=200)


@pytest.fixture(scope="module")
def chatbot(cluster: str) -> Iterator[LMDeployPipeline]:
    """Two simulated replicas, greedy, five tokens an answer."""
    with LMDeployPipeline(
        "simulated",
        replicas=2,
        temperature=0,
        top_k=None,
        max_new_tokens=5,
        backend_config=ENGINE,
        session_config=SessionConfig(turn_timeout_s=300),  # a turn is held though the test stands still for some time
    ) as pipeline:
        yield pipeline


def user(content: str) -> dict[str, str]:
    """Return a message of the user."""
    return {"role": "user", "content": content}


def test_one_prompt_one_text(chatbot: LMDeployPipeline) -> None:
    """A string in, a string out, without any template."""
    assert chatbot.generate("hello") == greedy_text("hello", 5)


def test_a_list_keeps_its_order(chatbot: LMDeployPipeline) -> None:
    """10,000 prompts in one call come back in order."""
    prompts = [f"row {row}" for row in range(10_000)]
    assert chatbot.generate(prompts, max_new_tokens=2) == [greedy_text(prompt, 2) for prompt in prompts]


def test_an_empty_list_is_an_empty_list(chatbot: LMDeployPipeline) -> None:
    """No prompts, no answers."""
    assert chatbot.generate([]) == []


def test_parameters_can_be_overridden(chatbot: LMDeployPipeline) -> None:
    """A parameter given to a call counts for that call alone."""
    assert chatbot.generate("hello", max_new_tokens=2) == greedy_text("hello", 2)
    assert chatbot.generate("hello") == greedy_text("hello", 5)


def test_stop_words_end_the_text(chatbot: LMDeployPipeline) -> None:
    """Text ends before a stop word, and its finish reason says so."""
    words = greedy_text("hello", 5).split()
    answer = chatbot.generate("hello", stop_words=words[2], return_dict=True)
    assert answer["text"] == " ".join(words[:2]) + " "
    assert answer["finish_reason"] == "stop"


def test_return_dict_tells_everything(chatbot: LMDeployPipeline) -> None:
    """`return_dict=True` gives text, usage, finish reason and receipt, ready for JSON."""
    answer = json.loads(json.dumps(chatbot.generate(["one two"], return_dict=True)))[0]
    assert answer["text"] == greedy_text("one two", 5)
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 5}
    assert answer["finish_reason"] == "length"
    assert answer["receipt"]["engine"] == "simulated"


@pytest.mark.parametrize(
    ("inputs", "named"),
    [("", "empty"), (["fine", ""], r"inputs\[1\]"), ([1], r"inputs\[0\]"), (None, "inputs"), ("\ud800", "Unicode")],
)
def test_wrong_inputs_raise(chatbot: LMDeployPipeline, inputs: Any, named: str) -> None:
    """Inputs that are no prompts raise InvalidRequestError that says which one and why."""
    with pytest.raises(InvalidRequestError, match=named):
        chatbot.generate(inputs)


@pytest.mark.parametrize("wrong", [{"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"tpo_k": 3}])
def test_wrong_parameters_raise(chatbot: LMDeployPipeline, wrong: dict[str, Any]) -> None:
    """A wrong or unknown parameter raises InvalidRequestError that names it, from every method."""
    name = next(iter(wrong))
    with pytest.raises(InvalidRequestError, match=name):
        chatbot.generate("hello", **wrong)
    with pytest.raises(InvalidRequestError, match=name):
        chatbot.chat([user("hello")], **wrong)
    with pytest.raises(InvalidRequestError, match=name):
        next(chatbot.stream_chat([user("hello")], **wrong))


def test_chat_applies_the_template(cluster: str) -> None:
    """`chat` renders messages with the meta template before it generates."""
    with LMDeployPipeline(
        "simulated", meta_template=INTERNLM2_META, temperature=0, max_new_tokens=5, backend_config=ENGINE
    ) as pipeline:
        prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
        assert pipeline.chat([user("hello")]) == greedy_text(prompt, 5)
        with pytest.raises(InvalidRequestError, match="wizard"):
            pipeline.chat([{"role": "wizard", "content": "hello"}])


def test_chat_takes_many_conversations(chatbot: LMDeployPipeline) -> None:
    """A list of conversations comes back as a list of answers."""
    answers = chatbot.chat([[user("one")], [user("two")]])
    assert answers == [greedy_text(f"user: {text}\n", 5) for text in ("one", "two")]


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": 5}], 5, ["hello"]])
def test_wrong_messages_raise(chatbot: LMDeployPipeline, messages: Any) -> None:
    """Messages of a wrong form raise InvalidRequestError before anything is sent."""
    with pytest.raises(InvalidRequestError):
        chatbot.chat(messages)
    with pytest.raises(InvalidRequestError):
        next(chatbot.stream_chat(messages))


def test_stream_chat_streams(chatbot: LMDeployPipeline) -> None:
    """Statuses are STREAM_ING and then END, the text grows, and n_tokens counts up to the last."""
    steps = list(chatbot.stream_chat([user("hello")], session_id=2967, request_id="1"))
    assert [status for status, _, _ in steps] == [Status.STREAM_ING] * (len(steps) - 1) + [Status.END]
    assert all(later.startswith(earlier) for (_, earlier, _), (_, later, _) in pairwise(steps))
    assert steps[-1][1:] == (greedy_text("user: hello\n", 5), 5)


def test_a_turn_counts_when_its_end_is_told(chatbot: LMDeployPipeline) -> None:
    """A caller that leaves the loop at END finds the turn in the session."""
    for status, _, _ in chatbot.stream_chat([user("one")], session_id=10, sequence_end=False):
        if status is Status.END:
            break
    assert len(chatbot.history(10)) == 2


def test_a_session_remembers(chatbot: LMDeployPipeline) -> None:
    """A turn with `sequence_start=False` is answered with all earlier turns before it."""
    list(chatbot.stream_chat([user("one")], session_id=1, sequence_end=False))
    list(chatbot.stream_chat([user("two")], session_id=1, sequence_start=False, sequence_end=False))
    history = chatbot.history(1)
    assert [message["role"] for message in history] == ["user", "assistant"] * 2
    prompt = "".join(f"{message['role']}: {message['content']}\n" for message in history[:3])
    assert history[3]["content"] == greedy_text(prompt, 5)


def test_sequence_end_forgets(chatbot: LMDeployPipeline) -> None:
    """After a turn with `sequence_end=True` the session is closed."""
    list(chatbot.stream_chat([user("one")], session_id=2, sequence_end=False))
    list(chatbot.stream_chat([user("two")], session_id=2, sequence_start=False, sequence_end=True))
    assert list(chatbot.stream_chat([user("three")], session_id=2, sequence_start=False)) == [
        (Status.SESSION_CLOSED, "", 0)
    ]


def test_an_outgrown_context_is_a_status(chatbot: LMDeployPipeline) -> None:
    """A transcript that outgrows the context gives SESSION_OUT_OF_LIMIT and leaves the session as it was."""
    list(chatbot.stream_chat([user("one")], session_id=3, sequence_end=False))
    steps = list(chatbot.stream_chat([user("word " * 300)], session_id=3, sequence_start=False))
    assert steps == [(Status.SESSION_OUT_OF_LIMIT, "", 0)]
    assert len(chatbot.history(3)) == 2


def test_ending_an_unknown_session_raises(chatbot: LMDeployPipeline) -> None:
    """`end_session` of a session that is not there raises SessionNotFoundError."""
    with pytest.raises(SessionNotFoundError):
        chatbot.end_session("never")


def test_a_second_turn_waits_its_turn(chatbot: LMDeployPipeline) -> None:
    """A turn of a session that is in the middle of one raises SessionBusyError."""
    first = chatbot.stream_chat([user("one")], session_id=4, max_new_tokens=100)
    next(first)
    with pytest.raises(SessionBusyError):
        next(chatbot.stream_chat([user("two")], session_id=4))
    assert list(first)[-1][0] is Status.END


def test_a_request_id_is_a_string(chatbot: LMDeployPipeline) -> None:
    """A request id that cannot be sent raises before anything is."""
    for wrong in (5, "\ud800"):
        with pytest.raises(InvalidRequestError, match="request_id"):
            next(chatbot.stream_chat([user("one")], request_id=wrong))  # type: ignore[arg-type]


def test_several_turns_need_a_name(chatbot: LMDeployPipeline) -> None:
    """Without a session id there is one turn only."""
    with pytest.raises(InvalidRequestError, match="session_id"):
        next(chatbot.stream_chat([user("one")], sequence_end=False))


def test_leaving_a_stream_frees_it(chatbot: LMDeployPipeline) -> None:
    """A caller that breaks out of `stream_chat` leaves no request running."""
    for _ in chatbot.stream_chat([user("one")], max_new_tokens=150):
        break
    assert chatbot.statistics().num_running == 0


def interrupted(work: Callable[[], object], line: int) -> bool:
    """Do some work, with an interrupt at one of the lines of the wait for it; return whether there were so many."""
    num_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal num_lines
        if event == "call" and frame.f_code is not LoopThread.run.__code__:
            return None
        num_lines += event == "line"
        if num_lines > line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_moment_ends_a_turn(chatbot: LMDeployPipeline) -> None:
    """A stream that is interrupted at any line of the wait for its next step can be closed, and leaves nothing."""
    for line in itertools.count():
        steps = chatbot.stream_chat("hello", max_new_tokens=2000)
        next(steps)
        was_interrupted = interrupted(partial(next, steps), line)
        steps.close()
        assert chatbot.statistics().num_running == 0
        if not was_interrupted:
            break
    assert line > 5


def test_a_failing_row_loses_no_other(cluster: str) -> None:
    """When a row of a list kills engines, the error that is raised holds the answers of all other rows."""
    engine = SimulatedConfig(tokens_per_s=500, faults=(Fault(match="poison", action="die"),))
    with LMDeployPipeline("simulated", replicas=2, temperature=0, max_new_tokens=5, backend_config=engine) as pipeline:
        with pytest.raises(PartialFailureError, match="1 of 3 rows") as raised:
            pipeline.generate(["one", "poison", "two"])
        one, poison, two = raised.value.results
        assert isinstance(poison, PoisonRequestError)
        assert [getattr(row, "text", None) for row in (one, two)] == [greedy_text(text, 5) for text in ("one", "two")]


def test_repr_tells_the_state(chatbot: LMDeployPipeline) -> None:
    """`repr` shows model, slots and counts."""
    assert repr(chatbot).startswith("<LMDeployPipeline 'simulated' on <Pool simulated: 2 of 2 slots up, 0 running")


def test_a_closed_pipeline_says_so(cluster: str) -> None:
    """After `close`, which may be called twice, every call raises NoActorError."""
    pipeline = LMDeployPipeline("simulated", backend_config=ENGINE)
    pipeline.close()
    pipeline.close()
    with pytest.raises(NoActorError):
        pipeline.generate("hello")


@pytest.mark.skipif(find_spec("lmdeploy") is not None, reason="lmdeploy is installed")
def test_a_missing_extra_is_named(cluster: str) -> None:
    """A backend that is not installed raises EngineStartError that says what to install."""
    with pytest.raises(EngineStartError, match=r"raylm\[lmdeploy\]"):
        LMDeployPipeline("smollm2-135m-instruct", backend="pytorch")


@pytest.mark.parametrize("engine", [{"backend": "turbomind"}, {"backend": "pytorch", "device": "cuda"}])
def test_a_gpu_that_is_not_there_is_named(cluster: str, engine: dict[str, Any]) -> None:
    """An engine for GPUs on a cluster without one raises PlacementError that says what each node has."""
    with pytest.raises(PlacementError, match="0 GPUs"):
        LMDeployPipeline("any", **engine)


@pytest.mark.parametrize("wrong", [{"backend": "cuda"}, {"tp": 2, "backend": "openvino"}, {"replicas": 0}])
def test_wrong_settings_raise(cluster: str, wrong: dict[str, Any]) -> None:
    """A wrong backend, tp or replicas raises InvalidRequestError before anything is started."""
    with pytest.raises(InvalidRequestError):
        LMDeployPipeline("any", **wrong)


@pytest.mark.parametrize("given", [LMDeployConfig(), APIServerConfig(server_port=0)], ids=lambda given: given.kind)
def test_settings_of_lmdeploy_get_the_model(given: EngineConfig) -> None:
    """In process or in a server of its own, lmdeploy gets the arguments' model, name and tp."""
    (config,) = AsyncLMDeployPipeline("folder/model", "name", 2, backend_config=given)._place()
    assert config == given.model_copy(update={"path": "folder/model", "model_name": "name", "tp": 2})


@pytest.mark.parametrize(
    ("argument", "given", "words"),
    [
        ({"backend": "pytorch"}, LMDeployConfig(backend="turbomind"), "backend: 'pytorch', .* 'turbomind'"),
        ({"backend": "openvino"}, LMDeployConfig(backend="pytorch"), "backend: 'openvino', .* 'pytorch'"),
        ({"backend": "pytorch"}, SimulatedConfig(), "backend: 'pytorch', .* 'simulated'"),
        ({"backend": "openvino"}, [OpenVINOConfig(), SimulatedConfig()], "backend: 'openvino', .* 'simulated'"),
        ({"device": "cpu"}, LMDeployConfig(backend="pytorch"), "device: 'cpu', .* 'cuda'"),
        ({"device": "cuda"}, OpenVINOConfig(), "device: 'cuda', .* 'cpu'"),
    ],
)
def test_arguments_that_contradict_the_settings_raise(argument: Any, given: Any, words: str) -> None:
    """A backend or device that is not that of `backend_config` raises InvalidRequestError that names both."""
    with pytest.raises(InvalidRequestError, match=words + ".*leave .* out"):
        AsyncLMDeployPipeline("any", backend_config=given, **argument)


@pytest.mark.parametrize(
    ("given", "argument", "backend", "device"),
    [
        (None, {}, "pytorch", "cpu"),
        ({}, {}, "pytorch", "cpu"),
        ({}, {"backend": "turbomind"}, "turbomind", "cuda"),
        ({"device": "ascend"}, {}, "pytorch", "ascend"),
        ({"device": "cpu"}, {}, "pytorch", "cpu"),
        ({"backend": "turbomind"}, {}, "turbomind", "cuda"),
        ({"backend": "pytorch", "device": "cuda"}, {}, "pytorch", "cuda"),
    ],
)
def test_a_server_runs_what_its_settings_say(
    cluster: str, given: dict[str, Any] | None, argument: dict[str, Any], backend: str, device: str
) -> None:
    """What the settings of a server leave open is chosen by the cluster, which has no GPU here."""
    settings = None if given is None else APIServerConfig(**given)
    (config,) = AsyncLMDeployServer("folder/model", backend_config=settings, **argument)._place()
    assert isinstance(config, APIServerConfig)
    assert (config.backend, config.device) == (backend, device)


def test_settings_of_a_server_that_are_contradicted_raise() -> None:
    """An argument that is not what `backend_config` says of the same thing raises InvalidRequestError."""
    with pytest.raises(InvalidRequestError, match=r"backend: 'pytorch', .* 'turbomind'"):
        AsyncLMDeployServer("any", backend="pytorch", backend_config=APIServerConfig(backend="turbomind"))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AsyncLMDeployServer("any", server_port=70000), "server_port"),
        (lambda: AsyncLMDeployServer("any", model_name=5), "model_name"),
        (lambda: AsyncTritonClient("a:1", "m", session_len=0), "session_len"),
        (lambda: AsyncTritonClient("a:1", 5), "model_name"),
        (lambda: AsyncTritonClient(None, "m"), "tritonserver_addr"),
        (lambda: AsyncLMDeployClient(None), "url"),
        (lambda: AsyncLMDeployClient("http://a", 5), "model_name"),
    ],
)
def test_wrong_arguments_raise_at_once(make: Callable[[], object], named: str) -> None:
    """A value that no engine could have is refused where it is given, by name, before anything starts."""
    with pytest.raises(InvalidRequestError, match=named):
        make()


@pytest.mark.parametrize(("backend", "device"), [("turbomind", "cpu"), ("openvino", "cuda")])
def test_a_device_that_the_engine_cannot_use_raises(backend: Any, device: Any) -> None:
    """It raises InvalidRequestError before anything is started."""
    with pytest.raises(InvalidRequestError, match=f"device: .*{backend}"):
        AsyncLMDeployPipeline("any", backend=backend, device=device)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"backend": "pytorch", "device": "cpu"}, LMDeployConfig(device="cpu")),
        ({"backend": "openvino", "device": "cpu"}, OpenVINOConfig()),
        ({"backend": "auto", "device": "auto"}, LMDeployConfig(backend="turbomind")),
        ({"backend": "openvino", "replicas": 2}, [OpenVINOConfig(capacity=1), OpenVINOConfig()]),
    ],
)
def test_arguments_that_agree_with_the_settings_are_taken(arguments: Any, given: Any) -> None:
    """A backend and device that are those of `backend_config`, or `auto`, raise nothing."""
    AsyncLMDeployPipeline("any", backend_config=given, **arguments)


def test_an_address_without_a_cluster_raises() -> None:
    """An address where nothing listens raises PlacementError at once."""
    code = "from raylm import LMDeployPipeline; LMDeployPipeline('any', address='127.0.0.1:9')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PlacementError: no Ray cluster answers at 127.0.0.1:9" in result.stderr


def test_unknown_settings_raise() -> None:
    """A misspelt constructor argument raises."""
    with pytest.raises(TypeError, match="tpo"):
        LMDeployPipeline("any", tpo=2)  # type: ignore[call-arg]


@pytest.fixture
async def async_chatbot(cluster: str) -> AsyncIterator[AsyncLMDeployPipeline]:
    """One simulated replica for asyncio programs."""
    async with AsyncLMDeployPipeline("simulated", temperature=0, max_new_tokens=5, backend_config=ENGINE) as pipeline:
        yield pipeline


async def test_async_has_the_same_methods(async_chatbot: AsyncLMDeployPipeline) -> None:
    """The asyncio face generates, chats and streams."""
    assert await async_chatbot.generate("hello") == greedy_text("hello", 5)
    assert await async_chatbot.chat([user("hello")]) == greedy_text("user: hello\n", 5)
    steps = [step async for step in async_chatbot.stream_chat([user("hello")])]
    assert steps[-1] == (Status.END, greedy_text("user: hello\n", 5), 5)


LIFE = """
import json, threading
from contextlib import suppress
import psutil
from raylm import LMDeployPipeline, SimulatedConfig

def state():
    names = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if child.status() != psutil.STATUS_ZOMBIE:
                names.append(child.name())
    return names, threading.active_count()

before = state()
with LMDeployPipeline("simulated", backend_config=SimulatedConfig(), address="local") as chatbot:
    chatbot.generate("hello", max_new_tokens=5)
    during = state()
print(json.dumps([before, during, state()]))
"""


def test_nothing_is_left_behind() -> None:
    """A pipeline that started Ray ends it: no child process and no thread is left after the block."""
    result = subprocess.run([sys.executable, "-c", LIFE], capture_output=True, text=True, check=True)
    before, during, after = json.loads(result.stdout.splitlines()[-1])
    assert "raylet" in during[0]
    assert after == before


def test_a_program_may_end_without_closing() -> None:
    """A program that just ends, as the seed's examples do, ends in order: no complaint, and its Ray goes with it."""
    code = (
        "from raylm import LMDeployPipeline, SimulatedConfig\n"
        "chatbot = LMDeployPipeline('simulated', backend_config=SimulatedConfig(), address='local')\n"
        "print(chatbot.generate('hello', max_new_tokens=5, temperature=0))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == greedy_text("hello", 5).strip()
    assert "Traceback" not in result.stderr
