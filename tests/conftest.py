"""Fixtures of every level: the seed is printed, nothing sleeps."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.long import LONG

SEED = int(os.environ.get("SEED", random.SystemRandom().randrange(1 << 31)))

settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("quick", settings.get_profile("full"), max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full"))


def pytest_report_header() -> str:
    return f"seed: {SEED} (repeat with SEED={SEED})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not LONG and item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="run by `make test-long`"))


@pytest.fixture
def rng() -> random.Random:
    """Randomness of one test; repeat a failure with the SEED printed in the header."""
    return random.Random(SEED)


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A test that sets up logs into a file of its own must not leave a closed one to the next test."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
