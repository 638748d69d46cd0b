"""Both engines pass the conformance suite of the port in real child processes; ONNX with a small random model."""

from __future__ import annotations

import pytest

from meshnode.engine.port import StageSpec
from tests.conformance.check_engine import CHECKS, NULL, changed, running
from tests.conformance.tiny_model import tiny_models

SHAPES = (
    "_check_cuts_agree",
    "_check_part_of_a_span",
    "_check_pooling",
    "_check_rewind",
    "_check_an_answer_goes_on",
    "_check_kept_rows",
)  # what depends on the kernels
CASES = [(kind, check) for kind in ("null", "int4") for check in CHECKS]
CASES += [(variant, check) for variant in ("fp32", "int8") for check in CHECKS if check.__name__ in SHAPES]


@pytest.mark.parametrize(("kind", "check"), CASES, ids=lambda c: getattr(c, "__name__", c))
async def test_conformance(kind: str, check: object) -> None:
    def spec(first: int, last: int) -> StageSpec:
        return changed(NULL, first=first, last=last) if kind == "null" else tiny_models()[kind].spec(first, last)

    await check(lambda first, last, **fields: running(changed(spec(first, last), **fields)))  # type: ignore[operator]
