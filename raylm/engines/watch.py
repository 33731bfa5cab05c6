"""Watch: the end of an answer that a server is silent about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watch:
    """Ends an answer when nothing was heard of it for too long.

    Before it has begun the request may wait in the server for its turn: it is left there while others get tokens.

    Args:
        end: Ends it.
        limit_s: How long that is.
        others_heard_at: When any request of the engine last got something, on the loop's clock.

    Attributes:
        heard_at: When the last of it came, on the loop's clock. One timer looks at it now and then: a timer for each
            token would cost more than the token.
        begun: Whether anything of it has come.
        expired: It was ended.
    """

    __slots__ = ("_end", "_limit_s", "_loop", "_others_heard_at", "_timer", "begun", "expired", "heard_at")

    def __init__(self, end: Callable[[], object], limit_s: float, others_heard_at: Callable[[], float]) -> None:
        self._end = end
        self._limit_s = limit_s
        self._others_heard_at = others_heard_at
        self._loop = asyncio.get_running_loop()
        self.heard_at = self._loop.time()
        self.begun = False
        self.expired = False
        self._timer = self._loop.call_later(limit_s, self._look)

    def _look(self) -> None:
        heard_at = self.heard_at if self.begun else max(self.heard_at, self._others_heard_at())
        left_s = heard_at + self._limit_s - self._loop.time()
        if left_s > 0.001:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._expire()

    def _expire(self) -> None:
        self.expired = True
        self._end()

    def end_in(self, limit_s: float) -> None:
        """End the answer after this time, whatever is heard."""
        self._timer.cancel()
        self._timer = self._loop.call_later(limit_s, self._expire)

    def stop(self) -> None:
        """Watch no longer."""
        self._timer.cancel()
