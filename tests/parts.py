"""What stands in for a cloud's service has to be installed."""

from __future__ import annotations

import os

import pytest


def require(missing: str) -> None:
    """Skip the test where a part is missing, for this reason; in CI that is a failure."""
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
