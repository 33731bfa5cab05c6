"""The contract between an engine and everything above it.

An engine turns one `Request` into a stream of `Delta`s. It knows nothing of Ray, actors, sessions or other replicas.
The author of a new engine writes these six methods, adds its settings to `config.py`, and runs the public conformance
suite, `tests/engines/test_conformance.py`, on it.

The rules that the suite checks:

1.  Deltas carry new text only, in whole characters, and never a stop word or a part of one that later completes.
2.  `num_tokens` never decreases. The last delta, and no other, has `finish_reason` and `usage`. Tokens are counted, and
    their ids told, with the delta that ends their text, or with the last one: another engine may have to go on from the
    text alone.
3.  `generate` returns after the last delta. Failures are raised as `RaylmError`; nothing turns one into empty text.
4.  Cancelling the task that runs `generate` aborts the request inside the engine within one decode step.
5.  `request.generated` is what the request has already produced elsewhere: generation goes on after it, and only what
    follows is emitted. It counts against `max_new_tokens`.
    With `echo` the first delta of a request that continues nothing has the prompt's tokens, even if no text.
6.  `check_health` answers while generation runs.
7.  `ActorLostError` from `generate` or `check_health` says that the engine is dead for good: its actor is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from raylm.messages import Delta, EngineInfo, EngineStatistics, Request

Emit = Callable[[Delta], None]
"""Takes the next delta of one request, to keep and to change. Called on the engine's event loop; never blocks."""


class Engine(Protocol):
    """Six methods on one event loop."""

    async def start(self) -> EngineInfo:
        """Load the model. Called once, before anything else.

        Raises:
            EngineStartError: the model or the library behind the engine cannot be loaded; the text says what to do.
        """
        ...

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate, and call `emit` for each delta in order; return after the last one.

        Args:
            request: What to generate. Its `config` was validated at the border.
            emit: Receives the deltas. One call a decode step, not one task switch a token: that is why it is a plain
                function and `generate` no async iterator.

        Raises:
            ContextLengthError: the prompt leaves no room for a token.
            InvalidRequestError: this engine cannot honour a field; the text names it.
            EngineError: this generation failed.
            ActorLostError: the engine is dead for good.
        """
        ...

    async def tokenize(self, request: Request) -> tuple[int, ...]:
        """Return the ids of the prompt's tokens, those of a chat template included. Generates nothing.

        Raises:
            InvalidRequestError: this engine cannot tell, and says that it cannot count tokens; or as for `generate`.
            ActorLostError: the engine is dead for good.
        """
        ...

    async def check_health(self) -> None:
        """Return when the engine can work.

        Raises:
            EngineError: it cannot at present.
            ActorLostError: it never will again.
        """
        ...

    def statistics(self) -> EngineStatistics:
        """Return the load at this moment."""
        ...

    async def close(self) -> None:
        """End all generation and free what `start` took. Leaves no task, thread or process behind."""
        ...
