"""From tokens to text, as they come: what the `decoder` of a tokenizer.json does, without the library.

The library decodes a whole list of tokens at once. Here every kind of decoder is a step that takes words one at a
time and holds back what later words may change, so that the pieces joined are the very text of the whole list.
Nothing foreign runs: the words are plain data (`vocabulary.py`), and so are the settings of the steps.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

from meshnode.core.errors import ModelError
from meshnode.text.vocabulary import Vocabulary

MAX_STEPS: Final = 16
MAX_SETTING: Final = 64  # characters of a pattern, a prefix, ...
MAX_PIECE: Final = 1 << 16  # characters that one token may become
_BROKEN: Final = "\ufffd"
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LOOK_BACK: Final = 16  # tokens of a prompt that may hold the beginning of its last character


class Step(Protocol):
    """One kind of decoder."""

    def feed(self, word: str) -> Iterable[str]:
        """Take one word; the words that are certain now."""

    def end(self) -> Iterable[str]:
        """What was held back. Nothing follows."""

    def cut(self) -> Iterable[str]:
        """What was held back, but for a begun character, which stays: it is no error that it has not ended."""


class _EachWord:
    """A step that changes one word at a time, and knows which is the first."""

    def __init__(self, first: Callable[[str], str], other: Callable[[str], str] | None = None) -> None:
        self._change = first
        self._other = other or first

    def feed(self, word: str) -> Iterable[str]:
        changed, self._change = self._change(word), self._other
        return (changed,)

    def end(self) -> Iterable[str]:
        return ()

    def cut(self) -> Iterable[str]:
        return ()


class _ByteFallback:
    """<0x41> is the byte 0x41. The bytes in a row are a text, or each of them is a broken character."""

    def __init__(self) -> None:
        self._open = b""  # the character that the prompt began and left to us
        self._run = bytearray()

    def feed(self, word: str) -> Iterable[str]:
        if match := _BYTE_TOKEN.fullmatch(word):
            self._run.append(int(match[1], 16))
            return ()
        return (*self.end(), word)

    def end(self) -> Iterable[str]:
        open_, run, self._open, self._run = self._open, bytes(self._run), b"", bytearray()
        if not run:
            return ()
        for text in (open_ + run, run):
            with suppress(UnicodeDecodeError):
                return (text.decode(),)
        return (_BROKEN * len(run),)

    def cut(self) -> Iterable[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(self._run))
        begun = decoder.getstate()[0]
        self._run = self._run[: len(self._run) - len(begun)]
        whole = tuple(self.end())
        self._open = begun
        return whole


class _LastWord:
    """`suffix` ends a word of the text, and is a blank unless it ends the whole."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held: str | None = None

    def feed(self, word: str) -> Iterable[str]:
        held, self._held = self._held, word
        return () if held is None else (held.replace(self._suffix, " "),)

    def end(self) -> Iterable[str]:
        held, self._held = self._held, None
        return () if held is None else (held.replace(self._suffix, ""),)

    def cut(self) -> Iterable[str]:
        if self._held is None:
            return ()
        word, self._held = self._held, self._suffix if self._held.endswith(self._suffix) else ""
        return (word.replace(self._suffix, ""),)


class _Bytes:
    """The letters of a byte-level vocabulary are bytes, and all of them one UTF-8 text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._open = b""  # the character that the prompt began, and what came since, until it is known what it is

    def feed(self, word: str) -> Iterable[str]:
        try:
            data = bytes(map(_BYTE_LETTERS.__getitem__, word))
        except KeyError:  # an added token, which is text already
            data = word.encode()
        return (self._ours(self._decoder.decode(data), data),)

    def end(self) -> Iterable[str]:
        return (self._ours(self._decoder.decode(b"", final=True), b""),)

    def cut(self) -> Iterable[str]:
        self._open = self._decoder.getstate()[0]
        return ()

    def _ours(self, text: str, data: bytes) -> str:
        """Without the sign for a broken character that was broken in the prompt already."""
        if not self._open:
            return text
        self._open += data
        if not text:
            return ""
        open_, self._open = self._open, b""
        return text if open_.startswith(_BROKEN.encode()) else text.removeprefix(_BROKEN)


class _Begin:
    """Leaves out up to `most` characters with which the whole text begins."""

    def __init__(self, content: str, most: int) -> None:
        self._content = content
        self._left = most

    def feed(self, word: str) -> Iterable[str]:
        while self._left and word:
            if not word.startswith(self._content):
                self._left = 0
                break
            word = word[1:]
            self._left -= 1
        return (word,)

    def end(self) -> Iterable[str]:
        return ()

    def cut(self) -> Iterable[str]:
        self._left = 0
        return ()


class _End:
    """Leaves out up to `most` characters with which the whole text ends."""

    def __init__(self, content: str, most: int) -> None:
        self._content = content
        self._most = most
        self._held = ""

    def feed(self, word: str) -> Iterable[str]:
        text = self._held + word
        size = len(text) - len(text.rstrip(self._content))
        cut = len(text) - min(size, self._most)
        self._held = text[cut:]
        return (text[:cut],)

    def end(self) -> Iterable[str]:
        self._held = ""
        return ()

    def cut(self) -> Iterable[str]:
        return ()


class _Everywhere:
    """Replaces a text in the whole, wherever its pieces are cut."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content
        self._held = ""

    def feed(self, word: str) -> Iterable[str]:
        *done, rest = (self._held + word).split(self._pattern)
        keep = next(n for n in range(min(len(rest), len(self._pattern) - 1), -1, -1) if self._matches(rest, n))
        self._held = rest[len(rest) - keep :]
        return (self._content.join((*done, rest[: len(rest) - keep])),)

    def _matches(self, rest: str, size: int) -> bool:
        return rest.endswith(self._pattern[:size])

    def end(self) -> Iterable[str]:
        held, self._held = self._held, ""
        return (held,)

    def cut(self) -> Iterable[str]:
        return self.end()


class Decoder:
    """What a tokenizer.json says about decoding, read and checked. Makes the steps of one text."""

    def __init__(self, settings: Mapping[str, Any] | None) -> None:
        """`settings`: the field `decoder`. Raises ModelError when text can't be made piece by piece."""
        self._makers: list[Callable[[], Step]] = []
        self._whole = False  # whether the words before are joined to one
        if settings is None:
            self._makers.append(lambda: _EachWord(str, " {}".format))
        else:
            self._add(settings)
        if len(self._makers) > MAX_STEPS:
            raise _unknown(f"{len(self._makers)} steps; {MAX_STEPS} are possible")

    def steps(self) -> list[Step]:
        return [make() for make in self._makers]

    def alone(self, word: str) -> bytes:
        """What a word stands for in the middle of a text."""
        steps = self.steps()
        if any(isinstance(step, _Bytes) for step in steps):
            with suppress(KeyError):  # an added token is text already
                return bytes(map(_BYTE_LETTERS.__getitem__, word))
        if any(isinstance(step, _ByteFallback) for step in steps) and (match := _BYTE_TOKEN.fullmatch(word)):
            return bytes([int(match[1], 16)])
        _pass(steps, ("a",))
        _ended(steps)
        return (_pass(steps, (word,)) + _ended(steps)).encode()

    def _add(self, settings: Mapping[str, Any]) -> None:
        kind = settings.get("type") if isinstance(settings, Mapping) else None
        if kind == "Sequence":
            parts = settings.get("decoders")
            if not isinstance(parts, list) or len(parts) > MAX_STEPS:
                raise _unknown("a Sequence without a list of decoders")
            if any(isinstance(part, Mapping) and part.get("type") == "Sequence" for part in parts):
                raise _unknown("a Sequence in a Sequence")
            for part in parts:
                self._add(part)
        elif self._whole:
            self._add_to_whole(kind, settings)
        else:
            self._add_to_words(kind, settings)

    def _add_to_words(self, kind: Any, settings: Mapping[str, Any]) -> None:
        add = self._makers.append
        match kind:
            case "ByteLevel":
                add(_Bytes)
                self._whole = True
            case "Fuse":
                self._whole = True
            case "ByteFallback":
                add(_ByteFallback)
            case "Replace":
                pattern, content = _replacement(settings)
                add(lambda: _EachWord(lambda word: word.replace(pattern, content)))
            case "Strip":
                letter, start, stop = _strip(settings)
                add(lambda: _EachWord(lambda word: _stripped(word, letter, start, stop)))
            case "Metaspace":
                sign = _text(settings, "replacement")
                kept = " " if settings.get("prepend_scheme", "always") == "never" else ""
                add(lambda: _EachWord(lambda word: word.replace(sign, kept), lambda word: word.replace(sign, " ")))
            case "WordPiece":
                prefix, clean = _text(settings, "prefix"), _cleaned if settings.get("cleanup", True) else str
                add(lambda: _EachWord(clean, lambda word: clean(_continued(word, prefix))))
            case "BPEDecoder":
                suffix = _text(settings, "suffix")
                add(lambda: _LastWord(suffix))
            case _:
                raise _unknown(f"the kind {str(kind)[:MAX_SETTING]}")

    def _add_to_whole(self, kind: Any, settings: Mapping[str, Any]) -> None:
        match kind:
            case "Fuse":
                pass
            case "Strip":
                letter, start, stop = _strip(settings)
                self._makers += [lambda: _Begin(letter, start), lambda: _End(letter, stop)]
            case "Replace":
                pattern, content = _replacement(settings)
                self._makers.append(lambda: _Everywhere(pattern, content))
            case _:
                raise _unknown(f"{str(kind)[:MAX_SETTING]} after the words are joined")


class TextStream:
    """Tokens in, text out as soon as it is certain (a character may need several tokens). Takes any token."""

    def __init__(self, vocabulary: Vocabulary, decoder: Decoder, prompt: Sequence[int] = ()) -> None:
        """`prompt`: what the tokens continue. Its text is not given again, but a character that it left open is."""
        self._vocabulary = vocabulary
        self._decoder = decoder
        self._steps = decoder.steps()
        if context := self._last_words(prompt):
            _pass(self._steps, context)
            self.cut()

    def feed(self, token: int) -> str:
        """Text that this token completes; often empty for non-Latin scripts.

        Raises ModelError when a token becomes more than 65,536 characters.
        """
        word = self._vocabulary.word(token)
        return "" if word is None else _pass(self._steps, (word,))

    def alone(self, token: int) -> bytes:
        """What one token stands for in the middle of a text; nothing for special tokens.

        Tokens may be parts of characters, so these are bytes. Those of the tokens of an answer give its text, but
        for what a decoder does to neighbours.
        """
        word = self._vocabulary.word(token)
        return b"" if word is None else self._decoder.alone(word)

    def cut(self) -> str:
        """What is still held back when the answer is cut off; not the character in whose middle it is."""
        return _ended(self._steps)

    def rest(self) -> str:
        """What is still held back when the answer ends."""
        return "".join([_pass(self._steps[n + 1 :], step.end()) for n, step in enumerate(self._steps)])

    def _last_words(self, prompt: Sequence[int]) -> list[str]:
        """So many of the prompt's words that a character and the beginning of a text can be told."""
        found: list[str] = []
        for token in reversed(prompt):
            if (word := self._vocabulary.word(token)) is not None:
                found.append(word)
            if len(found) == _LOOK_BACK:
                break
        return found[::-1]


def _pass(steps: Sequence[Step], words: Iterable[str]) -> str:
    """What comes out at the end when words pass through all the steps."""
    for step in steps:
        words = [out for word in words for out in step.feed(word)]
        if any(len(word) > MAX_PIECE for word in words):
            raise ModelError(
                f"the decoder of the model's tokenizer makes more than {MAX_PIECE} characters of one token"
            )
    return "".join(words)


def _ended(steps: Sequence[Step]) -> str:
    """What comes out at the end when a text is cut off."""
    return "".join([_pass(steps[n + 1 :], step.cut()) for n, step in enumerate(steps)])


def _stripped(word: str, letter: str, start: int, stop: int) -> str:
    begin = len(word) - len(word.lstrip(letter))
    word = word[min(begin, start) :]
    end = len(word) - len(word.rstrip(letter))
    return word[: len(word) - min(end, stop)]


def _continued(word: str, prefix: str) -> str:
    return word.removeprefix(prefix) if word.startswith(prefix) else f" {word}"


_ENGLISH: Final = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " do not": " don't",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}


def _cleaned(word: str) -> str:
    """As the library cleans the words of WordPiece, one word at a time and in this order."""
    for apart, together in _ENGLISH.items():
        word = word.replace(apart, together)
    return word


def _byte_letters() -> dict[str, int]:
    """The letters of byte-level vocabularies (GPT-2): printable bytes stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_LETTERS: Final = _byte_letters()


def _text(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key)
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_SETTING:
        raise _unknown(f"{settings.get('type')} whose {key} is no text of 1 to {MAX_SETTING} characters")
    return value


def _replacement(settings: Mapping[str, Any]) -> tuple[str, str]:
    pattern, content = settings.get("pattern"), settings.get("content")
    plain = pattern.get("String") if isinstance(pattern, Mapping) else None
    if not isinstance(plain, str) or not 1 <= len(plain) <= MAX_SETTING:
        raise _unknown("Replace with a regular expression, or a pattern that is too long")
    if not isinstance(content, str) or len(content) > MAX_SETTING:
        raise _unknown(f"Replace whose content is no text of at most {MAX_SETTING} characters")
    return plain, content


def _strip(settings: Mapping[str, Any]) -> tuple[str, int, int]:
    letter = _text(settings, "content")
    counts = settings.get("start"), settings.get("stop")
    if len(letter) != 1 or any(type(n) is not int or not 0 <= n <= MAX_SETTING for n in counts):
        raise _unknown(f"Strip other than of 0 to {MAX_SETTING} times one character")
    return letter, int(counts[0] or 0), int(counts[1] or 0)


def _unknown(what: str) -> ModelError:
    return ModelError(
        f"the decoder in the model's tokenizer.json has {what}, which can't be followed token by token; "
        "ask this model in tokens"
    )
