"""Any tokens, one at a time, give the text that the library gives for the whole list."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from meshnode.core.errors import ModelError
from meshnode.text.decoding import Decoder, TextStream
from meshnode.text.vocabulary import Vocabulary

WORDS = [
    "▁",
    "▁a",
    "a",
    "b",
    " ",
    ".",
    "n't",
    " do not",
    "'s",
    "▁▁x",
    "ä",
    "é",
    "�",
    "日本",
    "🎲",
    "<0x4",
    "",
    "<0xZZ>",
]


def byte_level(*, fuse: bool = False) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    more = ["Ġthe", "Ã¤", "ðŁ", "ĺĢ", "Ċ", "日本", "a b"]  # the last two are no letters of bytes
    made = Tokenizer(models.BPE({word: i for i, word in enumerate([*letters, *more])}, []))
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]) if fuse else decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["<tool>", "für", " x "])
    return made


def fallback(*steps: decoders.Decoder | None) -> Tokenizer:
    vocabulary = {text: i for i, text in enumerate(("<unk>", "<s>", "</s>"))}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in WORDS:
        vocabulary.setdefault(word, len(vocabulary))
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence(list(steps))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.add_tokens([" added ", "▁added"])
    return made


def llama() -> Tokenizer:
    return fallback(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))


def gemma() -> Tokenizer:
    return fallback(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())


def metaspace(scheme: str) -> Tokenizer:
    return fallback(decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme))


def joined() -> Tokenizer:
    """Steps after the words are one text."""
    return fallback(
        decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁▁", "--"), decoders.Replace("▁", " ")
    )


def pieces() -> Tokenizer:
    vocabulary = {
        w: i for i, w in enumerate(["[UNK]", "the", "##s", "##", "!", ".", ",", "'", "n't", "do not", "'s"])
    }
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[CLS]", "[UNK]"])
    return made


def suffixes() -> Tokenizer:
    vocabulary = {w: i for i, w in enumerate(["a", "b</w>", "</w>", "c", "</w>d</w>"])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoders.BPEDecoder()
    return made


def unigram() -> Tokenizer:
    words = [("<unk>", 0.0), *((word, -1.0) for word in dict.fromkeys(WORDS) if word)]
    words += [(f"<0x{byte:02X}>", -2.0) for byte in range(256)]
    made = Tokenizer(models.Unigram(words, 0, byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(["<unk>"])
    return made


def bare() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"w0": 0, "w1": 1, "": 2}, unk_token="w0"))
    made.add_special_tokens(["<s>"])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, fused": lambda: byte_level(fuse=True),
    "llama": llama,
    "gemma": gemma,
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "joined": joined,
    "wordpiece": pieces,
    "suffixes": suffixes,
    "unigram": unigram,
    "bare": bare,
}


@cache
def opened(kind: str) -> tuple[Tokenizer, Vocabulary, Decoder]:
    fast = KINDS[kind]()
    specials = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}
    words = [fast.id_to_token(i) for i in range(fast.get_vocab_size() + 3)]
    table = Vocabulary([None if word in specials else word for word in words])
    settings = None if fast.decoder is None else json.loads(fast.decoder.__getstate__())
    return fast, Vocabulary.unpack(table.pack()), Decoder(settings)


def tokens_of(kind: str) -> st.SearchStrategy[list[int]]:
    fast, _, _ = opened(kind)
    any_token = st.integers(0, fast.get_vocab_size() + 5)
    if fast.token_to_id("<0x00>") is None:
        return st.lists(any_token, max_size=24)
    text = st.text(max_size=3).map(str.encode) | st.binary(max_size=3)
    spelt = text.map(lambda data: [fast.token_to_id(f"<0x{byte:02X}>") for byte in data])
    parts = st.lists(any_token.map(lambda token: [token]) | spelt, max_size=12)
    return parts.map(lambda lists: list(chain(*lists)))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stream_is_the_text_of_all_its_tokens(kind: str, data: st.DataObject) -> None:
    fast, vocabulary, decoder = opened(kind)
    tokens = data.draw(tokens_of(kind))
    stream = TextStream(vocabulary, decoder)
    got = "".join([stream.feed(token) for token in tokens]) + stream.rest()
    assert got == fast.decode(tokens)
    assert stream.rest() == ""


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stream_that_is_cut_lacks_a_begun_character_at_most(kind: str, data: st.DataObject) -> None:
    fast, vocabulary, decoder = opened(kind)
    tokens = data.draw(tokens_of(kind))
    stream = TextStream(vocabulary, decoder)
    got = "".join([stream.feed(token) for token in tokens]) + stream.cut()
    whole = fast.decode(tokens)
    if got != whole:  # bytes that make no text together do so without the last of them
        assert whole.endswith("�")
        assert len(got) < len(whole)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_an_answer_has_none_of_the_words_of_its_prompt(kind: str, data: st.DataObject) -> None:
    """A prompt of whole characters and an answer are together what the library makes of both."""
    fast, vocabulary, decoder = opened(kind)
    prompt, tokens = data.draw(tokens_of(kind)), data.draw(tokens_of(kind))
    stream = TextStream(vocabulary, decoder, prompt)
    got = "".join([stream.feed(token) for token in tokens]) + stream.rest()
    before, whole = fast.decode(prompt), fast.decode(prompt + tokens)
    if "�" not in before + whole and whole.startswith(before):
        assert before + got == whole
    else:  # a character was cut between them or is broken: what it became may be given, words of the prompt not
        assert len(got.replace(" ", "")) <= len(fast.decode(tokens).replace(" ", "")) + 1


def _replace(**fields: object) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": "b", **fields}


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": []}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "WordPiece", "prefix": "##", "cleanup": True}]},
        {"type": "Sequence", "decoders": [_replace()] * 17},
        {"type": "Sequence"},
        {"type": "Strip", "content": "ab", "start": 1, "stop": 0},
        {"type": "Strip", "content": " ", "start": -1, "stop": 0},
        {"type": "Strip", "content": " ", "start": 1 << 20, "stop": 0},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "always"},
        _replace(pattern={"Regex": "(a+)+$"}),
        _replace(pattern={"String": ""}),
        _replace(content="x" * 65),
        _replace(content=None),
        {"type": ["Fuse"]},
        {},
    ],
)
def test_what_can_not_be_streamed_is_refused_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"tokenizer.json has .*; ask this model in tokens"):
        Decoder(settings)


def test_a_token_does_not_become_a_book() -> None:
    steps = [_replace(content="a" * 64)] * 4
    stream = TextStream(Vocabulary(["a", "b"]), Decoder({"type": "Sequence", "decoders": steps}))
    with pytest.raises(ModelError, match="more than 65536 characters of one token"):
        stream.feed(0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\0\0\0",
        b"\xff\xff\xff\xff",
        b"\x01\0\0\0\x02\0a",
        b"\x01\0\0\0\x01\0ab",
        b"\x01\0\0\0\x01\0\xff",
        b"\x01\0\0\0\xf0\xff" + b"a" * 0xFFF0,
    ],
)
def test_a_vocabulary_is_whole_or_refused(data: bytes) -> None:
    if data == b"":
        assert len(Vocabulary.unpack(b"\0\0\0\0")) == 0
    else:
        with pytest.raises(ValueError):
            Vocabulary.unpack(data)


def test_a_vocabulary_has_limits() -> None:
    with pytest.raises(ModelError, match="4097 bytes; 4096 are possible"):
        Vocabulary(["a" * 4097])
    with pytest.raises(ModelError, match="more than 1048576 words"):
        Vocabulary("" for _ in range((1 << 20) + 1))
