"""Small tokenizers, and files of models as a node has them."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from meshnode.text.port import TokenizerFiles

CHATML: Final = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
VOCAB: Final = 258


def byte_tokenizer() -> Any:
    """Two special tokens, then one token for each byte."""
    vocabulary = {"<s>": 0, "</s>": 1}
    vocabulary |= {letter: i + 2 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def letter_tokenizer() -> Any:
    """Three special tokens, of which 2 ends an answer, then one token for each letter of ASCII."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {letter: i + 3 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:94])}
    vocabulary |= {"\u0120": len(vocabulary)}  # a blank
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def computed(process: psutil.Process) -> float:
    """Seconds that a process has computed; none when it has ended."""
    with suppress(psutil.Error):
        return float(process.cpu_times().user)
    return 0.0


def text_files(
    folder: Path,
    *,
    tokenizer: str | bytes | None = None,
    template: str | bytes | None = CHATML,
    specials: dict[str, Any] | str | None = None,
    vocab: int = VOCAB,
) -> TokenizerFiles:
    """The files of a model named "small". `tokenizer`: text of tokenizer.json; None: one token for each byte."""

    def write(name: str, content: str | bytes) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    given = specials if isinstance(specials, str) or specials is None else json.dumps(specials)
    return TokenizerFiles(
        model="small",
        vocab=vocab,
        tokenizer=write("tokenizer.json", byte_tokenizer().to_str() if tokenizer is None else tokenizer),
        template=None if template is None else write("chat_template.jinja", template),
        specials=None if given is None else write("special_tokens_map.json", given),
    )
