"""Types of settings. Their error texts say what was expected. They never quote a secret."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, SecretStr
from pydantic_settings import NoDecode

from adapters.shared.loopback import is_loopback


class ApiClient(BaseModel):
    """A commercetools API client."""

    client_id: str
    secret: SecretStr


def _check_url(value: str) -> str:
    parts = urlsplit(value)
    if (parts.scheme == "https" and parts.netloc) or (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        return value.rstrip("/")
    raise ValueError("expected an https:// URL; http:// is accepted only for this machine")


def _check_non_empty(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("expected a text that is not empty")
    return value.strip()


def _parse_api_client(value: Any) -> Any:
    """Decode the JSON. pydantic must not do it, because its error text can quote the secret."""
    if not isinstance(value, str):
        return value
    try:
        document = orjson.loads(value)
        client, secret = document["clientId"], document["secret"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise ValueError('expected JSON like {"clientId": "…", "secret": "…"}') from None
    if not isinstance(client, str) or not isinstance(secret, str) or not client or not secret:
        raise ValueError("expected clientId and secret to be texts that are not empty")
    return {"client_id": client, "secret": secret}


def _check_private_key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("expected a private API key, like pk_…, without spaces")
    return value


Url = Annotated[str, AfterValidator(_check_url)]
NonEmptyStr = Annotated[str, AfterValidator(_check_non_empty)]
ApiClientJson = Annotated[ApiClient, NoDecode, BeforeValidator(_parse_api_client)]
PrivateKey = Annotated[SecretStr, AfterValidator(_check_private_key)]
