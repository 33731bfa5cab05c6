from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raylm.engines.text import Detokenizer, StopWords, Vocabulary

# A token for each byte, and a few that begin, end or contain a character.
BYTES = Vocabulary({**{byte: bytes([byte]) for byte in range(256)}, 256: b" the", 257: "é".encode(), 258: b"\xf0\x9f"})
SENTENCEPIECE = Vocabulary(
    {
        **{byte + 3: f"<0x{byte:02X}>".encode() for byte in range(256)},
        259: "\u2581".encode(),
        260: "\u2581Hello".encode(),
        261: "\u2581world".encode(),
        262: b"lo",
        263: "\u2581\u2581".encode(),
    }
)

# Few letters, so that texts and stop words meet.
few_letters = st.text("ab\u00e9", max_size=30)
stop_words = st.lists(st.text("ab\u00e9", min_size=1, max_size=6), max_size=4)


def cut(text: str, places: Iterable[int]) -> list[str]:
    """Cut `text` at `places`."""
    at = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(at)]


def expected_text(text: str, words: list[str]) -> tuple[str, bool]:
    """Return what `StopWords` defines, by trying every end and then every word."""
    for end in range(len(text) + 1):
        complete = [word for word in words if text[:end].endswith(word)]
        if complete:
            return text[: end - len(max(complete, key=len))], True
    return text, False


def shown(chunks: Iterable[str], words: Iterable[str]) -> tuple[list[str], bool]:
    """Return the texts that come out for `chunks`, and whether a stop word was hit."""
    stop = StopWords(words)
    texts = []
    for chunk in chunks:
        text, hit = stop.feed(chunk)
        texts.append(text)
        if hit:
            return texts, True
    return [*texts, stop.flush()], False


@given(text=few_letters, words=stop_words, places=st.lists(st.integers(0, 30), max_size=8))
@example(text="aab", words=["aaab", "ab"], places=[1, 2])
@example(text="abab", words=["abb", "bab", "ab"], places=[])
def test_stop_words_end_the_text_however_it_is_cut(text: str, words: list[str], places: list[int]) -> None:
    """The text ends before the stop word that completes first, the longest if several do, whatever the chunks."""
    texts, hit = shown(cut(text, places), words)
    assert ("".join(texts), hit) == expected_text(text, words)


@given(text=few_letters, words=stop_words)
def test_stop_words_hold_back_no_more_than_they_must(text: str, words: list[str]) -> None:
    """After each character, exactly the longest end that is the beginning of a stop word is held back."""
    stop = StopWords(words)
    out = ""
    for end, character in enumerate(text, start=1):
        new, hit = stop.feed(character)
        out += new
        if hit:
            break
        beginnings = [n for word in words for n in range(1, len(word)) if text[:end].endswith(word[:n])]
        assert out == text[: end - max(beginnings, default=0)]


def test_stop_words_stay_hit() -> None:
    """After a hit there is no more text, and nothing to flush."""
    stop = StopWords(["END"])
    assert stop.feed("so END. And") == ("so ", True)
    assert stop.feed("more") == ("", True)
    assert stop.flush() == ""


def test_stop_words_flush_once() -> None:
    """At the natural end what was held back comes out, once."""
    stop = StopWords(["END"])
    assert stop.feed("so EN") == ("so ", False)
    assert stop.flush() == "EN"
    assert stop.flush() == ""


@given(text=st.text(max_size=40), places=st.lists(st.integers(0, 200), max_size=8))
def test_detokenizer_gives_whole_characters(text: str, places: list[int]) -> None:
    """Bytes cut anywhere give the same text, and each piece is part of it."""
    ids = list(text.encode())
    at = sorted({0, len(ids), *(place % (len(ids) + 1) for place in places)})
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.feed(ids[start:end]) for start, end in pairwise(at)]
    assert "".join(pieces) == text


@given(data=st.binary(max_size=30))
def test_detokenizer_replaces_what_is_no_utf8(data: bytes) -> None:
    """Any bytes before a whole character give the text that decoding all of them at once gives."""
    detokenizer = Detokenizer(BYTES)
    assert "".join(detokenizer.feed([byte]) for byte in data + b".") == (data + b".").decode(errors="replace")


def test_detokenizer_holds_back_part_of_a_character() -> None:
    """Of a character in two tokens nothing shows before the second."""
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.feed([256, 258]) == " the"
    assert detokenizer.feed([0x98]) == ""
    assert detokenizer.feed([0x80, 257]) == "\U0001f600é"


def test_detokenizer_passes_over_unknown_ids() -> None:
    """An id that the vocabulary leaves out, such as a special token, has no text."""
    assert Detokenizer(BYTES).feed([256, 99_999, 256]) == " the the"


def test_sentencepiece_text() -> None:
    """SentencePiece's marks become spaces and bytes, and the space that begins the text is dropped."""
    assert SENTENCEPIECE.sentencepiece
    newline, smile = [0x0A + 3], [byte + 3 for byte in "😀".encode()]
    detokenizer = Detokenizer(SENTENCEPIECE)
    pieces = [detokenizer.feed(ids) for ids in ([260], [261], newline, smile, [263, 262])]
    assert pieces == ["Hello", " world", "\n", "😀", "  lo"]


@pytest.mark.parametrize(("text_start", "text"), [(True, "Hello world"), (False, " Hello world")])
def test_sentencepiece_first_space(text_start: bool, text: str) -> None:
    """The first space is dropped at the beginning of a text, not where one is continued."""
    detokenizer = Detokenizer(SENTENCEPIECE, text_start=text_start)
    assert detokenizer.feed([]) + detokenizer.feed([260]) + detokenizer.feed([261]) == text


def test_sentencepiece_drops_one_space() -> None:
    """A text that begins with spaces of its own keeps them."""
    assert Detokenizer(SENTENCEPIECE).feed([259, 260]) == " Hello"


def test_byte_level_vocabulary_is_taken_literally() -> None:
    """A byte-level vocabulary may have U+2581 and `<0x0A>` as ordinary text."""
    tokens = {0: b" a", 1: b" b", 2: "\u2581".encode(), 3: b"<0x0A>"}
    vocabulary = Vocabulary(tokens)
    assert not vocabulary.sentencepiece
    assert Detokenizer(vocabulary).feed([0, 2, 3]) == " a\u2581<0x0A>"


@pytest.mark.parametrize(
    ("token_id", "text"),
    [(65, "A"), (256, " the"), (257, "é"), (258, r"bytes:\xf0\x9f"), (200, r"bytes:\xc8"), (999, "")],
)
def test_spelling_of_one_token(token_id: int, text: str) -> None:
    """A token is its text, or its bytes where those are no text; one that stands for nothing is empty."""
    assert BYTES.spell(token_id) == text
