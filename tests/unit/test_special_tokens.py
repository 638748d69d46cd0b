"""Special tokens of a folder, beside what transformers gives its chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshnode.core.errors import ModelError
from meshnode.publisher.special_tokens import end_ids, special_tokens
from tests.text_files import byte_tokenizer

TOKENIZER = byte_tokenizer().to_str()
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def added(content: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "special": True}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": (FAST, {}),
    "texts": ({**FAST, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": None}, {}),
    "tokens with flags": ({**FAST, "bos_token": added("<s>")}, {}),
    "the older file": (FAST, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}),
    "both": ({**FAST, "bos_token": "</s>"}, {"bos_token": "<s>"}),
    "both, and the newer one is whole": (
        {**FAST, "bos_token": "</s>", "added_tokens_decoder": {"0": {"content": "<s>", "special": True}}},
        {"bos_token": "<s>"},
    ),
    "others": ({**FAST, "image_token": "<s>", "extra_special_tokens": {"thought": "</s>"}}, {}),
    "a class that knows its own": ({"tokenizer_class": "Qwen2Tokenizer", "bos_token": "<s>"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_that_transformers_has(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings, older = CASES[case]
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if older:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path)).special_tokens_map
    ours = special_tokens(settings, older, TOKENIZER)
    # what a class would add to the vocabulary by itself is no word of this model
    assert ours == {name: token for name, token in theirs.items() if token in ("<s>", "</s>")}


def test_ends_are_those_of_the_configurations_and_of_the_tokenizer() -> None:
    assert end_ids([7, [8, 9, 10**6]], {"eos_token": "</s>"}, TOKENIZER, None, 258) == [1, 7, 8, 9]
    assert end_ids([None, None], {}, TOKENIZER, None, 258) == []
    assert end_ids([True, "7"], {"eos_token": "no word"}, TOKENIZER, None, 258) == []


def test_what_a_template_ends_turns_with_ends_an_answer() -> None:
    with_ends = json.loads(TOKENIZER)
    with_ends["added_tokens"].append({"id": 99, "content": "<|im_end|>"})
    assert end_ids([], {}, json.dumps(with_ends), "{{ m }}<|im_end|>", 258) == [99]
    assert end_ids([], {}, json.dumps(with_ends), "{{ m }}", 258) == []


def test_an_end_that_is_a_plain_word_counts() -> None:
    unigram = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["<eos>", -1.0]]}}
    assert end_ids([], {"eos_token": "<eos>"}, json.dumps(unigram), None, 2) == [1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 7}', "[" * 100_000])
def test_a_tokenizer_that_is_none(text: str) -> None:
    with pytest.raises(ModelError, match=r"tokenizer.json of the model can't be read"):
        end_ids([], {}, text, None, 2)
