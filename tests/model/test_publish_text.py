"""Tokenizers, special tokens and templates of what is published: the model's own, or refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from meshnode.core.errors import ModelError
from meshnode.publisher.checkpoint import open_checkpoint
from meshnode.publisher.older_tokenizer import converted
from meshnode.publisher.release import run_publisher
from meshnode.text.in_process import open_in_process
from meshnode.text.port import TokenizerFiles
from tests.model.cutting import byte_tokenizer, published, random_checkpoint
from tests.text_files import byte_tokenizer as special_byte_tokenizer

pytestmark = pytest.mark.model

TURNS: Final = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
TEMPLATE: Final = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}{{ pad_token }}{{ unk_token }}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its configuration calls the end token the begin, as distilled reasoning models do; its tokenizer does not."""
    folder = tmp_path_factory.mktemp("qwen")
    random_checkpoint(folder, "qwen2", vocab_size=260, num_hidden_layers=2, bos_token_id=1, eos_token_id=1)
    tokenizer = special_byte_tokenizer()
    tokenizer.add_special_tokens(["<turn>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").unlink()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<turn>",
        "pad_token": "<pad>",
        "unk_token": "<s>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    return folder


@pytest.fixture
def copy(qwen: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(qwen, tmp_path / "copy"))


async def chat(folder: Path, index: dict[str, Any]) -> tuple[int, ...]:
    """What a node makes of a conversation."""
    files = index["files"]
    tokenizer = await open_in_process(
        TokenizerFiles(
            model="x",
            vocab=index["architecture"]["vocab"],
            tokenizer=folder / files["tokenizer.json"]["path"],
            template=folder / files["chat_template.jinja"]["path"],
            specials=folder / files["special_tokens_map.json"]["path"],
        )
    )
    return await tokenizer.chat(TURNS)


async def test_conversations_have_the_special_tokens_of_the_tokenizer(qwen: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    index = published(qwen, tmp_path / "out", "fp32")
    theirs = transformers.AutoTokenizer.from_pretrained(str(qwen))
    wanted = theirs.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    got = await chat(tmp_path / "out", index)
    assert list(got) == list(wanted)
    assert (got[0], *got[-2:]) == (0, theirs.convert_tokens_to_ids("<pad>"), 0)
    assert index["architecture"]["eos_ids"] == [1, 7, theirs.convert_tokens_to_ids("<turn>")]


def test_a_tokenizer_that_panics_is_refused(copy: Path, tmp_path: Path) -> None:
    made = json.loads((copy / "tokenizer.json").read_text())
    made["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(([A-Za-z ]+)+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (copy / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(ModelError, match=r"the model's tokenizer failed on this text"):
        run_publisher(str(copy), tmp_path / "out", ["fp32"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json of the model can't be read"),
        ("tokenizer.json", b"\xff", "tokenizer.json can't be read"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "tokenizer can't be read"),
        ("tokenizer_config.json", b"[" * 100_000, "can't be read as JSON"),
        ("special_tokens_map.json", b"7", "does not hold a JSON object"),
        ("chat_template.jinja", b"{% for %}", "chat template can't be read"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja can't be read"),
    ],
)
def test_text_files_that_can_not_be_used(copy: Path, name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=words):
        published(copy, tmp_path / "out", "fp32")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_tokenizer_that_is_too_large_is_not_read(copy: Path, tmp_path: Path) -> None:
    with (copy / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelError, match="1073741824 bytes; 67108864 are possible"):
        published(copy, tmp_path / "out", "fp32")


def test_a_tokenizer_of_another_model_is_refused(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    with pytest.raises(ModelError, match="tokens beyond the 60 of the model; is it its own"):
        published(copy, tmp_path / "out", "fp32")


def older(folder: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 has them."""
    model = json.loads(byte_tokenizer())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def test_an_older_tokenizer_is_converted(tmp_path: Path) -> None:
    older(tmp_path)
    made = Tokenizer.from_str(converted(tmp_path))
    assert made.encode("für").ids == Tokenizer.from_str(byte_tokenizer()).encode("für").ids


def test_an_older_tokenizer_that_is_damaged(tmp_path: Path) -> None:
    older(tmp_path)
    (tmp_path / "vocab.json").write_text("[[[")
    with pytest.raises(ModelError, match=r"can't be converted to tokenizer.json: .+\.") as caught:
        converted(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_example_splits_as_its_own_tokenizer() -> None:
    text, _, special = open_checkpoint("example:smollm2").tokenizer()
    ours, own = Tokenizer.from_str(text), Tokenizer.from_str(text)
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for sample in ("Steps:\n\n1. Mix\n\n2. Bake", "a  7", "x = [\n    1,\n    2]", "In 1859 he", "12345", "½ ² Ⅻ"):
        assert ours.encode(sample).ids == own.encode(sample).ids
    assert special["bos_token"] == "<|im_start|>"


# ids that SmolLM2 has for these texts
VECTORS: Final = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
}


@pytest.mark.parametrize("text", VECTORS)
def test_the_example_has_the_tokens_of_smollm2(text: str) -> None:
    tokenizer = Tokenizer.from_str(open_checkpoint("example:smollm2").tokenizer()[0])
    assert tokenizer.encode(text).ids == VECTORS[text]
