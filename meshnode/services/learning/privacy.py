"""What learning sees of differential privacy: terms for steps, counted before these are made (`private_steps.py`)."""

from __future__ import annotations

from typing import Any, Protocol


class Terms(Protocol):
    """How steps are to be made, and what all of them have cost with these."""

    @property
    def clip(self) -> float:
        """Largest norm of one sample's gradient."""

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise, as a multiple of `clip`."""

    @property
    def epsilon(self) -> float: ...

    @property
    def delta(self) -> float: ...


class PrivateSteps(Protocol):
    """The owner's terms, and the ledger of this device's samples."""

    def plan(self, samples: int, batch: int, steps: int) -> Any:
        """Steps that draw `batch` of so many samples in the mean, noisy enough. Blocking: call it in a thread.

        Raises Declined `privacy-spent`.
        """

    def reserve(self, plan: Any) -> Terms:
        """Count them as spent. Raises Declined `privacy-spent`, DiskError."""
