"""The worker's settings. The order of precedence is option, environment variable, file (`NAME_FILE`), default.

A field defines everything about a setting: its environment variable, its option (secrets have none), its check and its
line in docs/configuration.md. A test compares that page with this file.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from ssl import SSLError
from typing import TYPE_CHECKING, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from adapters.base import QueueOptions
from worker import network
from worker.mapping import MappingConfig, load_mapping
from worker.model import Effect
from worker.setting_sources import SettingsBase, prefixed
from worker.setting_types import ApiClientJson, NonEmptyStr, PrivateKey, Url, mistake

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_CT_HOST = re.compile(r"https://([a-z]+)\.(.+\.commercetools\.(?:com|cn))(?:/.*)?")
_PROJECT_SCOPES = ("view_", "manage_")  # scopes of the form NAME:PROJECT
# Kubernetes adds these variables for each Service, such as one with the name klaviyo-worker.
_OF_KUBERNETES = re.compile(r"\w+_SERVICE_(HOST|PORT(_\w+)?)|\w+_PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?")


class QueueSettings(SettingsBase):
    """The settings of every command that uses the queue."""

    uses_network = True
    queue_url: NonEmptyStr = Field(
        "embedded://~/.local/state/klaviyo-worker/queue.db",
        validation_alias="QUEUE_URL",
        description="URL of the queue: embedded:///path/queue.db, pubsub://PROJECT/SUBSCRIPTION, push://HOST:PORT, "
        "sqs://NAME?region=REGION or servicebus://NAMESPACE.servicebus.windows.net/QUEUE; see docs/adapters.md",
    )
    servicebus_connection_string: SecretStr = Field(
        SecretStr(""),
        validation_alias="SERVICEBUS_CONNECTION_STRING",
        description="Connection string for servicebus://; without it, the worker uses its Azure identity",
    )
    dead_letter_queue_url: str = Field(
        "",
        validation_alias="DEAD_LETTER_QUEUE_URL",
        description="URL of the dead-letter queue; only needed if `klaviyo-worker dlq` cannot find it",
    )

    @property
    def queue_options(self) -> QueueOptions:
        """Return the options of the queue."""
        secret = self.servicebus_connection_string.get_secret_value().strip()
        return QueueOptions(connection_string=secret, dead_letter_url=self.dead_letter_queue_url)


class MappingSettings(SettingsBase):
    """The settings of the mapping. The names without a prefix are those of Klaviyo's plugin."""

    config: Path | None = Field(None, description="Mapping file (TOML); see docs/configuration.md")
    preferred_locale: str = Field(
        "", validation_alias="PREFERRED_LOCALE", description="Preferred locale of texts [mapping: en-US]"
    )
    preferred_currency: str = Field(
        "", validation_alias="PREFERRED_CURRENCY", description="Preferred currency of prices [mapping: any]"
    )
    product_url_template: str = Field(
        "",
        validation_alias="PRODUCT_URL_TEMPLATE",
        description="URL of the product page, like https://shop.example/p/{{productSlug}}",
    )

    def mapping(self) -> MappingConfig:
        """Load the mapping. Raises SettingsError."""
        return load_mapping(
            self.config,
            locale=self.preferred_locale,
            currency=self.preferred_currency,
            product_url_template=self.product_url_template,
        )


class CommercetoolsSettings(SettingsBase):
    """The settings of every command that sends requests to commercetools."""

    ct_api_url: Url = Field(
        validation_alias="CT_API_URL",
        description="URL of the commercetools API, like https://api.europe-west1.gcp.commercetools.com",
    )
    ct_auth_url: Url = Field(
        validation_alias="CT_AUTH_URL",
        description="URL of commercetools authorization, like https://auth.europe-west1.gcp.commercetools.com",
    )
    ct_project_id: NonEmptyStr = Field(validation_alias="CT_PROJECT_ID", description="commercetools project key")
    ct_scope: str = Field(
        "",
        validation_alias="CT_SCOPE",
        description="Scopes to request, separated by spaces [default: all scopes of the API client]",
    )
    ct_api_client: ApiClientJson = Field(
        validation_alias="CT_API_CLIENT",
        description='commercetools API client, JSON {"clientId": "…", "secret": "…"}',
    )
    connect_timeout: float = Field(5.0, gt=0, description="Seconds to wait for a connection")
    read_timeout: float = Field(30.0, gt=0, description="Seconds to wait for a response")
    retry_timeout: float = Field(
        10.0, ge=0, description="Seconds during which a failed request is retried before its message is held"
    )
    outage_hold: float = Field(
        1800.0, ge=0, description="Seconds to hold a message during an outage before it is nacked"
    )
    park_retry_interval: float = Field(
        30.0,
        gt=0,
        description="Seconds between retries while the worker is parked because its credentials or permissions are "
        "refused",
    )

    @field_validator("ct_api_url", "ct_auth_url")
    @classmethod
    def _check_host(cls, value: str, info: ValidationInfo) -> str:
        """Raise an error for the URL of another service of commercetools, or of another region."""
        expected = "api" if info.field_name == "ct_api_url" else "auth"
        service, region = _service_and_region(value)
        if service and service != expected:
            raise mistake(f"is the URL of another service, {service}", f"write https://{expected}.{region}")
        api_region = _service_and_region(info.data.get("ct_api_url", ""))[1]
        if region and api_region and region != api_region:
            todo = "use the URLs of the region in which the project is"
            raise mistake(f"is in {region}, but CT_API_URL is in {api_region}", todo)
        return value

    @field_validator("ct_project_id")
    @classmethod
    def _check_project(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("ct_api_url", "").endswith(f"/{value}"):
            raise mistake("ends with the project key", "remove it, CT_PROJECT_ID contains it", name="CT_API_URL")
        return value

    @field_validator("ct_scope")
    @classmethod
    def _check_scope(cls, value: str, info: ValidationInfo) -> str:
        project = info.data.get("ct_project_id")
        scopes = (scope.split(":") for scope in value.split())
        others = {parts[1] for parts in scopes if len(parts) > 1 and parts[0].startswith(_PROJECT_SCOPES)}
        if project and others - {project}:
            raise mistake(
                f"is for the project {min(others - {project})}, but CT_PROJECT_ID is {project}", "correct one"
            )
        return value

    @property
    def threads(self) -> int:
        """Return the number of threads that send requests to commercetools concurrently."""
        return 1

    @property
    def ct_token_url(self) -> str:
        """Return the URL of the token endpoint. CT_AUTH_URL can name the host or the endpoint itself."""
        suffix = "/oauth/token"
        return self.ct_auth_url if self.ct_auth_url.endswith(suffix) else self.ct_auth_url + suffix


class SubscriptionSettings(CommercetoolsSettings, MappingSettings, QueueSettings):
    """The settings of `klaviyo-worker subscriptions`."""

    destination_secret: SecretStr = Field(
        SecretStr(""),
        description="Credentials with which commercetools sends to the queue: the secret of an AWS access key, the "
        "connection string of Service Bus, or the access key of Event Grid",
    )


class Settings(CommercetoolsSettings, MappingSettings, QueueSettings):
    """The settings of `klaviyo-worker run`."""

    klaviyo_auth_key: PrivateKey = Field(
        validation_alias="KLAVIYO_AUTH_KEY", description="Klaviyo private API key, pk_…"
    )
    app_type: str = Field(
        "EVENT",
        pattern="^EVENT$",
        validation_alias="APP_TYPE",
        description="Application to run, as in Klaviyo's plugin; only EVENT (the worker) is supported",
    )
    pub_sub_port: int = Field(
        6789,
        ge=0,
        le=65535,
        validation_alias="PUB_SUB_PORT",
        description="Port that push:// listens on if QUEUE_URL names no port",
    )
    dead_letter_mode: Literal["policy", "direct"] = Field(
        "policy",
        description="policy: the queue dead-letters a message after its maximum number of attempts; direct: the worker "
        "dead-letters it immediately and adds the reason",
    )
    klaviyo_api_url: Url = Field(
        "https://a.klaviyo.com", validation_alias="KLAVIYO_API_URL", description="URL of the Klaviyo API"
    )

    lanes: int = Field(
        4,
        ge=1,
        le=64,
        description="Number of lanes per effect; the effects are events, profiles, deletions, catalog and carts",
    )
    max_batch: int = Field(
        250,
        ge=1,
        le=10_000,
        description="Maximum number of messages in a batch; a batch of orders or payments has at most 200",
    )
    max_requests: int = Field(
        16,
        ge=1,
        le=256,
        description="Maximum number of concurrent Klaviyo requests per effect",
    )
    bulk_events: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether to send events in bulk: auto (if the Klaviyo account ignores repeated events, see "
        "`klaviyo-worker check --probe-bulk`), always or never",
    )
    bulk_threshold: int = Field(
        10,
        ge=0,
        description="Maximum number of operations of one kind in a batch that are sent individually; if there are "
        "more, they are sent in bulk",
    )
    job_timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds within which a bulk job of Klaviyo ends; as long as a job can still write, no worker "
        "processes its messages",
    )
    max_in_flight: int = Field(4_000, ge=1, le=100_000, description="Maximum number of messages in flight per effect")
    max_in_flight_bytes: int = Field(
        6_000_000, ge=1, description="Maximum size of the messages in flight per effect, in bytes"
    )
    rate_limit_share: float = Field(
        1.0, gt=0, le=1, description="Share of Klaviyo's rate limits that this worker can use, like 0.5"
    )
    cache_ttl: float = Field(
        300.0,
        ge=0,
        description="Seconds to cache commercetools categories, products, discount codes and email addresses for order "
        "events",
    )
    shutdown_grace_period: float = Field(
        25.0, ge=0, description="Seconds to finish the messages in progress after SIGTERM"
    )
    http_host: NonEmptyStr = Field(
        "127.0.0.1", description="Address that the HTTP port listens on; 0.0.0.0: all interfaces, including IPv6"
    )
    http_port: int = Field(
        9090,
        ge=0,
        le=65535,
        description="HTTP port for /livez, /readyz, /metrics and the status page; 0: no port",
    )
    http_password: SecretStr = Field(
        SecretStr(""),
        description="Password for the metrics and the status page, with any user name (basic authentication)",
    )
    http_tls_certificate: Path | None = Field(
        None, description="File with the certificate of the HTTP port and its chain (PEM); without it: no TLS"
    )
    http_tls_key: Path | None = Field(
        None, validate_default=True, description="File with the private key of the certificate (PEM)"
    )
    status_page: Literal["on", "off"] = Field("on", description="Status page at / of the HTTP port: on or off")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR")
    log_format: str = Field(
        "auto", pattern="^(auto|json|text)$", description="json, text, or auto: text on a terminal, else json"
    )

    @property
    def queue_options(self) -> QueueOptions:
        """Return the options of the worker's queue."""
        return replace(
            super().queue_options,
            max_messages=len(Effect) * self.max_in_flight,
            max_bytes=len(Effect) * self.max_in_flight_bytes,
            direct_dead_letter=self.dead_letter_mode == "direct",
            port=self.pub_sub_port,
        )

    @field_validator("klaviyo_api_url")
    @classmethod
    def _check_klaviyo_url(cls, value: str) -> str:
        if value.endswith("/api"):
            raise mistake("ends with /api", "remove it, the worker adds it")
        return value

    @field_validator("http_tls_key")
    @classmethod
    def _check_tls(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        name, certificate = prefixed("http_tls_key"), info.data.get("http_tls_certificate")
        if (key is None) is not (certificate is None):
            raise mistake("and KLAVIYO_WORKER_HTTP_TLS_CERTIFICATE belong together", "set both, or neither", name=name)
        if key and certificate:
            try:
                network.server_tls(certificate, key)
            except OSError as error:
                reason = "they are not a certificate and its key" if isinstance(error, SSLError) else error.strerror
                what = f"and KLAVIYO_WORKER_HTTP_TLS_CERTIFICATE cannot be used: {reason}"
                raise mistake(what, "check both files, which must be PEM", name=name) from None
        return key

    @property
    def threads(self) -> int:
        """Return the number of lanes of all effects, with that for stock. Each lane is a thread."""
        return len(Effect) * self.lanes + 1


def unknown_variables(environment: Iterable[str]) -> Iterator[str]:
    """Yield a warning for each variable that has the worker's prefix and names no setting."""
    fields = (Settings.model_fields | SubscriptionSettings.model_fields).values()
    prefix = prefixed("")
    names = [str(info.validation_alias) for info in fields]
    known = [
        name.removeprefix(prefix) + suffix for name in names for suffix in ("", "_FILE") if name.startswith(prefix)
    ]
    for name in sorted(environment):
        rest = name.removeprefix(prefix)
        if rest != name and rest not in known and not _OF_KUBERNETES.fullmatch(name):
            closest = difflib.get_close_matches(rest, known, 1)
            yield f"{name} is not a setting: " + (f"is {prefix}{closest[0]} meant?" if closest else "remove it")


def _service_and_region(url: str) -> tuple[str, str]:
    """Return service and domain of a region of commercetools, such as `api`; ("", "") for any other URL."""
    match = _CT_HOST.fullmatch(url)
    return (match[1], match[2]) if match else ("", "")
