"""What a backfill takes for its settings: the worker's, with other defaults."""

from __future__ import annotations

from pydantic import Field

from worker.settings import Settings


class BackfillSettings(Settings):
    """The worker's settings, with defaults for large batches and for half of Klaviyo's limits."""

    rate_limit_share: float = Field(
        0.5,
        gt=0,
        le=1,
        validation_alias="KLAVIYO_WORKER_RATE_LIMIT_SHARE",
        description="Share of Klaviyo's rate limits to use; the rest is the worker's",
    )
    lanes: int = Field(
        2,
        ge=1,
        le=64,
        validation_alias="KLAVIYO_WORKER_LANES",
        description="Batches handled side by side; few, so that they are large",
    )
    max_batch: int = Field(
        1_000, ge=1, le=10_000, validation_alias="KLAVIYO_WORKER_MAX_BATCH", description="Messages in a batch"
    )
    max_in_flight: int = Field(
        4_000,
        ge=1,
        le=100_000,
        validation_alias="KLAVIYO_WORKER_MAX_IN_FLIGHT",
        description="Messages held at once; an order is several",
    )
