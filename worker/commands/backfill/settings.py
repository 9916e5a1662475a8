"""The settings of a backfill: the worker's, with other defaults."""

from __future__ import annotations

from copy import copy
from typing import Any

from worker.settings import Settings


def _override(name: str, default: float, description: str = "") -> Any:
    """Return the worker's setting with another default."""
    field = copy(Settings.model_fields[name])
    field.default = default
    field.description = description or field.description
    return field


class BackfillSettings(Settings):
    """The worker's settings, with defaults for large batches and half of Klaviyo's rate limits."""

    rate_limit_share: float = _override(
        "rate_limit_share", 0.5, "Share of Klaviyo's rate limits to use; the worker needs the rest"
    )
    lanes: int = _override(
        "lanes",
        2,
        "Number of lanes per effect; fewer lanes have larger batches",
    )
    max_batch: int = _override("max_batch", 1_000)
