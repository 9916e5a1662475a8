"""The clients over real sockets, against the sandbox."""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING, Any

from worker.commercetools import Commercetools
from worker.klaviyo import Klaviyo
from worker.settings import Settings, load

if TYPE_CHECKING:
    from worker.sandbox import Sandbox


def settings_for(sandbox: Sandbox, **values: Any) -> Settings:
    """Return settings that point at a sandbox."""
    environment = {"CT_SCOPE": "", **sandbox.environment}
    flags = {name: environment.get(str(info.validation_alias)) for name, info in Settings.model_fields.items()}
    return load(Settings, flags | {"retry_seconds": 2} | values)


def commercetools_for(sandbox: Sandbox, **values: Any) -> Commercetools:
    """Return a client."""
    return Commercetools(settings_for(sandbox, **values), Event())


def klaviyo_for(sandbox: Sandbox, **values: Any) -> Klaviyo:
    """Return a client."""
    return Klaviyo(settings_for(sandbox, **values), Event())
