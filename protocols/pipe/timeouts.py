"""How long each side of a session waits for the other, in seconds."""

from __future__ import annotations

from typing import Final

OPEN_S: Final = 12.0  # all stages must answer Open; one of them may have to split a segment first
FIRST_OPEN_S: Final = 3.0  # the same for the first route that is tried: most stages answer at once, a dead one never
FIRST_STEP_S: Final = 15.0  # after Open, until the first step: longer than OPEN_S, or an honest origin comes too late
STEP_S: Final = 60.0  # between two tokens; an engine that hangs is killed by its own node before
IDLE_S: Final = 75.0  # a stage keeps a session without steps: no origin waits that long for a token
PREFILL_ROW_S: Final = 0.25  # added per prompt row: the slowest device we mean to wait for
FIRST_ROWS: Final = 256  # prompt rows that the stages before may work on until the first step comes
