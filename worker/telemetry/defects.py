"""Reports of defects of the worker: unexpected errors in its own code."""

from __future__ import annotations

import traceback
from pathlib import Path

from worker.errors import WorkerError
from worker.telemetry.log import log


def report_defect(stage: str, reason: str) -> WorkerError:
    """Log a defect of the worker. Return it as a WorkerError, which nacks the message."""
    log.error("defect", extra={"stage": stage, "reason": reason})
    return WorkerError(reason)


def describe_defect(error: Exception) -> str:
    """Describe an unexpected error by class and source lines. Its error text can quote personal data: omit it."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    return f"unexpected {type(error).__name__} at {places}; please report it"
