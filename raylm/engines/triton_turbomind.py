"""The TurboMind repository of LMDeploy up to 0.5.1: three models, token ids, and sequences that the server keeps.

`preprocessing` turns a text into token ids, `turbomind` generates, `postprocessing` turns ids into text. Under the
number of a sequence the server keeps the tokens of a conversation, so that a turn costs only what is new in it.

Knows no tritonclient: it calls the server by a `Link`.

Source: LMDeploy 0.4.2, `lmdeploy.serve.turbomind.chatbot`, `src/turbomind`.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

from raylm.engines.base import Emit
from raylm.engines.text import StopWords
from raylm.engines.triton_dialects import CallFailedError, Model, Outputs, Values, first_count, first_text, fits, refuse
from raylm.errors import ContextLengthError, InvalidRequestError, ProtocolError, RaylmError
from raylm.messages import Delta, FinishReason, Request, Usage

MAX_SEQUENCES = 1024
"""Conversations that the server keeps for one engine; the least recently used is ended."""

_STOP_ATTEMPTS = 8
_STOP_PATIENCE_S = 0.25

_FAILURE = re.compile(r"TurboMind execute failure: *(\d+)")
INVALID, CONFLICT, BUSY, INACTIVE, FAIL, TOO_LONG = 1, 2, 3, 4, 5, 6
"""What TurboMind refuses a request with: there is no such sequence; two kinds of requests at once; a request of that
sequence is running; there is none to stop; anything else; history and input are longer than the context."""

Take = Callable[[Outputs, bool], bool]
"""Takes a response, and whether no other follows. Returns True when nothing more is wanted."""


class Link(Protocol):
    """How the server is called. Both raise CallFailedError."""

    async def infer(self, model: Model, values: Values) -> Outputs:
        """Return the one response to a request."""
        ...

    async def stream(self, model: Model, values: Values, take: Take) -> None:
        """Hand over the responses to a request."""
        ...


def failure_code(error: CallFailedError) -> int | None:
    """Return TurboMind's own number for an error."""
    match = _FAILURE.search(error.details)
    return int(match[1]) if match else None


class _Sequence:
    """What the server keeps of one conversation. One request at a time has its `lock`.

    Attributes:
        number: Under which the server knows it.
        text: What the tokens that are worth keeping stand for.
        num_tokens: How many these are. The server may have more after them, and forgets those when it is told this
            number as the next request's `step`. 0: it is not known to have anything.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.forget()

    def forget(self) -> None:
        """Begin anew. Under another number: nobody knows what the server still does under the old one."""
        self.number = random.getrandbits(63)
        self.text = ""
        self.num_tokens = 0


class _Turn:
    """One request: what is sent, what has come, and what was shown of it.

    Attributes:
        step: Tokens that the server already has.
        ids: Those that are sent.
        generated: Those at the end of `ids` that earlier attempts generated.
        limit: How many more may come.
        prompt_tokens: Of the whole prompt.
        come: The tokens that have come.
        ended: No more come.
        changed: Set when one of the two changes.
        reading: The task that takes the responses.
    """

    reading: asyncio.Task[None]

    def __init__(self, request: Request, emit: Emit, step: int, ids: list[int], session_len: int) -> None:
        generated = request.generated
        self._emit = emit
        self.step = step
        self.ids = ids
        self.generated = list(generated.token_ids) if generated else []
        self.base = generated.num_tokens if generated else 0
        self.prompt_tokens = max(1, step + len(ids) - self.base)
        self.room = session_len - step - len(ids)
        self.limit = min(request.config.max_new_tokens - self.base, self.room)
        self.come: list[int] = []
        self.ended = False
        self.changed = asyncio.Event()
        self.finish_reason: FinishReason | None = None
        self._stop_words = StopWords(request.config.stop_words)
        self._resumed = generated.text if generated and generated.token_ids else ""
        self._text = ""  # of `generated` and `come`, without half characters
        self._shown = 0  # how much of it, stop words cut off
        self._ready = ""  # of that, what is not emitted
        self._num_told = 0
        self._marks = [(0, 0)]  # where tokens end in `_text`: number of tokens, length of the text

    def take(self, outputs: Outputs, final: bool) -> bool:
        """Note what a response brings. It repeats the whole sequence."""
        try:
            length = first_count(outputs["sequence_length"])
            new: list[int] = _ids(outputs["output_ids"])[self.step + len(self.ids) : length].tolist()
        except KeyError as error:
            raise ProtocolError(f"a response of TurboMind has no {error}") from None
        self.come = new[: self.limit]  # its check of the length lets one too many through
        self.ended = final or len(self.come) == self.limit
        self.changed.set()
        return final

    def show(self, num_tokens: int, text: str, *, last: bool) -> None:
        """Emit what is new.

        Args:
            num_tokens: Of `come`.
            text: Of `generated` and these.
            last: No more come.

        Raises:
            ProtocolError: the text does not begin like the one before.
            InvalidRequestError: the tokens of earlier attempts do not spell their text.
        """
        whole = text.rstrip("\ufffd")  # the server's word for half a character
        if not whole.startswith(self._text):
            raise ProtocolError("the text of TurboMind's tokens does not begin with the text of the first of them")
        shown, hit = self._stop_words.feed(whole[len(self._text) :])
        if len(whole) == len(text):
            self._marks.append((num_tokens, len(whole)))
        self._text = whole
        if hit:
            self.finish_reason = "stop"
        elif last:
            shown += self._stop_words.flush()
            full = len(self.come) >= self.limit
            self.finish_reason = "length" if full else "stop"
        self._shown += len(shown)
        if self._resumed:
            common = min(len(shown), len(self._resumed))
            if shown[:common] != self._resumed[:common]:
                raise InvalidRequestError(
                    "the token ids of `generated` do not spell its text; continue it with the model that began it, or "
                    "without token ids"
                )
            shown, self._resumed = shown[common:], self._resumed[common:]
        self._ready += shown
        if self.finish_reason is None:
            # Up to the end of a token, and no token of which text is held back: see `triton_dialects.TextOutput`.
            num_tokens, end = next(mark for mark in reversed(self._marks) if mark[1] <= self._shown)
            shown = self._ready[: max(0, len(self._ready) - (self._shown - end))]
        else:
            shown = self._ready
        self._ready = self._ready[len(shown) :]
        delta = Delta(shown, self.base + num_tokens, tuple(self.come[self._num_told : num_tokens]))
        news = shown or num_tokens > self._num_told
        self._num_told = num_tokens
        if self.finish_reason is not None:
            delta.finish_reason = self.finish_reason
            delta.usage = Usage(self.prompt_tokens, delta.num_tokens)
        if news or self.finish_reason is not None:
            self._emit(delta)

    def kept(self) -> tuple[int, str]:
        """Return how many tokens stand for the answer as it was shown, or the most of it, and their text."""
        # The token that ended the answer is none of it: an end of sequence, or the last one of a stop word.
        most = len(self.come) - (self.finish_reason == "stop")
        num_tokens, length = next(
            mark for mark in reversed(self._marks) if (mark[0] <= most and mark[1] <= self._shown) or mark == (0, 0)
        )
        return num_tokens, self._text[:length]


class TurboMind:
    """Generates with the three models.

    A turn of a session sends only what the server does not have, if what it has is the beginning of the prompt.
    Otherwise the sequence begins anew with the whole prompt, as it does with a seed, which TurboMind takes only there.

    Args:
        link: How to call the server.
        preprocessing: The model of that name.
        turbomind: The model of that name.
        postprocessing: The model of that name.
        session_len: Prompt and generated tokens together.
    """

    def __init__(
        self, link: Link, preprocessing: Model, turbomind: Model, postprocessing: Model, session_len: int
    ) -> None:
        self._link = link
        self._preprocessing = preprocessing
        self._turbomind = turbomind
        self._postprocessing = postprocessing
        self._session_len = session_len
        self._sequences: dict[str, _Sequence] = {}  # the least recently used first
        self._bos = self._eos = -1

    @property
    def models(self) -> tuple[Model, Model, Model]:
        """The three."""
        return self._preprocessing, self._turbomind, self._postprocessing

    async def start(self) -> None:
        """Ask for the ids of the start and the end of a sequence."""
        self._bos = (await self._encode("<BOS>"))[0]
        self._eos = (await self._encode("<EOS>"))[0]

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate one request. Requests of one session wait for each other.

        Raises:
            InvalidRequestError: TurboMind cannot honour a parameter; the text names it.
            ContextLengthError: the prompt leaves no room for a token.
            ProtocolError: an answer makes no sense.
            CallFailedError: a call failed.
        """
        self._parameters(request, start=True)
        if request.session_id is None:
            await self._generate(request, emit, _Sequence(), keep=False)
            return
        while True:
            sequence = self._sequences.pop(request.session_id, None) or _Sequence()
            self._sequences[request.session_id] = sequence
            async with sequence.lock:
                if self._sequences.get(request.session_id) is not sequence:
                    continue  # it was ended while this request waited for it
                await self._make_room()
                try:
                    await self._generate(request, emit, sequence, keep=not request.session_end)
                finally:
                    if request.session_end and self._sequences.get(request.session_id) is sequence:
                        del self._sequences[request.session_id]
            return

    async def close(self) -> None:
        """End all sequences, as far as the server answers."""
        idle = [sequence for sequence in self._sequences.values() if not sequence.lock.locked()]
        self._sequences.clear()
        await asyncio.gather(*(self._end(sequence) for sequence in idle), return_exceptions=True)

    async def _make_room(self) -> None:
        while len(self._sequences) > MAX_SEQUENCES:
            idle = next((name for name, each in self._sequences.items() if not each.lock.locked()), None)
            if idle is None:
                return
            await self._end(self._sequences.pop(idle))

    async def _end(self, sequence: _Sequence) -> None:
        if sequence.num_tokens:
            values = self._values(sequence, [self._eos], 0, start=False, end=True, step=sequence.num_tokens)
            try:
                await self._link.stream(self._turbomind, values, lambda _outputs, _final: True)
            except CallFailedError as error:
                if failure_code(error) is None:  # otherwise the server no longer had it
                    raise

    async def _generate(self, request: Request, emit: Emit, sequence: _Sequence, *, keep: bool) -> None:
        while True:
            turn = await self._prepare(request, emit, sequence)
            if turn.limit <= 0:
                await self._show(turn, last=True)
                return
            try:
                await self._run(request, turn, sequence, keep=keep)
            except CallFailedError as error:
                sequence.forget()
                if not (turn.step and failure_code(error) == INVALID and not turn.come):
                    raise
                # The server has lost the sequence, in a restart or to make room: it gets the whole of it again.
            else:
                return

    async def _prepare(self, request: Request, emit: Emit, sequence: _Sequence) -> _Turn:
        """Return what is to be sent.

        Raises:
            ContextLengthError: the prompt leaves no room for a token.
        """
        prompt, generated = request.prompt or "", request.generated
        step = 0
        ids: list[int] = []
        fresh = generated is not None or request.config.seed is not None or not sequence.num_tokens
        if not fresh and prompt.startswith(sequence.text):
            ids = await self._encode_rest(prompt[len(sequence.text) :])
            step = sequence.num_tokens if ids else 0
        if not ids:
            text = prompt + generated.text if generated and not generated.token_ids else prompt
            ids = await self._encode(text)
            if generated:
                ids += generated.token_ids
        turn = _Turn(request, emit, step, ids, self._session_len)
        if turn.room < 1 and not (turn.base and turn.prompt_tokens < self._session_len):
            raise ContextLengthError(
                f"the prompt has {turn.prompt_tokens} tokens and the session_len of TurboMind is {self._session_len}, "
                "answer included; shorten the prompt, or begin a new session"
            )
        return turn

    async def _run(self, request: Request, turn: _Turn, sequence: _Sequence, *, keep: bool) -> None:
        """Send a turn, show the answer, and note what the server has then."""
        values = self._values(sequence, turn.ids, turn.limit, start=not turn.step, end=not keep, step=turn.step)
        values |= self._parameters(request, start=not turn.step) | await self._stop_words(request)
        reading = turn.reading = asyncio.create_task(self._link.stream(self._turbomind, values, turn.take))
        reading.add_done_callback(lambda _: turn.changed.set())
        del reading
        before = sequence.text, sequence.num_tokens
        in_order = False
        try:
            if turn.generated:
                await self._show(turn, last=False)
            await self._follow(turn)
            in_order = await self._settle(sequence, turn, wait=turn.ended)
        except BaseException:
            in_order = await self._settle(sequence, turn, wait=False)
            raise
        finally:
            turn.reading.cancel()
            # A task keeps what it was cancelled in, and an error that leaves here keeps the turn.
            del turn.reading
            if not in_order:
                sequence.forget()
            elif turn.finish_reason is not None:
                num_tokens, text = turn.kept()
                head = (request.prompt or "") + (
                    request.generated.text if request.generated and not turn.generated else ""
                )
                sequence.text, sequence.num_tokens = head + text, turn.step + len(turn.ids) + num_tokens
            elif turn.step:
                sequence.text, sequence.num_tokens = before  # as if the turn had not been
            else:
                sequence.num_tokens = 0

    async def _follow(self, turn: _Turn) -> None:
        """Show tokens as they come. One call for their text is under way at a time; it asks for all that are there.

        Raises:
            ProtocolError: the server ended its call, and had not said that there are no more.
        """
        while turn.finish_reason is None:
            await turn.changed.wait()
            turn.changed.clear()
            cut = turn.reading.done() and not turn.ended
            if turn.reading.done():
                turn.reading.result()
            if turn.come or turn.ended:
                await self._show(turn, last=turn.ended)
            if cut and turn.finish_reason is None:
                raise ProtocolError("TurboMind ended an answer in its middle; look at the Triton server's log")

    async def _show(self, turn: _Turn, *, last: bool) -> None:
        num_tokens = len(turn.come)
        ids = turn.generated + turn.come[:num_tokens]
        if last and ids[-1:] == [self._eos]:
            ids.pop()  # some tokenizers have a text for it
        before = turn.ids[-1 - len(turn.generated)]
        text = await self._decode(before, ids) if ids else ""
        turn.show(num_tokens, text, last=last)

    async def _settle(self, sequence: _Sequence, turn: _Turn, *, wait: bool) -> bool:
        """Return when the server no longer works on a turn: True if its request ended in order.

        Args:
            sequence: The turn's.
            turn: Its request was sent.
            wait: It is about to end by itself.
        """
        if wait:
            await asyncio.wait([turn.reading], timeout=_STOP_PATIENCE_S)
        attempts = 0
        while not turn.reading.done() and attempts < _STOP_ATTEMPTS:
            attempts += 1
            values = self._values(sequence, [self._eos], 0, start=False, end=False, step=0)
            try:
                await self._link.stream(self._turbomind, values | {"STOP": [1]}, lambda _outputs, _final: True)
            except CallFailedError as error:
                if failure_code(error) is None:
                    return False
                # There is nothing to stop: it has not begun, or it has just ended.
            except RaylmError:
                return False  # the engine was closed, or the server is silent: the turn fails with more than that
            await asyncio.wait([turn.reading], timeout=_STOP_PATIENCE_S)
        return turn.reading.done() and not turn.reading.cancelled() and turn.reading.exception() is None

    def _values(
        self, sequence: _Sequence, ids: Sequence[int], limit: int, *, start: bool, end: bool, step: int
    ) -> Values:
        return {
            "input_ids": list(ids),
            "input_lengths": [len(ids)],
            "request_output_len": [limit],
            "step": [step],
            "START": [int(start)],
            "END": [int(end)],
            "STOP": [0],
            "CORRID": [sequence.number],
        }

    def _parameters(self, request: Request, *, start: bool) -> Values:
        """Return the tensors of the generation parameters, without the stop words.

        Raises:
            InvalidRequestError: TurboMind has none for one of them; the text names it.
        """
        config, inputs = request.config, self._turbomind.inputs
        values: Values = {}
        wanted: list[tuple[str, str, list[Any]]] = []
        if config.logprobs:
            raise refuse("logprobs", self._turbomind)
        for parameter in ("min_new_tokens", "presence_penalty", "frequency_penalty"):
            if getattr(config, parameter):
                raise refuse(parameter, self._turbomind)
        if config.greedy:
            wanted.append(("top_k", "runtime_top_k", [1]))
        else:
            wanted.append(("temperature", "temperature", [config.temperature]))
            wanted.append(("top_p", "runtime_top_p", [config.top_p]))
            wanted.append(("top_k", "runtime_top_k", [config.top_k or 0]))
            if start:
                num_before = request.generated.num_tokens if request.generated else 0
                seed = config.after(num_before, left=0).seed
                seed = random.getrandbits(63) if seed is None else seed
                wanted.append(("seed", "random_seed", [seed]))
        if config.repetition_penalty != 1:
            wanted.append(("repetition_penalty", "repetition_penalty", [config.repetition_penalty]))
        if config.ignore_eos:
            wanted.append(("ignore_eos", "bad_words_list", [[self._eos], [1]]))
        for parameter, name, value in wanted:
            if name not in inputs or not fits(value, inputs[name][0]):
                raise refuse(parameter, self._turbomind)
            values[name] = value
        return values

    async def _stop_words(self, request: Request) -> Values:
        """Return the tensor of the stop words. They are cut off here too: within a text a word may be other tokens."""
        if not request.config.stop_words or "stop_words_list" not in self._turbomind.inputs:
            return {}
        words = [ids for word in request.config.stop_words if (ids := await self._encode_rest(word))]
        flat = [token for word in words for token in word]
        ends = list(accumulate(map(len, words)))
        return {"stop_words_list": [flat, ends + [-1] * (len(flat) - len(ends))]} if flat else {}

    async def _encode_rest(self, text: str) -> list[int]:
        """Return the token ids of a text that begins no sequence."""
        ids = await self._encode(text)
        return ids[1:] if ids[:1] == [self._bos] else ids

    async def _encode(self, text: str) -> list[int]:
        """Return a text's token ids, the start of the sequence first."""
        outputs = await self._link.infer(self._preprocessing, {"QUERY": [text.encode()]})
        if "INPUT_ID" not in outputs:
            raise ProtocolError("the preprocessing model sent no INPUT_ID")
        return [int(token) for token in _ids(outputs["INPUT_ID"])]

    async def _decode(self, before: int, ids: Sequence[int]) -> str:
        """Return the text of `ids`, as it goes on after the token `before`: only so its first space is kept."""
        values: Values = {
            "TOKENS_BATCH": [before, *ids],
            "sequence_length": [1],  # tokens to skip
            "skip_special_tokens": [1],
        }
        outputs = await self._link.infer(self._postprocessing, values)
        if "OUTPUT" not in outputs:
            raise ProtocolError("the postprocessing model sent no OUTPUT")
        return first_text(outputs["OUTPUT"]).decode(errors="replace")


def _ids(content: bytes) -> memoryview:
    if len(content) % 4:
        raise ProtocolError(f"the server sent {len(content)} bytes as token ids, which are 4 bytes each")
    return memoryview(content).cast("I")
