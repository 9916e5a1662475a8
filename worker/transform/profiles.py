"""The parts of a profile that transform and send both use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.model import Json

# The property with the names of the custom fields that the worker wrote. A custom field that is in Klaviyo's list but
# not in the new one is cleared.
CUSTOM_FIELD_NAMES = "commercetoolsFields"
# The property with the version of the customer whose consents the worker wrote last.
CONSENT_VERSION = "commercetoolsConsentVersion"


def without_clears(resource: Json) -> Json:
    """Return a profile without the attributes, properties and parts of the location that are None."""
    attributes = {name: _without_nulls(value) for name, value in resource["attributes"].items()}
    return resource | {"attributes": {n: v for n, v in attributes.items() if v is not None and v != {}}}


def _without_nulls(value: object) -> object:
    return {n: v for n, v in value.items() if v is not None} if isinstance(value, dict) else value
