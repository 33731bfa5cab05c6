"""The pool behind the endpoint, from Python."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.serve.command import ServeCommand

PROGRAM = """
import sys, raylm
with raylm.connect("sim", address=sys.argv[1], temperature=0) as chatbot:
    print(chatbot.generate("one two"))
    *_, (status, text, _) = chatbot.stream_chat("hello", session_id="shared", sequence_end=False, max_new_tokens=4)
    print(status.name)
try:
    raylm.connect("another", address=sys.argv[1])
except raylm.errors.ModelNotFoundError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def printed(simulated_endpoint: ServeCommand) -> list[str]:
    """What the program prints, line by line."""
    command = [sys.executable, "-c", PROGRAM, simulated_endpoint.cluster]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_same_answer_as_over_http(simulated_endpoint: ServeCommand, printed: list[str]) -> None:
    """A program that connects gets its answers from the engines that HTTP clients get theirs from."""
    body = {"inputs": "one two", "temperature": 0}
    assert printed[0] == simulated_endpoint.post("/generate", body).json()["text"]


def test_sessions_are_shared(simulated_endpoint: ServeCommand, printed: list[str]) -> None:
    """A session that was begun in Python goes on over HTTP."""
    assert printed[1] == "END"
    messages = simulated_endpoint.get("/sessions/shared").json()["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_unknown_model(printed: list[str]) -> None:
    """A model that is not served is an error that says which ones are."""
    assert printed[2] == "no model 'another' is served on this cluster; served are: sim"
