"""A toy language model that Triton's test models share.

The next token is a function of all tokens before it, so a continued text goes on as it would have. A token is a word
with the space before it; an emoji is two tokens, of which the first ends within the character.

Words in double brackets steer the server and are one token each, whatever they say:

    [[pace=s]]     seconds between two tokens
    [[chunk=n]]    tokens in one response
    [[fail=n]]     an error instead of the n-th token
    [[hang=n]]     silence instead of the n-th token
    [[endless]]    no end of sequence
    [[refuse]]     an over-long prompt, in the words of the server that is imitated
    [[abort]]      the server aborts the request at its third token
    [[nonsense]]   text that is no UTF-8
    [[mute]]       responses without a text tensor
    [[cut=n]]      the end of the call instead of the n-th token
    [[lapse=n]]    the n-th token with the flag of the last one, and no reason

Runs inside Triton, with nothing but numpy beside it. The tests import it too, to know the answers.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from zlib import crc32

BOS, EOS = 1, 2
_WORDS = [first + second for first in ("ba", "ki", "lo", "mu", "se") for second in ("n", "ra", "to", "lli", "")]
_CHINESE = ["你好", "世界", "春天"]
_EMOJI = ["😀", "🚀", "🌍"]
_DIRECTIVES = ("pace", "chunk", "fail", "hang", "endless", "refuse", "abort", "nonsense", "mute", "cut", "lapse")
_DIRECTIVE_ID = 1 << 28
_UNKNOWN_ID = 1 << 20
_PIECE = re.compile(r"\[\[\w+=?[\d.]*\]\]| ?[^\s\[]+|\s|\[")

TOKENS: dict[int, bytes] = {}
"""What the model can say, by id."""
_SPELLING: dict[str, list[int]] = {"<BOS>": [BOS], "<EOS>": [EOS]}
_HALVES: dict[int, int] = {}

for _word in _WORDS + _CHINESE:
    _SPELLING[" " + _word] = [100 + len(TOKENS)]
    TOKENS[100 + len(TOKENS)] = f" {_word}".encode()
_STARTS = list(TOKENS)
for _emoji in _EMOJI:
    _first, _second = 100 + len(TOKENS), 101 + len(TOKENS)
    _SPELLING[" " + _emoji] = [_first, _second]
    _bytes = f" {_emoji}".encode()
    TOKENS[_first], TOKENS[_second] = _bytes[:3], _bytes[3:]
    _HALVES[_first] = _second
    _STARTS.append(_first)


def tokenize(text: str) -> list[int]:
    """Return the ids of a text. Different texts may have the same ids; white space between words has none."""
    ids: list[int] = []
    for piece in _PIECE.findall(text):
        if piece in _SPELLING:
            ids += _SPELLING[piece]
        elif piece.startswith("[["):
            name, _, value = piece.strip("[]").partition("=")
            ids.append(_DIRECTIVE_ID + (_DIRECTIVES.index(name) << 20) + int(float(value or 1) * 1000))
        elif piece.strip():
            ids.append(_UNKNOWN_ID + crc32(piece.encode()) % _UNKNOWN_ID)
    return ids


def detokenize(ids: Iterable[int]) -> bytes:
    """Return the bytes of what the model said."""
    return b"".join(TOKENS.get(token, b"") for token in ids)


def whole_tokens(ids: Sequence[int], *, keep: bool) -> Sequence[int]:
    """Return the ids without a last one that ends within a character, unless they are all to be kept."""
    return ids if keep or not ids or ids[-1] not in _HALVES else ids[:-1]


def directives(ids: Iterable[int]) -> dict[str, float]:
    """Return what the words in brackets say."""
    return {
        _DIRECTIVES[token - _DIRECTIVE_ID >> 20]: (token & (1 << 20) - 1) / 1000
        for token in ids
        if token >= _DIRECTIVE_ID
    }


def state_of(ids: Sequence[int]) -> int:
    """Return the state of the model after some tokens; a start of the sequence is no part of it."""
    state = 0
    for token in ids:
        state = advance(state, token)
    return state


def advance(state: int, token: int) -> int:
    """Return the state after one more token."""
    return state if token == BOS else crc32(token.to_bytes(8, "little"), state)


def next_token(state: int, last: int, seed: int | None, *, end: bool) -> int:
    """Return the next token.

    Args:
        state: After all tokens so far.
        last: The last token.
        seed: None decodes greedily.
        end: Whether it may be the end of the sequence.
    """
    if last in _HALVES:
        return _HALVES[last]
    number = state if seed is None else crc32(seed.to_bytes(8, "little"), state)
    if end and number % 41 == 0:
        return EOS
    return _STARTS[(number >> 8) % len(_STARTS)]


def greedy_text(prompt: str, num_tokens: int) -> str:
    """Return what the model says after a prompt without end of sequence."""
    ids = tokenize(prompt)
    state, said = state_of(ids), []
    for _ in range(num_tokens):
        said.append(next_token(state, ids[-1] if not said else said[-1], None, end=False))
        state = advance(state, said[-1])
    return detokenize(said).decode("utf-8", "ignore")


class Job:
    """One generation.

    Args:
        ids: The prompt.
        limit: At most this many tokens.
        context: Prompt and generated tokens together.
        seed: None decodes greedily.
        ignore_eos: No end of sequence.
        min_tokens: No end of sequence before that.
    """

    def __init__(
        self,
        ids: Sequence[int],
        limit: int,
        context: int,
        *,
        seed: int | None = None,
        ignore_eos: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.orders = directives(ids)
        self.num_prompt = len(ids)
        self.limit = min(limit, context - len(ids))
        self.said: list[int] = []
        self.finish_reason: str | None = None
        self.stopped = False  # set from outside: end with what there is
        self._state = state_of(ids)
        self._last = ids[-1]
        self._seed = seed
        self._ends = not ignore_eos and "endless" not in self.orders
        self._min_tokens = min_tokens

    def step(self) -> None:
        """Say one more token, or end.

        Raises:
            RuntimeError: an order was to fail here.
        """
        position = len(self.said) + 1
        if self.orders.get("fail") == position:
            raise RuntimeError(f"failure at token {position}, as ordered")
        if self.stopped:
            self.finish_reason = "stop"
            return
        if "abort" in self.orders and position == 3:
            self.finish_reason = "abort"
            return
        if self.orders.get("cut") == position:
            self.finish_reason = "cut"
            return
        token = next_token(self._state, self._last, self._seed, end=self._ends and position > self._min_tokens)
        self._state, self._last = advance(self._state, token), token
        self.said.append(token)
        if token == EOS:
            self.finish_reason = "stop"
        elif self.orders.get("lapse") == position:
            self.finish_reason = "lapse"
        elif len(self.said) == self.limit:
            self.finish_reason = "length"

    @property
    def hangs(self) -> bool:
        """Whether nothing more is said, as ordered."""
        return self.orders.get("hang") == len(self.said) + 1


class Loop:
    """Advances all jobs of one model, a token at a time, in a thread of its own.

    Args:
        pace_s: Seconds between two tokens.
    """

    def __init__(self, pace_s: float) -> None:
        self._pace_s = pace_s
        self._jobs: dict[Job, tuple[Callable[[Job], None], Callable[[], bool], float, float]] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, job: Job, respond: Callable[[Job], None], cancelled: Callable[[], bool]) -> None:
        """Begin a job.

        Args:
            job: What to generate.
            respond: Sends what is new. Called in the loop's thread, the last time when the job has a finish reason.
            cancelled: Whether the client has gone.
        """
        with self._wake:
            self._jobs[job] = (respond, cancelled, time.monotonic(), time.monotonic())
            self._wake.notify()

    def close(self) -> None:
        """End the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                work = list(self._jobs.items())
            started_at = time.monotonic()
            for job, (respond, cancelled, due_at, looked_at) in work:
                now = time.monotonic()
                if now - looked_at > 0.02:  # asking costs a round trip to the server
                    looked_at = now
                    if cancelled():
                        job.finish_reason = "cancelled"
                if job.finish_reason is None and due_at <= now and (not job.hangs or job.stopped):
                    due_at = now + job.orders.get("pace", 0)
                    try:
                        for _ in range(int(job.orders.get("chunk", 1))):
                            if job.finish_reason is None:
                                job.step()
                    except RuntimeError:
                        job.finish_reason = "error"
                    respond(job)
                elif job.finish_reason is not None:
                    respond(job)
                with self._wake:
                    if job.finish_reason is None:
                        self._jobs[job] = (respond, cancelled, due_at, looked_at)
                    else:
                        del self._jobs[job]
            time.sleep(max(0, self._pace_s - (time.monotonic() - started_at)))


def journal(**event: object) -> None:
    """Append a line to the file that TOY_JOURNAL names, for the tests to read."""
    if path := os.environ.get("TOY_JOURNAL"):
        with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123 - one write, so lines do not mix
            file.write(json.dumps(event) + "\n")
