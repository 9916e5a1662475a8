"""The destination of a subscription: as a URL on the command line, and as fields of commercetools' API.

https://docs.commercetools.com/api/projects/subscriptions#destination
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from worker.errors import SettingsError
from worker.json_access import as_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.model import Json

SECRET_VARIABLE = "KLAVIYO_WORKER_DESTINATION_SECRET"  # noqa: S105 - a name
EXPECTED = (
    "pubsub://PROJECT/TOPIC, https://sqs.REGION.amazonaws.com/ACCOUNT/QUEUE, sns://arn:aws:sns:REGION:ACCOUNT:TOPIC, "
    "eventbridge://ACCOUNT/REGION, servicebus://NAMESPACE.servicebus.windows.net/QUEUE "
    "or eventgrid://TOPIC.REGION.eventgrid.azure.net"
)
_REGION = r"(?P<region>[a-z]{2,}(-[a-z]+)+-[0-9]+)"
_ACCESS_KEY = r"(\?access_key=(?P<access_key>[A-Za-z0-9]{16,128}))?"
_PUBSUB = re.compile(r"pubsub://(?P<projectId>[a-z0-9.:-]+)/(?P<topic>[A-Za-z][A-Za-z0-9._~+%-]{2,254})")
_SQS = re.compile(
    rf"(https|sqs)://(?P<rest>sqs\.{_REGION}\.amazonaws\.(com|com\.cn|eu)/[0-9]{{12}}/[A-Za-z0-9_-]{{1,80}}){_ACCESS_KEY}"
)
_SNS = re.compile(rf"(sns://)?(?P<arn>arn:aws[a-z-]*:sns:[a-z0-9-]+:[0-9]{{12}}:[A-Za-z0-9_-]{{1,256}}){_ACCESS_KEY}")
_EVENTBRIDGE = re.compile(rf"eventbridge://(?P<accountId>[0-9]{{12}})/{_REGION}")
_SERVICEBUS = re.compile(
    r"servicebus://(?P<host>[a-z0-9-]+(\.[a-z0-9-]+)+)/(?P<entity>[A-Za-z0-9][A-Za-z0-9._/-]{0,259})"
)
_EVENTGRID = re.compile(r"eventgrid://(?P<host>[a-z0-9-]+(\.[a-z0-9-]+)+)(?P<path>/[A-Za-z0-9/_-]+)?")


@dataclass(frozen=True, slots=True)
class Destination:
    """A destination. `fields` is the API form, with secrets; `name` has none and can be shown and compared."""

    fields: Json = field(repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Return the destination as a URL without secrets."""
        return display_name(self.fields)

    @property
    def format(self) -> str:
        """Return the format that the destination requires; "" if it accepts any."""
        return "CloudEvents" if self.fields["type"] == "EventGrid" else ""

    def redact(self, text: str) -> str:
        """Return `text` with the secrets replaced."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def parse(url: str, secret: str) -> Destination:
    """Parse the value of `--destination`. Raises SettingsError, which quotes neither URL nor secret."""
    for pattern, build in _BUILDERS.items():
        if match := pattern.fullmatch(url):
            return build(match, secret)
    raise SettingsError("--destination is malformed", todo=f"expected {EXPECTED}")


def from_queue_url(url: str) -> str:
    """Return the destination that QUEUE_URL implies. Raises SettingsError if it names only a source, no destination."""
    if _SQS.fullmatch(url):
        return url
    if url.startswith("servicebus://"):
        return "/".join(url.split("/")[:4])  # for a topic's subscription, return the topic
    raise SettingsError("--destination is missing: QUEUE_URL does not name one", todo=f"set it to {EXPECTED}")


def display_name(fields: Json) -> str:
    """Return a destination's name. `fields` can contain its secrets, or asterisks in their place."""
    kind = as_text(fields.get("type"))
    return _NAMES.get(kind, _unknown)({name: as_text(value) for name, value in fields.items()})


def _pubsub(match: re.Match[str], _secret: str) -> Destination:
    return Destination({"type": "GoogleCloudPubSub"} | match.groupdict())


def _sqs(match: re.Match[str], secret: str) -> Destination:
    fields = {"type": "SQS", "queueUrl": f"https://{match['rest']}", "region": match["region"]}
    return _with_aws_login(fields, match["access_key"], secret)


def _sns(match: re.Match[str], secret: str) -> Destination:
    return _with_aws_login({"type": "SNS", "topicArn": match["arn"]}, match["access_key"], secret)


def _with_aws_login(fields: Json, access_key: str | None, secret: str) -> Destination:
    if access_key is None:
        return Destination(fields | {"authenticationMode": "IAM"})
    secret = _require_secret(secret, "the secret of the access key")
    key = {"authenticationMode": "Credentials", "accessKey": access_key, "accessSecret": secret}
    return Destination(fields | key, (secret,))


def _eventbridge(match: re.Match[str], _secret: str) -> Destination:
    return Destination({"type": "EventBridge", "region": match["region"], "accountId": match["accountId"]})


def _servicebus(match: re.Match[str], secret: str) -> Destination:
    expected = "a connection string with Send rights, Endpoint=sb://…;SharedAccessKeyName=…;SharedAccessKey=…"
    parts = _parse_connection_string(_require_secret(secret, expected))
    if not parts.get("sharedaccesskey"):
        raise SettingsError(f"{SECRET_VARIABLE} is malformed", todo=f"expected {expected}")
    if _host_of(parts) != match["host"] or parts.get("entitypath", match["entity"]) != match["entity"]:
        raise SettingsError(
            f"{SECRET_VARIABLE} is not for the queue or topic of --destination", todo="correct one of them"
        )
    complete = secret if "entitypath" in parts else f"{secret.rstrip(';')};EntityPath={match['entity']}"
    return Destination({"type": "AzureServiceBus", "connectionString": complete}, (secret, parts["sharedaccesskey"]))


def _eventgrid(match: re.Match[str], secret: str) -> Destination:
    secret = _require_secret(secret, "an access key of the topic")
    uri = f"https://{match['host']}{match['path'] or '/api/events'}"
    return Destination({"type": "EventGrid", "uri": uri, "accessKey": secret}, (secret,))


_BUILDERS: dict[re.Pattern[str], Callable[[re.Match[str], str], Destination]] = {
    _PUBSUB: _pubsub,
    _SQS: _sqs,
    _SNS: _sns,
    _EVENTBRIDGE: _eventbridge,
    _SERVICEBUS: _servicebus,
    _EVENTGRID: _eventgrid,
}


def _aws_key(fields: dict[str, str]) -> str:
    return "" if fields.get("authenticationMode") == "IAM" else ", by access key"  # commercetools' default


def _service_bus_name(fields: dict[str, str]) -> str:
    parts = _parse_connection_string(fields.get("connectionString", ""))
    entity, key_name = parts.get("entitypath", ""), parts.get("sharedaccesskeyname", "")
    return f"servicebus://{_host_of(parts)}/{entity}, by key {key_name}"


def _unknown(fields: dict[str, str]) -> str:
    return fields.get("type", "")[:64] or "none"


_NAMES: dict[str, Callable[[dict[str, str]], str]] = {
    "GoogleCloudPubSub": lambda fields: f"pubsub://{fields.get('projectId', '')}/{fields.get('topic', '')}",
    "SQS": lambda fields: fields.get("queueUrl", "") + _aws_key(fields),
    "SNS": lambda fields: f"sns://{fields.get('topicArn', '')}{_aws_key(fields)}",
    "EventBridge": lambda fields: f"eventbridge://{fields.get('accountId', '')}/{fields.get('region', '')}",
    "AzureServiceBus": _service_bus_name,
    "EventGrid": lambda fields: "eventgrid://" + fields.get("uri", "").removeprefix("https://"),
}


def _require_secret(secret: str, expected: str) -> str:
    if not secret:
        raise SettingsError(f"{SECRET_VARIABLE} is missing", todo=f"set it (or {SECRET_VARIABLE}_FILE) to {expected}")
    return secret


def _parse_connection_string(text: str) -> dict[str, str]:
    """Return the parts of a connection string by name, in lower case."""
    pairs = (part.partition("=") for part in text.split(";"))
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _host_of(parts: dict[str, str]) -> str:
    try:
        return urlsplit(parts.get("endpoint", "")).netloc.lower()
    except ValueError:
        return ""
