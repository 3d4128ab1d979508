"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Real data stands beside the checkout where it stands at all; the tests generate what they need and use it as well.
SHARED_DATA = Path(os.environ.get("MASKLAKE_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and annotations; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is not at hand: {SHARED_DATA} (set MASKLAKE_SHARED_DATA)")
    return SHARED_DATA
