"""Proofs of a stale reading."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tests.conftest import FakeDelivery
from worker.errors import StaleRead
from worker.model import Enriched, Message, Notification
from worker.versions import check_reading

KEY = ("category", "c")


def test_version_is_known_although_a_later_reading_did_not_show_the_resource() -> None:
    """A reading can lag behind an earlier one in both ways: without the resource, or with a former state of it."""
    notification = Notification("ResourceUpdated", "product", "p", None, {})
    message = Message(FakeDelivery(b""), 0.0, notification)
    for version in (5, None):
        message.enriched = Enriched(notification, datetime.now(UTC), versions={KEY: version})
        check_reading(message, 0.0)
    assert message.known_versions == {KEY: 5}
    message.enriched = Enriched(notification, datetime.now(UTC), versions={KEY: 4})
    with pytest.raises(StaleRead, match="commercetools shows version 4 of the category, but it has had a later one"):
        check_reading(message, 0.0)
