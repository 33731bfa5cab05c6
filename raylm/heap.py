"""How a process that carries many streams should set Python's garbage collector."""

from __future__ import annotations

import gc

_THRESHOLD = 10_000
"""Objects, more of them made than freed, that start a collection of the youngest. Python's own is 700, and one decode
step of a thousand streams makes several times that, nearly all of it freed by its reference count a moment later."""


def settle() -> None:
    """Take what is loaded now as what stays: call it once, when a process of raylm's own has started up.

    A full collection goes through everything that imports have left, for tens of milliseconds in which no stream moves.
    What is frozen is not looked at again. Sets the collector of the whole process, so it is for processes that belong
    to raylm (actors, the command line); a program that reads a thousand streams may call it too.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_THRESHOLD)
