"""What tests of jobs have in common."""

from typing import Any

import pytest

from raylm.batch import Job


@pytest.fixture
def nums_before_the_rest(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows read and rows at the pool, after each one that is sent before actors have seen what all prompts share."""
    nums: list[tuple[int, int]] = []
    send = Job._send

    def noted(job: Job, *arguments: Any, **more: Any) -> None:
        send(job, *arguments, **more)
        if not job._primed:
            nums.append((job.tally.num_rows, job.tally.num_sent))

    monkeypatch.setattr(Job, "_send", noted)
    return nums
