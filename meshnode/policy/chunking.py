"""How a prompt is cut into prefill steps.

The cuts are a function of the prompt's length alone, so that a replay repeats the same step shapes, and no
step but a one-token prompt has a single row: one-row steps take another kernel with other rounding.
"""

from __future__ import annotations

from typing import Final

CHUNK_ROWS: Final = 256


def chunks(tokens: int, limit: int = CHUNK_ROWS) -> tuple[int, ...]:
    """Rows of each prefill step; they add up to `tokens`.

    Args:
      tokens: length of the prompt, 0 or more.
      limit: most rows of a step, 3 or more.
    """
    if tokens < 0 or limit < 3:
        raise ValueError(
            f"a prompt of {tokens} tokens in chunks of {limit} rows; 0 or more in 3 or more are possible"
        )
    whole, rest = divmod(tokens, limit)
    if rest == 1 and whole:
        return (*([limit] * (whole - 1)), limit - 1, 2)
    return (*([limit] * whole), *([rest] if rest else []))
