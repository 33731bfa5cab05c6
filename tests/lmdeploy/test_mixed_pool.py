"""One pool over all four kinds: lmdeploy in process, an api_server, and clients of a Triton server and an api_server.

The Triton server has its tokens from the api_server that runs already, so that all members are of one model.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psutil
import pytest

from raylm import CHATML_META, Chatbot, HTTPConfig, Status, TritonConfig
from raylm.errors import SessionBusyError
from raylm.messages import Request
from tests.engines.conftest import ask as ask_once
from tests.engines.conftest import make_request
from tests.engines.triton_server import TritonServer

from .conftest import Server, fingerprint_on_cpu, on_cpu, server_on_cpu, transformers_texts
from .reference import NUM_TOKENS

pytestmark = pytest.mark.timeout(600)

SMALL = {"session_len": 512, "max_batch_size": 4, "options": {"num_gpu_blocks": 40}}
ROWS = [f"Chapter {row} begins" for row in range(12)]
PROMPTS = [
    f"{subject}{end}"
    for subject in ("The old lighthouse", "My neighbour's cat", "In 1969", "def fibonacci(n):", "Dear Sir or Madam,")
    for end in ("", " and the sea", " - chapter 2:", " at the end of the day")
]
KINDS = ["lmdeploy", "api_server", "triton", "http"]
TURNS = ["What is the capital of France?", "And of Italy?"]


@pytest.fixture(scope="module")
def chatbot(cluster: str, server: Server, triton: TritonServer) -> Iterator[Chatbot]:
    """A pool of a member of each kind."""
    engines = [
        on_cpu(**SMALL),
        server_on_cpu(**SMALL),
        TritonConfig(address=triton.address, model_name="relay", session_len=512, capacity=4),
        HTTPConfig(url=f"http://{server.address}", capacity=4),
    ]
    with Chatbot(engines, meta_template=CHATML_META, temperature=0, max_new_tokens=24) as chatbot:
        yield chatbot


def losses(chatbot: Chatbot, triton: TritonServer, server: Server) -> list[Callable[[], None]]:
    """Return how each member is lost, by slot."""

    def actor(slot: int) -> psutil.Process:
        return psutil.Process(chatbot.statistics().slots[slot].pid)

    def kill_api_server() -> None:
        (served,) = (child for child in actor(1).children(recursive=True) if child.cmdline()[-2:-1] == ["serve"])
        served.kill()

    return [lambda: actor(0).kill(), kill_api_server, triton.kill, server.kill]


def pin(chatbot: Chatbot, session: str, slot: int) -> str:
    """Return a session that goes to a slot."""
    chatbot._chatbot.pool.router.pin(session, slot)
    return session


def ask(chatbot: Chatbot, session: str, turn: int, then: Callable[[], None] = lambda: None) -> str:
    """Return the answer to a turn of a session; `then` happens at its first token."""
    question = [{"role": "user", "content": TURNS[turn]}]
    stream = chatbot.stream_chat(
        question, session, sequence_start=turn == 0, sequence_end=False, ignore_eos=True, timeout=None
    )
    with closing(stream):
        next(stream)
        then()
        *_, (status, text, num_tokens) = stream
    assert (status, num_tokens) == (Status.END, 24)
    return text


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        (make_request("Once upon a time", max_new_tokens=24), KINDS),
        (make_request(ask_once(TURNS[0]), max_new_tokens=24), ["lmdeploy", "api_server", "http"]),
    ],
    ids=["prompt", "messages"],
)
def test_members_answer_alike(chatbot: Chatbot, asked: Request, kinds: list[str]) -> None:
    """Members give a prompt, and messages where they take them, the same greedy text and count the same tokens."""
    sessions = [pin(chatbot, f"{asked.prompt} {kind}", KINDS.index(kind)) for kind in kinds]
    pool = chatbot._chatbot.pool
    answers = [chatbot._loop.run(pool.generate(asked, session_id=session)) for session in sessions]
    assert [answer.receipt.engine for answer in answers] == kinds
    assert len({(answer.text, answer.finish_reason, answer.usage.prompt_tokens) for answer in answers}) == 1
    assert answers[0].text


def test_receipts_name_the_model(chatbot: Chatbot) -> None:
    """Receipts have the same digest of the model's files from those that loaded it, and none from their clients."""
    pool = chatbot._chatbot.pool
    request = make_request("Once upon a time", max_new_tokens=1)
    sessions = [pin(chatbot, f"receipt of {kind}", slot) for slot, kind in enumerate(KINDS)]
    answers = [chatbot._loop.run(pool.generate(request, session_id=session)) for session in sessions]
    assert [answer.receipt.fingerprint for answer in answers] == [fingerprint_on_cpu(), fingerprint_on_cpu(), "", ""]


@pytest.fixture(scope="module")
def expected(model_folder: str) -> list[str]:
    """What transformers generates for `PROMPTS`, one by one."""
    return transformers_texts(model_folder, PROMPTS)


@pytest.mark.parametrize("slot", range(4), ids=KINDS)
def test_text_is_that_of_transformers(chatbot: Chatbot, expected: list[str], slot: int) -> None:
    """Each member's greedy text of twenty prompts is that of transformers."""
    sessions = [pin(chatbot, f"prompt {number} of {slot}", slot) for number in range(len(PROMPTS))]
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        texts = [
            threads.submit(chatbot.generate, prompt, session, max_new_tokens=NUM_TOKENS, timeout=None)
            for prompt, session in zip(PROMPTS, sessions, strict=True)
        ]
        assert [text.result() for text in texts] == expected


@pytest.mark.parametrize("slot", range(4), ids=KINDS)
def test_two_clients_on_one_session(chatbot: Chatbot, slot: int) -> None:
    """The second of two turns at once is refused; the first goes on undisturbed, and so does the session."""
    session = pin(chatbot, f"shared {slot}", slot)

    def intrude() -> None:
        for turn in range(2):
            with pytest.raises(SessionBusyError):
                ask(chatbot, session, turn)

    assert ask(chatbot, session, 0, intrude) == ask(chatbot, "its own", 0)
    assert ask(chatbot, session, 1) == ask(chatbot, "its own", 1)


def test_a_request_id_may_be_used_at_once(chatbot: Chatbot) -> None:
    """A request id is a name for logs: requests of one id, two at each member, are as many requests."""
    rows = chatbot.generate(ROWS[:2], ignore_eos=True, timeout=None)
    sessions = [pin(chatbot, f"{number} of one id", number // 2) for number in range(8)]
    with ThreadPoolExecutor() as threads:
        answers = [
            threads.submit(chatbot.generate, row, session, "same", ignore_eos=True, timeout=None)
            for row, session in zip(ROWS[:2] * 4, sessions, strict=True)
        ]
        assert [answer.result() for answer in answers] == rows * 4


def test_each_member_is_lost_in_turn(chatbot: Chatbot, triton: TritonServer, server: Server) -> None:
    """Whichever member is lost, each row is answered once and a session goes on, both with the undisturbed text."""
    rows = chatbot.generate(ROWS, ignore_eos=True, timeout=None)
    turns = [ask(chatbot, "calm", turn) for turn in range(2)]
    sessions = [pin(chatbot, f"on {slot}", slot) for slot in range(4)]
    for session in sessions:
        assert ask(chatbot, session, 0) == turns[0]
    with ThreadPoolExecutor() as threads:
        for session, lose in zip(sessions, losses(chatbot, triton, server), strict=True):
            num_moved = chatbot.statistics().num_moved
            batch = threads.submit(chatbot.generate, ROWS, ignore_eos=True, timeout=None)
            assert ask(chatbot, session, 1, lose) == turns[1]
            assert batch.result() == rows
            assert chatbot.statistics().num_moved > num_moved
    assert chatbot.statistics().num_failed == 0
    assert chatbot.statistics().slots[0].num_deaths == 1


def test_engine_of_an_actor_dies(chatbot: Chatbot) -> None:
    """When lmdeploy's process dies, and its actor does not, the answer goes on elsewhere and the actor is replaced."""
    slot = chatbot.statistics().slots[0]
    answer = ask(chatbot, "calm again", 0)

    def kill_engine() -> None:
        (engine,) = psutil.Process(slot.pid).children()
        engine.kill()

    assert ask(chatbot, pin(chatbot, "on a dying engine", 0), 0, kill_engine) == answer
    assert chatbot.statistics().num_failed == 0
    while (after := chatbot.statistics().slots[0]).state != "up" or after.num_deaths == slot.num_deaths:
        ask(chatbot, "in the meantime", 0)
    assert after.num_deaths == slot.num_deaths + 1
    assert after.pid != slot.pid
