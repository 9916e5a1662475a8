"""The verdict on repeated events in an account of the sandbox, without a probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.sandbox.klaviyo.account import Account


def give_verdict(account: Account, repeats: str = "ignored") -> None:
    """Store a verdict as `klaviyo-worker check --probe-bulk` does."""
    properties = {
        "klaviyo_worker_bulk_repeats": repeats,
        "klaviyo_worker_bulk_probed_at": "2026-11-01T10:00:00+00:00",
    }
    account.import_profile({"attributes": {"external_id": "klaviyo-worker-probe", "properties": properties}})
