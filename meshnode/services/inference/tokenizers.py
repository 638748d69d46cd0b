"""The tokenizer of a release, opened when it is first wanted and kept until another release is asked for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Final

import trio

from meshnode.core.errors import Declined, ModelError
from meshnode.model.release import ServedRelease
from meshnode.services.port import Content
from meshnode.text.port import (
    MAX_SPECIALS_BYTES,
    MAX_TEMPLATE_BYTES,
    MAX_TOKENIZER_BYTES,
    OpenTokenizer,
    Tokenizer,
    TokenizerFiles,
)
from protocols.ids import Cid
from protocols.manifest.messages import Manifest

TOKENIZER: Final = "tokenizer.json"
TEMPLATE: Final = "chat_template.jinja"
SPECIALS: Final = "special_tokens_map.json"
MOST_BYTES: Final = {TOKENIZER: MAX_TOKENIZER_BYTES, TEMPLATE: MAX_TEMPLATE_BYTES, SPECIALS: MAX_SPECIALS_BYTES}


class TokenizerShelf:
    """Holds one tokenizer."""

    def __init__(self, content: Content, open_tokenizer: OpenTokenizer, *, grammars: bool) -> None:
        """`grammars`: it is for grammars (`Tokenizer.guide`), and not for chat turns."""
        self._content = content
        self._open_tokenizer = open_tokenizer
        self._grammars = grammars
        self._opened: tuple[Cid, Tokenizer] | None = None
        self._opening = trio.Lock()

    async def of(self, release: ServedRelease) -> Tokenizer:
        """Of a release. Raises Declined `no-tokenizer`, ContentUnavailable, ModelError, TokenizerLost."""
        async with self._opening:
            if self._opened is None or self._opened[0] != release.cid or self._opened[1].lost:
                await self.let_go()
                self._opened = (release.cid, await self._open(release.manifest))
            return self._opened[1]

    async def let_go(self) -> None:
        """Streams of the one before go on without it; what is being asked of it is asked again of the next."""
        before, self._opened = self._opened, None
        if before is not None:
            await before[1].aclose()

    async def _open(self, manifest: Manifest) -> Tokenizer:
        if TOKENIZER not in manifest.files:
            raise Declined(
                "no-tokenizer", f"the model {manifest.name} was published without a tokenizer; ask in tokens"
            )
        paths: dict[str, Path] = {}
        with ExitStack() as opened:
            for file, most in MOST_BYTES.items():
                if (ref := manifest.files.get(file)) is None or (self._grammars and file != TOKENIZER):
                    continue
                if ref.size > most:
                    raise ModelError(f"{file} of {manifest.name} has {ref.size} bytes; {most} are possible")
                paths[file] = opened.enter_context(await self._content.open(ref))
            return await self._open_tokenizer(
                TokenizerFiles(
                    model=manifest.name,
                    vocab=manifest.architecture.vocab,
                    tokenizer=paths[TOKENIZER],
                    template=paths.get(TEMPLATE),
                    specials=paths.get(SPECIALS),
                    eos=manifest.architecture.eos_ids if self._grammars else (),
                )
            )
