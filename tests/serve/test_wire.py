"""What a text completion tells of tokens, by what its engine has told."""

from __future__ import annotations

import msgspec

from raylm.messages import Delta
from raylm.serve.schema import CompletionWire


def test_logprobs_of_tokens_without_texts() -> None:
    """A server that does not spell its tokens still has one entry for each of them in each column."""
    wire = CompletionWire("cmpl-1", "model", ["prompt"], include_usage=False, logprobs=True, echo=False)
    chunks = [
        msgspec.json.decode(wire.delta(0, delta).removeprefix(b"data: "))
        for delta in (Delta("ab", 2, (1, 2), (-0.5, -1.0)), Delta("cd", 3, (3,), (-2.0,)))
    ]
    told = [msgspec.convert(chunk["choices"][0]["logprobs"], dict[str, list[object] | None]) for chunk in chunks]
    assert told == [
        {"tokens": ["", ""], "token_logprobs": [-0.5, -1.0], "top_logprobs": None, "text_offset": [0, 0]},
        {"tokens": [""], "token_logprobs": [-2.0], "top_logprobs": None, "text_offset": [2]},
    ]
