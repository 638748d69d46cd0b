from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.text.in_process import open_in_process
from meshnode.text.port import OpenTokenizer
from meshnode.text.process import open_tokenizer
from tests.conformance.check_tokenizer import CHECKS, Check


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("adapter", [open_in_process, open_tokenizer])
async def test_tokenizer(adapter: OpenTokenizer, check: Check, tmp_path: Path) -> None:
    await check(adapter, tmp_path)
