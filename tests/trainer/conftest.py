"""One thread, as a trainer has: two that wait for each other on busy cores take minutes."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)
