"""How what a child process produces becomes deltas."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from raylm.engines.child import Output, _Generation
from raylm.engines.text import Vocabulary
from raylm.messages import Delta, GenerationConfig, Request

BYTES = Vocabulary({byte: bytes([byte]) for byte in range(256)})


@given(
    st.text("a é世🚀", min_size=1, max_size=12), st.lists(st.integers(1, 5), min_size=60), st.text("a é", max_size=3)
)
def test_a_delta_has_the_tokens_of_its_text(text: str, lengths: Iterable[int], word: str) -> None:
    """However many tokens come at a time: up to any delta but the last, the ids spell the text, and are counted."""
    request = Request(request_id="", prompt="", config=GenerationConfig(stop_words=[f"{word}#"]))
    deltas: list[Delta] = []
    loop = asyncio.new_event_loop()
    try:
        generation = _Generation(request, deltas.append, BYTES, loop.create_future())
        token_ids = tuple(text.encode())
        for length in lengths:
            came, token_ids = token_ids[:length], token_ids[length:]
            generation.advance(Output(0, 1, came, finish_reason=None if token_ids else "length"))
            if not token_ids:
                break
    finally:
        loop.close()
    said = b""
    for delta in deltas[:-1]:
        said += bytes(delta.token_ids)
        assert delta.num_tokens == len(said)
        assert "".join(each.text for each in deltas[: deltas.index(delta) + 1]).encode() == said
    assert "".join(delta.text for delta in deltas) == text
    assert (deltas[-1].num_tokens, deltas[-1].finish_reason) == (len(text.encode()), "length")
