"""The profile of a customer: the whole state that the worker owns."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from worker.errors import Ignored
from worker.mapping import MappingConfig
from worker.model import Enriched, Notification
from worker.transform import transform
from worker.transform.size_limits import MAX_PROPERTIES

NOW = datetime(2026, 11, 24, tzinfo=UTC)
ADA = {"id": "id-1", "email": "ada@example.com"}


def profile_of(customer: dict[str, Any], /, **mapping: Any) -> dict[str, Any]:
    notification = Notification("ResourceUpdated", "customer", "id-1", None, {})
    enriched = Enriched(notification, NOW, customer=customer)
    (operation,) = transform(enriched, MappingConfig.model_validate({"locale": "en", **mapping}))
    assert operation.resource is not None
    attributes: dict[str, Any] = operation.resource["attributes"]
    return attributes


def properties_of(customer: dict[str, Any], /, **mapping: Any) -> dict[str, Any]:
    properties: dict[str, Any] = profile_of(customer, **mapping)["properties"]
    return properties


def with_fields(**custom: Any) -> dict[str, Any]:
    return ADA | {"custom": {"fields": custom}}


def group(key: str = "", name: str = "") -> dict[str, Any]:
    return {"typeId": "customer-group", "id": "g", "obj": {"id": "g", "key": key, "name": name}}


def test_what_the_customer_does_not_have_is_none() -> None:
    """The send stage clears what is None. An identifier is never None."""
    names = ("address1", "address2", "city", "country", "region", "zip")
    profile = profile_of(ADA)
    assert profile.pop("properties") == {
        **dict.fromkeys(("customerNumber", "customerGroup", "customerGroups", "locale", "dateOfBirth")),
        **dict.fromkeys(("isEmailVerified", "Title", "Salutation", "Stores", "commercetoolsFields")),
    }
    assert profile == {
        "email": "ada@example.com",
        "external_id": "id-1",
        **dict.fromkeys(("first_name", "last_name", "organization", "locale")),
        "location": dict.fromkeys(names),
    }


def test_a_name_that_no_profile_can_hold_is_left_out() -> None:
    """Klaviyo would reject the whole profile. The earlier name stays in Klaviyo."""
    profile = profile_of(ADA | {"firstName": "A" * 120_000, "lastName": "L" * 10_000, "companyName": "C"})
    assert "first_name" not in profile
    assert (len(profile["last_name"]), profile["organization"]) == (10_000, "C")


def test_the_phone_number_is_cleared_only_by_the_setting() -> None:
    """A person can have given the number to Klaviyo."""
    mapping = {"customer": {"clear_phone": True}}
    with_phone = ADA | {"addresses": [{"country": "DE", "phone": "030 901820"}]}
    assert "phone_number" not in profile_of(ADA)
    assert profile_of(ADA, **mapping)["phone_number"] is None
    assert profile_of(with_phone, **mapping)["phone_number"] == "+4930901820"


def test_a_form_of_address_is_no_job_title() -> None:
    """Klaviyo's attribute `title` is the job title."""
    profile = profile_of(ADA | {"title": "Dr.", "salutation": "Ms", "locale": "de-DE"})
    assert "title" not in profile
    assert (profile["properties"]["Title"], profile["properties"]["Salutation"]) == ("Dr.", "Ms")
    assert profile["locale"] == profile["properties"]["locale"] == "de-DE"


@pytest.mark.parametrize(
    ("customer", "expected"),
    [
        ({"customerGroup": group("vip", "VIP")}, ("vip", None)),
        ({"customerGroup": group(name="Gold members")}, ("Gold members", None)),
        (
            {"customerGroupAssignments": [{"customerGroup": group("a")}, {"customerGroup": group(name="B")}]},
            ("a", ["a", "B"]),
        ),
        (
            {"customerGroup": group("vip"), "customerGroupAssignments": [{"customerGroup": group("a")}]},
            ("vip", ["a"]),
        ),
    ],
)
def test_groups_have_their_key_else_their_name(
    customer: dict[str, Any], expected: tuple[str, list[str] | None]
) -> None:
    """If there are only assignments, the first one is the group."""
    properties = properties_of(ADA | customer)
    assert (properties["customerGroup"], properties["customerGroups"]) == expected


def test_a_group_that_was_not_expanded_is_not_cleared() -> None:
    """Without the scope for customer groups, the key is unknown."""
    unknown = {"typeId": "customer-group", "id": "g"}
    properties = properties_of(
        ADA | {"customerGroup": unknown, "customerGroupAssignments": [{"customerGroup": unknown}]}
    )
    assert not {"customerGroup", "customerGroups"} & properties.keys()


def test_stores_are_keys() -> None:
    """A segment compares the keys of the stores."""
    stores = [{"typeId": "store", "key": "de"}, {"typeId": "store", "key": "at"}]
    assert properties_of(ADA | {"stores": stores})["Stores"] == ["de", "at"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"en": "Dear Nora", "de": "Liebe Nora"}, "Dear Nora"),
        ({"fr": "Chère Nora"}, "Chère Nora"),
        ({"type": "centPrecision", "currencyCode": "EUR", "centAmount": 2500, "fractionDigits": 2}, 25.0),
        ({"type": "highPrecision", "currencyCode": "EUR", "preciseAmount": 12345, "fractionDigits": 4}, 1.2345),
        ({"key": "gold", "label": "Gold"}, "Gold"),
        ({"key": "gold", "label": {"de": "Gold (de)", "en": "Gold (en)"}}, "Gold (en)"),
        ({"key": "gold", "label": ""}, "gold"),
        ({"typeId": "product", "id": "prod-mug"}, "prod-mug"),
        ({"typeId": "store", "key": "de"}, "de"),
        (["a", "", "b"], ["a", "b"]),
        ([{"en": "Tea", "de": "Tee"}, {"key": "k", "label": "L"}, {"typeId": "product", "id": "p"}], ["Tea", "L", "p"]),
        ([{"centAmount": 100, "fractionDigits": 2}, {"centAmount": "odd"}], [1.0]),
        ("1990-04-05", "1990-04-05"),
        (0, 0),
        (False, False),
        ({"a": {"b": 1}}, {"a": {"b": 1}}),
    ],
)
def test_a_custom_field_becomes_a_value_for_segments(value: object, expected: object) -> None:
    """A segment compares texts, numbers, dates and lists, but no objects."""
    properties = properties_of(with_fields(field=value))
    assert properties["field"] == expected
    assert properties["commercetoolsFields"] == ["field"]


@pytest.mark.parametrize("value", ["", None, [], {}, {"en": ""}, {"centAmount": None}])
def test_a_custom_field_without_a_value_is_left_out(value: object) -> None:
    """The send stage clears it if the list in Klaviyo has it."""
    properties = properties_of(with_fields(field=value))
    assert "field" not in properties
    assert properties["commercetoolsFields"] is None


def test_named_custom_fields_are_none_when_they_are_gone() -> None:
    """The setting names them, so the worker owns them, under their new names."""
    rules = {"include": ["size", "hat", "*"], "rename": {"hat": "Hat"}}
    properties = properties_of(with_fields(size=38), customer={"custom_fields": rules})
    assert (properties["size"], properties["Hat"]) == (38, None)
    assert "*" not in properties
    assert properties["commercetoolsFields"] == ["size"]


def test_a_custom_field_can_have_the_name_of_an_own_property() -> None:
    """The worker's own value takes precedence. Without one, the custom field remains."""
    assert properties_of(with_fields(Title="Custom"))["Title"] == "Custom"
    rules = {"include": ["Title", "commercetoolsFields", "commercetoolsConsentVersion"]}
    for mapping in ({}, {"customer": {"custom_fields": rules}}):
        custom = with_fields(Title="Custom", commercetoolsFields="x", commercetoolsConsentVersion=9)
        properties = properties_of(custom | {"title": "Dr."}, **mapping)
        assert (properties["Title"], properties["commercetoolsFields"]) == ("Dr.", None)
        assert "commercetoolsConsentVersion" not in properties  # None would clear it


def test_only_written_custom_fields_are_listed() -> None:
    """A property that exceeds Klaviyo's limits is not written. The worker's own properties come first."""
    many = {f"field{number}": number for number in range(2 * MAX_PROPERTIES)}
    properties = properties_of(with_fields(**many) | {"customerNumber": "7"})
    assert properties["customerNumber"] == "7"
    assert len(properties) == MAX_PROPERTIES
    assert set(properties["commercetoolsFields"]) == set(many) & properties.keys()


def test_the_data_of_a_message_clears_nothing() -> None:
    """It is possibly old."""
    notification = Notification("CustomerCreated", "customer", "id-1", None, {"customer": ADA})
    (operation,) = transform(Enriched(notification, NOW), MappingConfig())
    assert operation.resource == {"type": "profile", "attributes": {"email": "ada@example.com", "external_id": "id-1"}}


def test_a_customer_without_email_and_valid_phone_number_is_ignored() -> None:
    """Klaviyo cannot reach this person."""
    with pytest.raises(Ignored, match="neither"):
        profile_of({"id": "id-1", "addresses": [{"phone": "12"}]}, customer={"clear_phone": True})
