"""Requirements of tests that are not Python packages."""

from __future__ import annotations

import os
import shutil

import pytest


def require(missing: str) -> None:
    """Skip the test if the emulator of a cloud service is missing; fail it in CI. `missing` is the reason, or ""."""
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)


def require_command(*names: str) -> None:
    """Skip the test if a command is not installed. This applies to CI too, which does not install them."""
    if missing := [name for name in names if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
