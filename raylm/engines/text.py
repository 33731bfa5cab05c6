"""From token ids to text that may be shown: whole characters, and nothing of a stop word.

Pure: no engine, no I/O. Both classes hold the state of one text and are fed piece by piece; however the pieces are cut,
the text that comes out is the same.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping

_WORD_BOUNDARY = "\u2581".encode()
_BYTE_TOKEN = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
_decoder = codecs.getincrementaldecoder("utf-8")


class Vocabulary:
    """The bytes that each token of a model stands for.

    Tokens of byte-level BPE are those bytes. A SentencePiece vocabulary writes a space as U+2581 and a single byte as
    `<0x0A>`, and its texts begin with a space that is not part of them. It is told by more of its tokens beginning with
    U+2581 than with a space.

    Args:
        tokens: Token by id, as the tokenizer stores it. Ids that stand for no text, such as special tokens, are left
            out.

    Attributes:
        token_bytes: Bytes by id. An id that is not there stands for no text.
        sentencepiece: Whether the tokens were written as SentencePiece writes them.
    """

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        marked = sum(token.startswith(_WORD_BOUNDARY) for token in tokens.values())
        spaced = sum(token.startswith(b" ") for token in tokens.values())
        self.sentencepiece = marked > spaced
        self.token_bytes = (
            {token_id: _from_sentencepiece(token) for token_id, token in tokens.items()}
            if self.sentencepiece
            else dict(tokens)
        )

    def spell(self, token_id: int) -> str:
        """Return the text of one token, as `messages.Details.token_texts` has it."""
        token = self.token_bytes.get(token_id, b"")
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _from_sentencepiece(token: bytes) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1].decode())
    return token.replace(_WORD_BOUNDARY, b" ")


class Detokenizer:
    """Turns the token ids of one text into the text.

    Bytes that are no UTF-8 become U+FFFD. A character of which only a part has come is held back until the rest comes;
    at the end of the text it is dropped.

    Args:
        vocabulary: The model's.
        text_start: Whether the first id begins a text, so that SentencePiece's first space is dropped.
    """

    def __init__(self, vocabulary: Vocabulary, *, text_start: bool = True) -> None:
        self._token_bytes = vocabulary.token_bytes
        self._drop_space = vocabulary.sentencepiece and text_start
        self._decoder = _decoder("replace")
        self._decode = self._decoder.decode

    @property
    def holds(self) -> bool:
        """Whether a part of a character is held back."""
        return bool(self._decoder.getstate()[0])

    def feed(self, token_ids: Iterable[int]) -> str:
        """Return the characters that `token_ids` complete. May be empty."""
        text = self._decode(b"".join([self._token_bytes.get(token_id, b"") for token_id in token_ids]))
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class StopWords:
    """Ends a text before the first stop word in it.

    The hit is at the first character with which any stop word is complete; when several are complete with it, the
    longest counts. The text ends where that word begins. Whatever may yet turn out to be the beginning of a stop word
    is held back.

    Args:
        words: The stop words; none of them empty.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(words)
        self._initials = frozenset(word[0] for word in self._words)
        self._longest = max(map(len, self._words), default=0)
        self._held = ""
        self._hit = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Add text.

        Returns:
            The text that may be shown now, and whether a stop word was hit. After a hit there is no more text.
        """
        if self._hit:
            return "", True
        if not self._held and self._initials.isdisjoint(text):
            return text, False
        # What was shown is no part of a match: it was shown because no stop word could begin in it.
        text = self._held + text
        matches = [(start + len(word), start) for word in self._words if (start := text.find(word)) >= 0]
        if matches:
            self._hit = True
            self._held = ""
            return text[: min(matches)[1]], True
        held_from = self._find_beginning(text)
        self._held = text[held_from:]
        return text[:held_from], False

    def flush(self) -> str:
        """Return what is held back, at the end of a text without a hit."""
        held, self._held = self._held, ""
        return held

    def _find_beginning(self, text: str) -> int:
        """Return where the longest end of `text` that is the beginning of a stop word starts, or its length."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._initials:
                tail = text[start:]
                if any(word.startswith(tail) for word in self._words):
                    return start
        return len(text)
