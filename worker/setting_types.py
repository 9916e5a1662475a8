"""Types of settings. Their error texts say what was expected. They never quote a secret."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, SecretStr
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from adapters.shared.loopback import is_loopback

_EXAMPLE = '{"clientId": "…", "secret": "…"}'
_EXPECTED_CLIENT = f"expected JSON like {_EXAMPLE}"
_FORMER_KEYS = ("client_id", "client_secret", "clientSecret", "id")
_QUOTES = frozenset({"'", '"'})
_PUBLIC_KEY = re.compile("[A-Za-z0-9]{6}")


class ApiClient(BaseModel):
    """A commercetools API client."""

    client_id: str
    secret: SecretStr


def mistake(reason: str, todo: str, *, name: str = "") -> PydanticCustomError:
    """Return the error for a frequent mistake: "NAME reason: todo". `name`: another setting that is at fault."""
    return PydanticCustomError("mistake", "{reason}: {todo}", {"name": name, "reason": reason, "todo": todo})


def _check_url(value: str) -> str:
    text = _check_quotes(value.strip())
    parts = urlsplit(text)
    is_here = is_loopback(parts.hostname or "")
    if "://" not in text:
        raise mistake("does not start with https://", "add it")
    if parts.scheme == "http" and not is_here:
        raise mistake("starts with http://", "write https://; http:// is accepted only for this machine")
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or " " in text:
        raise ValueError("expected an https:// URL")
    if parts.username is not None:  # the text can quote the URL
        raise mistake("contains a user", "remove USER:PASSWORD@")
    return text.rstrip("/")


def _check_quotes(value: str) -> str:
    """Raise an error for a value in quotes: `docker --env-file` and Kubernetes keep them."""
    if value[:1] in _QUOTES and value[-1:] == value[:1]:
        raise mistake("is enclosed in quotes", "remove them: they are a part of the value")
    return value


def _check_non_empty(value: str) -> str:
    if not value.strip() or not value.strip().isprintable():
        raise ValueError("expected a text that is not empty")
    return _check_quotes(value.strip())


def _parse_api_client(value: Any) -> Any:
    """Decode the JSON. pydantic must not do it, because its error text can quote the secret."""
    if not isinstance(value, str):
        return value
    try:
        document = orjson.loads(value)
    except orjson.JSONDecodeError:
        raise _not_json(value.strip()) from None
    if isinstance(document, str):
        raise mistake("is quoted twice: it is a JSON text that contains JSON", "remove the outer quotes and all \\")
    fields = document if isinstance(document, dict) else {}
    client, secret = fields.get("clientId"), fields.get("secret")
    if client is None or secret is None:
        raise _missing_key(fields)
    if not isinstance(client, str) or not isinstance(secret, str) or not client.strip() or not secret.strip():
        raise ValueError("expected clientId and secret to be texts that are not empty")
    if client != client.strip() or secret != secret.strip():
        raise mistake("has a blank at the start or the end of clientId or secret", "remove it")
    return {"client_id": client, "secret": secret}


def _not_json(value: str) -> Exception:
    _check_quotes(value)
    if value.startswith('{\\"'):
        return mistake('contains \\" instead of "', "remove the backslashes")
    if value.startswith("{'"):
        return mistake("uses single quotes", f"JSON requires double quotes, {_EXAMPLE}")
    if value.startswith("{") and '"' not in value:
        return mistake("has lost its double quotes", f"enclose the JSON in single quotes in a shell: '{_EXAMPLE}'")
    if value.startswith("eyJ"):
        return mistake("is encoded as base64", "decode it")
    return ValueError(_EXPECTED_CLIENT)


def _missing_key(document: dict[str, Any]) -> Exception:
    """Return the error for JSON with other keys. It names only keys that clients of commercetools use."""
    found = [key for key in _FORMER_KEYS if key in document]
    if found:
        return mistake(f"contains {' and '.join(found)}", f"rename the keys: {_EXAMPLE}")
    return ValueError(_EXPECTED_CLIENT)


def _check_private_key(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    _check_quotes(text)
    if text.startswith("Klaviyo-API-Key"):
        raise mistake("contains Klaviyo-API-Key", "write only the key, like pk_…")
    if text != text.strip():
        raise mistake("has a blank or a line break at its start or end", "remove it")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise mistake("contains a blank or another character that no key contains", "copy the key again")
    if _PUBLIC_KEY.fullmatch(text):
        raise mistake("is a public key", "use a private key, which starts with pk_")
    if not text.startswith("pk_"):
        raise mistake("does not start with pk_", "copy the whole private key")
    return value


Url = Annotated[str, AfterValidator(_check_url)]
NonEmptyStr = Annotated[str, AfterValidator(_check_non_empty)]
ApiClientJson = Annotated[ApiClient, NoDecode, BeforeValidator(_parse_api_client)]
PrivateKey = Annotated[SecretStr, AfterValidator(_check_private_key)]
