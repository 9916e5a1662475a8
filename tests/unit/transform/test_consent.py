"""The consents of a customer, and the properties that hold them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from worker.mapping import MappingConfig
from worker.model import Consent, Enriched, Notification
from worker.transform import transform

if TYPE_CHECKING:
    from worker.model import Operation

NOW = datetime(2026, 11, 24, tzinfo=UTC)
CONSENT = {"email": "newsletter", "sms": "texts", "date": "since"}


def upsert(fields: dict[str, Any], **mapping: Any) -> Operation:
    customer = {"id": "id-1", "version": 7, "email": "ada@example.com", "custom": {"fields": fields}}
    enriched = Enriched(Notification("ResourceUpdated", "customer", "id-1", None, {}), NOW, customer=customer)
    (operation,) = transform(enriched, MappingConfig.model_validate({"locale": "en", "consent": CONSENT} | mapping))
    return operation


def properties(operation: Operation) -> dict[str, Any]:
    assert operation.resource is not None
    found: dict[str, Any] = operation.resource["attributes"]["properties"]
    return found


def test_consents_are_apart_from_the_properties() -> None:
    """They are written when the person is subscribed. As listed custom fields, they are not cleared before."""
    operation = upsert({"newsletter": True, "size": 38})
    assert operation.consents == (
        Consent("email", "newsletter", True, "", 7, NOW),
        Consent("sms", "texts", None, "", 7, NOW),
    )
    assert "newsletter" not in properties(operation)
    assert properties(operation)["commercetoolsFields"] == ["newsletter", "size", "texts"]


def test_consents_follow_the_rules_for_custom_fields_only_in_their_names() -> None:
    """The send stage needs the property even if the rules do not include it."""
    rules = {"include": ["newsletter", "size"], "exclude": ["texts"], "rename": {"newsletter": "Newsletter"}}
    operation = upsert({"newsletter": False, "texts": True}, customer={"custom_fields": rules})
    assert [(consent.property, consent.value) for consent in operation.consents] == [
        ("Newsletter", False),
        ("texts", True),
    ]
    assert "Newsletter" not in properties(operation)
    assert properties(operation)["size"] is None


def test_consents_stay_listed_if_properties_are_truncated() -> None:
    """Otherwise the send stage would clear them, and forget what the person agreed to."""
    names = properties(upsert({f"field{number}": number for number in range(800)}))["commercetoolsFields"]
    assert {"newsletter", "texts"} <= set(names)


@pytest.mark.parametrize(
    ("since", "consented_at"),
    [
        ("2025-11-23", "2025-11-23T00:00:00+00:00"),
        ("2025-11-23T10:00:00.000+01:00", "2025-11-23T09:00:00+00:00"),
        ("2026-11-24", ""),  # not past
        ("soon", ""),
        (None, ""),
    ],
)
def test_time_of_a_consent_is_in_the_past(since: object, consented_at: str) -> None:
    """Klaviyo rejects any other time."""
    operation = upsert({"newsletter": True, "since": since})
    assert operation.consents[0].consented_at == consented_at


def test_no_consent_without_the_setting() -> None:
    """The custom field is a property like any other."""
    operation = upsert({"newsletter": True}, consent={})
    assert operation.consents == ()
    assert properties(operation)["newsletter"] is True


def test_the_data_of_a_message_is_no_consent() -> None:
    """The person possibly took it back since."""
    customer = {"id": "id-1", "email": "ada@example.com", "custom": {"fields": {"newsletter": True}}}
    notification = Notification("CustomerCreated", "customer", "id-1", None, {"customer": customer})
    (operation,) = transform(Enriched(notification, NOW), MappingConfig.model_validate({"consent": CONSENT}))
    assert operation.consents == ()
    assert "newsletter" not in properties(operation)
