"""Generation parameters are checked at the border, and deltas add up."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.errors import InvalidRequestError
from raylm.messages import Delta, Details, GenerationConfig, Request


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", "0.5"),
        ("top_k", 0),
        ("top_k", 1.5),
        ("temperature", -0.1),
        ("temperature", None),
        ("max_new_tokens", 0),
        ("max_new_tokens", "many"),
        ("min_new_tokens", -1),
        ("repetition_penalty", 0),
        ("stop_words", [""]),
        ("stop_words", [1]),
        ("stop_words", ["\ud800"]),
        ("seed", -1),
        ("seed", 2**70),
        ("max_new_tokens", 2**70),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("json_schema", 5),
        ("ignore_eos", "yes"),
        ("tpo_p", 0.5),
    ],
)
def test_a_wrong_parameter_is_named(name: str, value: Any) -> None:
    """A value out of range, of a wrong type, or an unknown name raises InvalidRequestError that names the parameter."""
    with pytest.raises(InvalidRequestError, match=name):
        GenerationConfig().updated({name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("top_p", 1), ("top_k", None), ("temperature", 0), ("stop_words", None), ("seed", 0)]
)
def test_values_at_the_edge_are_right(name: str, value: Any) -> None:
    """The edges of each range, and None for no limit, are accepted."""
    config = GenerationConfig().updated({name: value})
    assert getattr(config, name) == (() if name == "stop_words" else value)


def test_one_stop_word_is_a_list_of_one() -> None:
    """`stop_words` takes a single string."""
    assert GenerationConfig().updated({"stop_words": "<|im_end|>"}).stop_words == ("<|im_end|>",)


def test_more_minimum_than_maximum_is_refused() -> None:
    """`min_new_tokens` above `max_new_tokens` raises."""
    with pytest.raises(InvalidRequestError, match="min_new_tokens"):
        GenerationConfig().updated({"min_new_tokens": 5, "max_new_tokens": 4})


def test_no_new_tokens_is_for_echo() -> None:
    """`max_new_tokens` may be 0 where the prompt's tokens are asked for, and there alone."""
    with pytest.raises(InvalidRequestError, match="max_new_tokens"):
        GenerationConfig().updated({"max_new_tokens": 0})
    assert GenerationConfig().updated({"max_new_tokens": 0, "echo": True}).max_new_tokens == 0


def test_top_logprobs_need_logprobs() -> None:
    """Candidates stand beside the log-probabilities of the tokens."""
    with pytest.raises(InvalidRequestError, match="top_logprobs"):
        GenerationConfig().updated({"top_logprobs": 2})


def test_merged_details_are_the_sum() -> None:
    """However deltas are merged, what they tell beyond their text is that of the sequence."""
    echo = Delta("", 0, details=Details(prompt_token_ids=(7, 8), prompt_logprobs=(0.0, -1.0)))
    first = Delta("a", 1, (1,), (-0.5,), details=Details(("a",), ((("a", -0.5),),)))
    second = Delta("b", 2, (2,), (-0.25,), details=Details(("b",), ((("b", -0.25),),)))
    merged = Delta("", 0)
    for delta in (echo, first, second):
        merged.extend(delta)
    assert merged.details == Details(("a", "b"), ((("a", -0.5),), (("b", -0.25),)), (7, 8), (), (0.0, -1.0))
    assert first.details == Details(("a",), ((("a", -0.5),),))


DELTAS = st.lists(
    st.builds(
        lambda text, ids: (text, ids), st.text(max_size=4), st.lists(st.integers(0, 60_000), min_size=1, max_size=3)
    ),
    min_size=1,
)


@given(DELTAS)
def test_merged_deltas_are_the_sum(parts: list[tuple[str, list[int]]]) -> None:
    """However many deltas are merged into one, text, ids and count are those of the sequence."""
    merged, count = None, 0
    for text, ids in parts:
        count += len(ids)
        delta = Delta(text, count, tuple(ids))
        if merged is None:
            merged = delta
        else:
            merged.extend(delta)
    assert merged is not None
    assert merged.text == "".join(text for text, _ in parts)
    assert merged.token_ids == tuple(token for _, ids in parts for token in ids)
    assert merged.num_tokens == count


@given(
    st.builds(
        Request,
        request_id=st.text(),
        prompt=st.text(),
        config=st.builds(
            GenerationConfig,
            max_new_tokens=st.integers(1, 10**6),
            temperature=st.floats(0, 10),
            top_k=st.none() | st.integers(1, 1000),
            stop_words=st.lists(st.text(min_size=1)).map(tuple),
        ),
    )
)
def test_requests_cross_processes_unchanged(request: Request) -> None:
    """A request is the same after msgpack, and after JSON."""
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request) == request
    assert msgspec.convert(json.loads(msgspec.json.encode(request)), Request) == request
