"""One pool over all four kinds: lmdeploy in process, an api_server, and clients of a Triton server and an api_server.

The Triton server has its tokens from the api_server that runs already, so that all members are of one model.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import requests

from raylm import CHATML_META, Chatbot, HTTPConfig, Status, TritonConfig
from raylm.errors import SessionBusyError
from raylm.messages import Request
from raylm.ports import free_port
from tests.engines.conftest import ask as ask_once
from tests.engines.conftest import make_request
from tests.engines.triton_server import TritonServer, make_repository

from .conftest import on_cpu, server_on_cpu, transformers_answers
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


class Server:
    """An api_server that is nobody's child but this test's, on a free port."""

    def __init__(self, folder: str) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "raylm.engines.lmdeploy_cpu", "serve", "api_server", folder]
        options = {"backend": "pytorch", "device": "cpu", "session-len": 512, "max-batch-size": 4, "num-gpu-blocks": 40}
        options |= {"server-name": "127.0.0.1", "server-port": port}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._process = subprocess.Popen([*command, *arguments], start_new_session=True)

    def wait(self) -> None:
        """Return when it has loaded its model."""
        while self._process.poll() is None:
            with suppress(requests.ConnectionError):
                if requests.get(f"http://{self.address}/health", timeout=10).ok:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"the api_server ended with {self._process.returncode}")

    def kill(self) -> None:
        """Kill it, and the engine below it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(model_folder: str) -> Iterator[Server]:
    """An api_server at work."""
    server = Server(model_folder)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def triton(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A Triton server whose model asks the api_server."""
    folder = make_repository(tmp_path_factory.mktemp("models"), {"relay": ("relay", {"127.0.0.1:0": server.address})})
    with TritonServer(folder) as triton:
        yield triton


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


@pytest.fixture(scope="module")
def expected(model_folder: str) -> list[str]:
    """What transformers generates for `PROMPTS`, one by one."""
    from tokenizers import Tokenizer  # only where lmdeploy is

    tokenizer = Tokenizer.from_file(str(Path(model_folder) / "tokenizer.json"))
    return [tokenizer.decode(token_ids) for token_ids in transformers_answers(model_folder, PROMPTS)]


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
