"""The worker's settings: flag > environment (or its _FILE twin) > default. One field is one setting, everywhere.

Adding a field adds the variable, the flag (unless it is a secret), the check and the line in
docs/configuration.md, which a test compares with this file.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from adapters.base import QueueOptions
from worker.errors import SettingsError
from worker.mapping import MappingConfig, load_mapping
from worker.setting_types import Client, Key, Text, Url  # noqa: TC001 - read by pydantic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails


S = TypeVar("S", bound=BaseSettings)


class _FileTwins(PydanticBaseSettingsSource):
    """Read `NAME_FILE` where `NAME` is not set, for secrets mounted as files."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the file's content, if its variable names one."""
        name = str(field.validation_alias or field_name)
        path = os.environ.get(f"{name}_FILE")
        if not path or os.environ.get(name):
            return None, name, False
        try:
            return Path(path).read_text(encoding="utf-8").strip(), name, False
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{name}_FILE: cannot read {path}: {type(error).__name__}") from None

    def __call__(self) -> dict[str, Any]:
        """Return the values of all `_FILE` variables that are set."""
        found = (self.get_field_value(info, name) for name, info in self.settings_cls.model_fields.items())
        return {name: value for value, name, _ in found if value is not None}


class _Sourced(BaseSettings):
    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: flags, environment, files named by the environment."""
        return init_settings, env_settings, _FileTwins(settings_cls)


class QueueSettings(_Sourced):
    """What every command needs that touches the queue."""

    queue_url: Text = Field(
        "embedded://~/.local/state/klaviyo-worker/queue.db",
        validation_alias="QUEUE_URL",
        description="The queue: embedded:///path/queue.db, pubsub://PROJECT/SUBSCRIPTION, push://HOST:PORT, "
        "sqs://NAME?region=REGION or servicebus://NAMESPACE.servicebus.windows.net/QUEUE; docs/adapters.md",
    )
    servicebus_connection_string: SecretStr = Field(
        SecretStr(""),
        validation_alias="SERVICEBUS_CONNECTION_STRING",
        description="Connection string of servicebus://; without it, the identity that Azure gives this process",
    )
    dead_letter_queue_url: str = Field(
        "", validation_alias="DEAD_LETTER_QUEUE_URL", description="Dead letters' own URL, where dlq cannot find it"
    )

    @property
    def queue_options(self) -> QueueOptions:
        """Return what a command asks of its queue."""
        secret = self.servicebus_connection_string.get_secret_value().strip()
        return QueueOptions(connection_string=secret, dead_letter_url=self.dead_letter_queue_url)


class MappingSettings(_Sourced):
    """Where the mapping comes from; the three names are those of the existing plugin."""

    config: Path | None = Field(
        None, validation_alias="KLAVIYO_WORKER_CONFIG", description="Mapping file (TOML); docs/mapping.md"
    )
    preferred_locale: str = Field(
        "", validation_alias="PREFERRED_LOCALE", description="Preferred locale of texts [mapping: en-US]"
    )
    preferred_currency: str = Field(
        "", validation_alias="PREFERRED_CURRENCY", description="Preferred currency of prices [mapping: any]"
    )
    product_url_template: str = Field(
        "",
        validation_alias="PRODUCT_URL_TEMPLATE",
        description="Product page, like https://shop.example/p/{{productSlug}}",
    )

    def mapping(self) -> MappingConfig:
        """Load the mapping. Raises SettingsError."""
        return load_mapping(
            self.config,
            locale=self.preferred_locale,
            currency=self.preferred_currency,
            product_url_template=self.product_url_template,
        )


class CommercetoolsSettings(_Sourced):
    """What every command needs that asks commercetools."""

    ct_api_url: Url = Field(
        validation_alias="CT_API_URL",
        description="commercetools API, like https://api.europe-west1.gcp.commercetools.com",
    )
    ct_auth_url: Url = Field(
        validation_alias="CT_AUTH_URL",
        description="commercetools authorization, like https://auth.europe-west1.gcp.commercetools.com",
    )
    ct_project_id: Text = Field(validation_alias="CT_PROJECT_ID", description="commercetools project key")
    ct_scope: str = Field(
        "",
        validation_alias="CT_SCOPE",
        description="Scopes to ask for, separated by spaces [default: all the API client has]",
    )
    ct_api_client: Client = Field(
        validation_alias="CT_API_CLIENT",
        description='commercetools API client, JSON {"clientId": "…", "secret": "…"}',
    )
    connect_timeout: float = Field(
        5.0, gt=0, validation_alias="KLAVIYO_WORKER_CONNECT_TIMEOUT", description="Seconds to connect"
    )
    read_timeout: float = Field(
        30.0, gt=0, validation_alias="KLAVIYO_WORKER_READ_TIMEOUT", description="Seconds without an answer"
    )
    retry_timeout: float = Field(
        10.0,
        ge=0,
        validation_alias="KLAVIYO_WORKER_RETRY_TIMEOUT",
        description="Seconds a request is tried again before its message has to wait",
    )
    outage_hold: float = Field(
        1800.0,
        ge=0,
        validation_alias="KLAVIYO_WORKER_OUTAGE_HOLD",
        description="Seconds a message is kept and tried again in an outage before it goes back to the queue",
    )
    park_retry_interval: float = Field(
        30.0,
        gt=0,
        validation_alias="KLAVIYO_WORKER_PARK_RETRY_INTERVAL",
        description="Seconds between tries while the worker is parked: credentials or queue refused",
    )

    @property
    def threads(self) -> int:
        """Return how many threads ask at once."""
        return 1

    @property
    def ct_token_url(self) -> str:
        """Return the token endpoint; CT_AUTH_URL may name the host or the endpoint itself."""
        suffix = "/oauth/token"
        return self.ct_auth_url if self.ct_auth_url.endswith(suffix) else self.ct_auth_url + suffix


class SubscriptionSettings(CommercetoolsSettings, MappingSettings, QueueSettings):
    """Everything `klaviyo-worker subscriptions` needs."""

    destination_secret: SecretStr = Field(
        SecretStr(""),
        validation_alias="KLAVIYO_WORKER_DESTINATION_SECRET",
        description="What lets commercetools send: the secret of an AWS access key, the connection string of "
        "Service Bus, or the access key of Event Grid",
    )


class Settings(CommercetoolsSettings, MappingSettings, QueueSettings):
    """Everything `klaviyo-worker run` needs."""

    klaviyo_auth_key: Key = Field(validation_alias="KLAVIYO_AUTH_KEY", description="Klaviyo private API key, pk_…")
    app_type: str = Field(
        "EVENT",
        pattern="^EVENT$",
        validation_alias="APP_TYPE",
        description="What to run, as the existing plugin names it: EVENT, the worker",
    )
    pub_sub_port: int = Field(
        6789,
        ge=0,
        le=65535,
        validation_alias="PUB_SUB_PORT",
        description="Port that push:// listens on when QUEUE_URL names none",
    )
    dead_letter_mode: Literal["policy", "direct"] = Field(
        "policy",
        validation_alias="KLAVIYO_WORKER_DEAD_LETTER_MODE",
        description="policy: the queue's own policy dead-letters a message; direct: the worker does, at once and with "
        "the reason",
    )
    klaviyo_api_url: Url = Field("https://a.klaviyo.com", validation_alias="KLAVIYO_API_URL", description="Klaviyo API")
    lanes: int = Field(
        4,
        ge=1,
        le=64,
        validation_alias="KLAVIYO_WORKER_LANES",
        description="Batches of events handled side by side, and as many each of profiles and of the catalog",
    )
    max_batch: int = Field(
        250, ge=1, le=10_000, validation_alias="KLAVIYO_WORKER_MAX_BATCH", description="Messages in a batch"
    )
    max_requests: int = Field(
        16,
        ge=1,
        le=256,
        validation_alias="KLAVIYO_WORKER_MAX_REQUESTS",
        description="Klaviyo requests for events under way at once, and as many each for profiles and the catalog",
    )
    bulk_events: Literal["auto", "always", "never"] = Field(
        "auto",
        validation_alias="KLAVIYO_WORKER_BULK_EVENTS",
        description="Events sent in bulk: auto: those surely sent for the first time; always: all; never: none",
    )
    bulk_threshold: int = Field(
        10,
        ge=0,
        validation_alias="KLAVIYO_WORKER_BULK_THRESHOLD",
        description="Operations of a kind in a batch up to which they are sent one by one, not in bulk",
    )
    max_in_flight: int = Field(
        2_000, ge=1, le=100_000, validation_alias="KLAVIYO_WORKER_MAX_IN_FLIGHT", description="Messages held at once"
    )
    max_in_flight_bytes: int = Field(
        8_000_000,
        ge=1,
        validation_alias="KLAVIYO_WORKER_MAX_IN_FLIGHT_BYTES",
        description="Bytes of messages held at once",
    )
    rate_limit_share: float = Field(
        1.0,
        gt=0,
        le=1,
        validation_alias="KLAVIYO_WORKER_RATE_LIMIT_SHARE",
        description="Share of Klaviyo's rate limits that this worker may use, like 0.5",
    )
    cache_ttl: float = Field(
        300.0,
        ge=0,
        validation_alias="KLAVIYO_WORKER_CACHE_TTL",
        description="Seconds that categories and products are remembered for order events",
    )
    shutdown_grace_period: float = Field(
        25.0,
        ge=0,
        validation_alias="KLAVIYO_WORKER_SHUTDOWN_GRACE_PERIOD",
        description="Seconds to finish what is in flight after SIGTERM",
    )
    http_port: int = Field(
        9090,
        ge=0,
        le=65535,
        validation_alias="KLAVIYO_WORKER_HTTP_PORT",
        description="Port of /livez, /readyz, /metrics and the status page; 0: none",
    )
    status_page: Literal["on", "off"] = Field(
        "on", validation_alias="KLAVIYO_WORKER_STATUS_PAGE", description="Status page at / of that port: on or off"
    )
    log_level: str = Field(
        "INFO",
        pattern="^(DEBUG|INFO|WARNING|ERROR)$",
        validation_alias="KLAVIYO_WORKER_LOG_LEVEL",
        description="DEBUG, INFO, WARNING or ERROR",
    )
    log_format: str = Field(
        "auto",
        pattern="^(auto|json|text)$",
        validation_alias="KLAVIYO_WORKER_LOG_FORMAT",
        description="json, text, or auto: text on a terminal",
    )

    @property
    def queue_options(self) -> QueueOptions:
        """Return what the worker asks of its queue."""
        return replace(
            super().queue_options,
            max_messages=self.max_in_flight,
            max_bytes=self.max_in_flight_bytes,
            direct_dead_letter=self.dead_letter_mode == "direct",
            port=self.pub_sub_port,
        )

    @property
    def threads(self) -> int:
        """Return how many lanes there are: for events, for profiles, for the catalog."""
        return 3 * self.lanes


def load(kind: type[S], flags: Mapping[str, Any]) -> S:
    """Read settings; `flags` are command-line values by field name, which win.

    Raises SettingsError with one line per variable: its name, what was expected, what to do.
    """
    aliases = {name: str(info.validation_alias) for name, info in kind.model_fields.items()}
    given = {aliases[name]: value for name, value in flags.items() if value is not None}
    try:
        return kind(**given)
    except ValidationError as errors:
        raise SettingsError.joined([_problem(kind, error) for error in errors.errors()]) from None


def _problem(kind: type[BaseSettings], error: ErrorDetails) -> SettingsError:
    name = str(error["loc"][0])
    info = next(info for info in kind.model_fields.values() if info.validation_alias == name)
    if error["type"] == "missing":
        return SettingsError(f"{name} is missing", todo=f"set it (or {name}_FILE) to the {info.description}")
    problem = error["msg"].removeprefix("Value error, ")
    return SettingsError(f"{name} is malformed", todo=f"{problem} — {info.description}")
