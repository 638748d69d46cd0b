"""The words of a tokenizer as plain data: what each token id stands for.

The tokenizer's process hands it over once, so that the node can turn tokens into text by itself, token by token.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from itertools import accumulate
from typing import Final

from meshnode.core.errors import ModelError

MAX_WORDS: Final = 1 << 20  # the largest vocabularies have 2 ** 18
MAX_WORD_BYTES: Final = 4096  # the longest words (runs of blanks, placeholders) have some hundred
MAX_BYTES: Final = 32 << 20  # of all words
_SHORT: Final = 2  # bytes of a length in the packed form
_NONE: Final = 0xFFFF


class Vocabulary:
    """Words by token id, in little memory. An id may stand for nothing: special tokens, and ids without a word."""

    def __init__(self, words: Iterable[str | None]) -> None:
        """Raises ModelError beyond the limits."""
        self._bytes, self._lengths = bytearray(), array("H")
        for word in words:
            if word is None:
                self._lengths.append(_NONE)
                continue
            data = word.encode()
            if len(data) > MAX_WORD_BYTES:
                raise ModelError(
                    f"a word of the model's tokenizer has {len(data)} bytes; {MAX_WORD_BYTES} are possible"
                )
            self._lengths.append(len(data))
            self._bytes += data
            if len(self._lengths) > MAX_WORDS or len(self._bytes) > MAX_BYTES:
                raise ModelError(
                    f"the model's tokenizer has more than {MAX_WORDS} words or {MAX_BYTES >> 20} MiB of them"
                )
        self._starts = _starts(self._lengths)

    def __len__(self) -> int:
        return len(self._lengths)

    def word(self, token: int) -> str | None:
        """What a token stands for; None for nothing."""
        if not 0 <= token < len(self._lengths) or self._lengths[token] == _NONE:
            return None
        return self._bytes[self._starts[token] : self._starts[token + 1]].decode()

    def pack(self) -> bytes:
        """Number of words, their lengths, their bytes."""
        lengths = array("H", self._lengths)
        if sys.byteorder == "big":
            lengths.byteswap()
        return len(lengths).to_bytes(4, "little") + lengths.tobytes() + self._bytes

    @classmethod
    def unpack(cls, data: bytes) -> Vocabulary:
        """Raises ValueError for anything that `pack` would not give."""
        count = int.from_bytes(data[:4], "little")
        begin = 4 + _SHORT * count
        if count > MAX_WORDS or len(data) < begin or len(data) > begin + MAX_BYTES:
            raise ValueError(f"a vocabulary of {count} words in {len(data)} bytes")
        made = cls(())
        made._lengths = array("H", data[4:begin])
        if sys.byteorder == "big":
            made._lengths.byteswap()
        made._bytes = bytearray(data[begin:])
        made._starts = _starts(made._lengths)
        if any(_NONE > length > MAX_WORD_BYTES for length in made._lengths) or made._starts[-1] != len(made._bytes):
            raise ValueError("the lengths of the words are not those of their bytes")
        made._bytes.decode()  # words are text, and so is what stands in a row
        return made


def _starts(lengths: array[int]) -> array[int]:
    """Where each word begins, and where the last one ends."""
    return array("I", accumulate((0 if length == _NONE else length for length in lengths), initial=0))
