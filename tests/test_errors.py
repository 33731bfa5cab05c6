"""Errors survive every way they travel."""

import copy
import pickle

import pytest

from raylm import errors
from raylm.errors import ErrorMessage, PartialFailureError, RaylmError, from_message, to_message

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, RaylmError) and value is not PartialFailureError
]


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_survive_pickling(kind: type[RaylmError]) -> None:
    """Every error has its class, text and `retry_after_s` after pickle and copy."""
    error = kind("what happened", retry_after_s=2.5)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301
        assert type(twin) is kind
        assert str(twin) == "what happened"
        assert twin.retry_after_s == 2.5


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_survive_the_token_plane(kind: type[RaylmError]) -> None:
    """Every error has its class, text and `retry_after_s` after `to_message` and `from_message`."""
    message = to_message(kind("what happened", retry_after_s=2.5))
    assert message == ErrorMessage(kind.__name__, "what happened", 2.5)
    twin = from_message(message)
    assert (type(twin), str(twin), twin.retry_after_s) == (kind, "what happened", 2.5)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_drawn_tree_is_the_tree(kind: type[RaylmError]) -> None:
    """The module's docstring names every class with its own status code."""
    line = next(line for line in (errors.__doc__ or "").splitlines() if kind.__name__ in line.split())
    drawn = [int(word) for word in line.split() if word.isdigit()]
    assert drawn in ([], [kind.status_code])


def test_partial_failure_keeps_every_row() -> None:
    """PartialFailureError says how many rows failed and keeps all of them, also after pickling."""
    error = PartialFailureError([RaylmError("first"), RaylmError("second")])
    assert "2 of 2 rows failed" in str(error)
    assert [str(row) for row in pickle.loads(pickle.dumps(error)).results] == ["first", "second"]  # noqa: S301
