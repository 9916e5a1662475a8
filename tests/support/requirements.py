"""What a test needs that is no Python package."""

from __future__ import annotations

import os
import shutil

import pytest


def require(missing: str) -> None:
    """Skip the test where what stands in for a cloud's service is missing, for this reason; in CI that is a failure."""
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)


def require_command(*names: str) -> None:
    """Skip the test where a command line that readers use is not installed: in CI too, which promises none of them."""
    if missing := [name for name in names if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
