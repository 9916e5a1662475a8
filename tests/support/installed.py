"""The installed command that the acceptance tests run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

COMMAND = Path(os.environ.get("TESTED_WORKER") or Path(sys.executable).with_name("klaviyo-worker"))
"""`klaviyo-worker` beside this interpreter, or the one that TESTED_WORKER names (`make test-wheel`)."""
