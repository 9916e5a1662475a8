"""Verifies the token that Pub/Sub sends with a push.

https://cloud.google.com/pubsub/docs/authenticate-push-subscriptions
"""

from __future__ import annotations

import time
import urllib.request
from http.client import HTTPException
from threading import Lock
from typing import Any

import jwt
import orjson

GOOGLE_KEYS = "https://www.googleapis.com/oauth2/v3/certs"
MAX_KEYS_BYTES = 1_000_000
_ISSUERS = ("https://accounts.google.com", "accounts.google.com")
_TIMEOUT = 10.0  # seconds
_KEYS_LIFESPAN = 3600.0  # seconds
_PAUSE = 30.0  # seconds between two fetches because of an unknown key
_PAUSE_AFTER_FAILURE = 5.0  # seconds
_LEEWAY = 30  # seconds by which clocks can differ
_REMOVED = ".SIGNATURE_REMOVED_BY_GOOGLE"  # https://cloud.google.com/run/docs/troubleshooting#signature-removed


class TokenRefusedError(Exception):
    """The token does not prove that Pub/Sub sent this request to this endpoint."""


class KeysUnavailableError(Exception):
    """Google's public keys cannot be fetched."""


class TokenVerifier:
    """Verifies signature, issuer, time, audience and service account. Safe for many threads."""

    def __init__(self, audience: str, service_account: str, keys_url: str = GOOGLE_KEYS) -> None:
        self._audience = audience
        self._service_account = service_account
        self._keys = PublicKeys(keys_url)

    def verify(self, authorization: str) -> None:
        """Verify an Authorization header. Raises TokenRefusedError or KeysUnavailableError."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise TokenRefusedError("expected a bearer token")
        if token.endswith(_REMOVED):
            hint = "Cloud Run has verified the token and removed its signature"
            raise TokenRefusedError(f"{hint}: remove audience and service_account from QUEUE_URL")
        try:
            claims = jwt.decode(
                token,
                self._keys.get(jwt.get_unverified_header(token).get("kid")),
                algorithms=["RS256"],
                audience=self._audience,
                issuer=_ISSUERS,
                leeway=_LEEWAY,
                options={"require": ["exp", "iat", "aud", "iss"]},
            )
        except jwt.PyJWTError as error:  # its text can quote the token
            raise TokenRefusedError(type(error).__name__) from None
        if claims.get("email_verified") is not True or claims.get("email") != self._service_account:
            raise TokenRefusedError("the token belongs to another service account")


class PublicKeys:
    """Public keys by id. One thread fetches them for all threads, with a pause after each fetch. Thread-safe."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._expire_at = 0.0  # monotonic seconds
        self._next_fetch_at = 0.0  # monotonic seconds
        self._failure = ""

    def get(self, key_id: object) -> jwt.PyJWK:
        """Return a key. Raises TokenRefusedError for an unknown key, and KeysUnavailableError.

        A token with an unknown key does not wait for another thread that fetches keys: forged tokens would otherwise
        occupy all threads.
        """
        key = self._find(key_id)
        if key is None and self._lock.acquire(blocking=not self._are_fresh()):
            try:
                key = self._find(key_id) or self._fetch_and_find(key_id)
            finally:
                self._lock.release()
        if key is None:
            raise TokenRefusedError("the token names an unknown key")
        return key

    def _are_fresh(self) -> bool:
        return time.monotonic() < self._expire_at

    def _find(self, key_id: object) -> jwt.PyJWK | None:
        return self._keys.get(key_id) if isinstance(key_id, str) and self._are_fresh() else None

    def _fetch_and_find(self, key_id: object) -> jwt.PyJWK | None:
        if time.monotonic() >= self._next_fetch_at:
            self._fetch()
        if not self._are_fresh():
            raise KeysUnavailableError(self._failure)
        return self._find(key_id)

    def _fetch(self) -> None:
        try:
            self._keys = _parse_keys(_download(self._url))
        except (OSError, HTTPException, ValueError) as error:
            self._failure = f"no public keys from Google: {type(error).__name__}"
            self._next_fetch_at = time.monotonic() + _PAUSE_AFTER_FAILURE
        else:
            now = time.monotonic()
            self._expire_at, self._next_fetch_at = now + _KEYS_LIFESPAN, now + _PAUSE


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Return None, so that a redirect is an error."""


def _download(url: str) -> bytes:
    """Return the body of a response. Raises OSError, HTTPException, and ValueError if it is too large."""
    with urllib.request.build_opener(_NoRedirect).open(url, timeout=_TIMEOUT) as response:
        body: bytes = response.read(MAX_KEYS_BYTES + 1)
    if len(body) > MAX_KEYS_BYTES:
        raise ValueError("too many bytes")
    return body


def _parse_keys(body: bytes) -> dict[str, jwt.PyJWK]:
    """Return the keys of a JSON Web Key Set (RFC 7517) by id. Raises ValueError."""
    document = orjson.loads(body)
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("expected a key set")  # noqa: TRY004 - of the content
    try:
        keys = [jwt.PyJWK(entry) for entry in entries if isinstance(entry, dict) and entry.get("kty") == "RSA"]
    except jwt.PyJWTError:
        raise ValueError("malformed key") from None
    return {key.key_id: key for key in keys if key.key_id and key.public_key_use in {"sig", None}}
