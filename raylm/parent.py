"""A process that does not outlive the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends, whatever it is doing; also if it then is another program.

    Args:
        parent_pid: The process that started this one. If it has ended already, so does this one now.
    """
    if sys.platform == "linux":
        # SIGTERM would do for most; SIGKILL does always.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)
