"""Tokenizers of GGUF files, beside the models' own.

`tests/gguf_vectors.json` has the part of real vocabularies that some texts can be made of, and the ids that the
tokenizer.json of each model gives for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from tokenizers import Tokenizer

from meshnode.core.errors import ModelError
from meshnode.publisher.gguf_pre import SPLITS
from meshnode.publisher.gguf_tokenizer import gguf_tokenizer

VECTORS: Final[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "gguf_vectors.json").read_text(encoding="utf-8")
)
KEY: Final = "tokenizer.ggml."


def metadata(name: str, **changed: Any) -> dict[str, Any]:
    """As a converter writes it, for the part of the vocabulary that is there; with two special tokens behind it."""
    vector = VECTORS[name]
    words = [*vector["words"], "<begin>", "<end>"]
    types = [6 if word.startswith("<0x") else 1 for word in words]
    types[-2:] = [3, 3]
    found: dict[str, Any] = {
        "tokens": words,
        "token_type": types,
        "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1,
    }
    if vector["pre"] is None:
        found |= {"model": "llama", "scores": [float(vector["scores"].get(word, -1e9)) for word in words]}
        found["unknown_token_id"] = words.index("<unk>")
        types[words.index("<unk>")] = 2
    else:
        found |= {"model": "gpt2", "pre": vector["pre"], "merges": vector["merges"]}
    found |= changed
    return {KEY + key: value for key, value in found.items() if value is not None}


def opened(data: dict[str, Any]) -> Any:
    return Tokenizer.from_str(gguf_tokenizer(data, "x.gguf").tokenizer)


@pytest.mark.parametrize("name", VECTORS)
def test_texts_become_the_tokens_of_the_model(name: str) -> None:
    tokenizer, vector = opened(metadata(name)), VECTORS[name]
    ids = list(vector["words"].values())
    for text, wanted in vector["texts"]:
        got = tokenizer.encode(text, add_special_tokens=False).ids
        assert [ids[token] for token in got] == wanted, text
        if vector["pre"] != "qwen2":  # NFC changes the text
            assert tokenizer.decode(got) == text


@pytest.mark.parametrize(("name", "wrong"), [("llama3", "qwen2"), ("qwen3", "llama-bpe"), ("deepseek_v3", "gpt-2")])
def test_the_texts_tell_one_rule_from_another(name: str, wrong: str) -> None:
    right, other = opened(metadata(name)), opened(metadata(name, pre=wrong))
    texts = [text for text, _ in VECTORS[name]["texts"]]
    assert any(right.encode(text).ids != other.encode(text).ids for text in texts)


@pytest.mark.parametrize("pre", SPLITS)
def test_every_rule_is_one_that_the_library_takes(pre: str) -> None:
    tokenizer = opened(metadata("qwen3", pre=pre))
    for text, _ in VECTORS["qwen3"]["texts"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert pre in ("qwen2", "megrez", "deepseek-r1-qwen") or tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "changed", "begins", "ends"),
    [
        ("llama3", {}, True, False),  # as its own tokenizer does, though the file has no flag
        ("llama3", {"add_bos_token": False}, False, False),
        ("llama3", {"bos_token_id": None}, False, False),
        ("qwen3", {}, False, False),
        ("qwen3", {"add_bos_token": True}, True, False),
        ("qwen3", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("llama2", {}, True, False),
        ("llama2", {"add_bos_token": False}, False, False),
    ],
)
def test_with_which_tokens_a_text_begins_and_ends(
    name: str, changed: dict[str, Any], begins: bool, ends: bool
) -> None:
    tokens = opened(metadata(name, **changed)).encode("a").tokens
    assert (tokens[0] == "<begin>", tokens[-1] == "<end>") == (begins, ends)
    assert len(tokens) == 1 + begins + ends


def test_special_tokens_and_ends_are_the_files() -> None:
    data = metadata("qwen3", padding_token_id=3, eot_token_id=5, eom_token_id=5)
    found = gguf_tokenizer(data, "x.gguf")
    words = data[KEY + "tokens"]
    assert found.special == {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": words[3]}
    assert found.ends == (5, len(words) - 1)


def test_added_words_are_found_before_a_text_is_split() -> None:
    words = [*VECTORS["qwen3"]["words"], "<tool call>", "[unused1]", "<end>"]
    types = [1] * (len(words) - 3) + [4, 5, 3]
    tokenizer = opened(metadata("qwen3", tokens=words, token_type=types, bos_token_id=None, eos_token_id=None))
    ids = tokenizer.encode("a<tool call>b<end>").ids
    assert len(words) - 3 in ids
    assert len(words) - 1 in ids
    assert tokenizer.decode(ids) == "a<tool call>b", "what is added is text, what is special is not"
    assert tokenizer.token_to_id("[unused1]") is None


def test_the_words_of_phi3_take_blanks_with_them() -> None:
    data = metadata("llama2") | {"general.architecture": "phi3"}
    assert opened(data).encode("<end> \na", add_special_tokens=False).tokens == ["<end> \n", "▁a"]
    assert len(opened(metadata("llama2")).encode("<end> \na", add_special_tokens=False).tokens) > 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pre": None}, r"tokenizer.ggml.pre is missing"),
        ({"pre": "no-such-rule"}, r"the rule 'no-such-rule' .* which is not known here; .* llama-bpe"),
        ({"pre": 7}, "the rule '7'"),
        ({"model": "rwkv"}, "the kind 'rwkv'; gpt2 and llama are read"),
        ({"model": None}, "the kind 'None'"),
        ({"tokens": None}, "carries no tokenizer"),
        ({"tokens": ["a", "a"], "token_type": None, "merges": []}, "words twice"),
        ({"tokens": ["a", 7], "token_type": None}, "no usable tokenizer.ggml.tokens"),
        ({"token_type": [1]}, "not a type for each"),
        ({"merges": ["a b c"]}, "merges 'a b c', which are not words of it"),
        ({"merges": ["ab"]}, "merges 'ab'"),
        ({"eos_token_id": 10**6}, "the eos token 1000000, beyond its"),
        ({"add_bos_token": 1}, "no usable tokenizer.ggml.add_bos_token"),
    ],
)
def test_what_is_missing_or_unknown_is_named(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        gguf_tokenizer(metadata("qwen3", **changed), "x.gguf")


@pytest.mark.parametrize("scores", [None, [0.0], float("nan")])
def test_scores_are_whole(scores: Any) -> None:
    if isinstance(scores, float):
        scores = [scores] * len(metadata("llama2")[KEY + "tokens"])
    with pytest.raises(ModelError, match="no score for each word"):
        gguf_tokenizer(metadata("llama2", scores=scores), "x.gguf")
