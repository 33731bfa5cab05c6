"""Answers that nobody has given, for tests of what is done with answers."""

from raylm.batch.ledger import Record
from raylm.messages import Completion, Receipt, Usage

USAGE = Usage(prompt_tokens=2, completion_tokens=3)
RECEIPT = Receipt(
    slot=1,
    actor="a",
    node="here",
    why="least-loaded",
    queue_ms=0.5,
    attempts=1,
    usage=USAGE,
    engine="simulated",
    engine_version="1",
    model="m",
)
COMPLETION = Completion(request_id="r", text="h\u00e9 \u2713", finish_reason="stop", usage=USAGE, receipt=RECEIPT)
ENGINE = "simulated/1/m/"


def answered(position: int, key: str = "k", **more: object) -> Record:
    """Return the record of a greedy row."""
    return Record(position=position, key=key, id=position + 1, greedy=True, completion=COMPLETION, **more)  # type: ignore[arg-type]
