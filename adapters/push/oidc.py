"""Verifies the token that Pub/Sub sends with a push.

https://cloud.google.com/pubsub/docs/authenticate-push-subscriptions
"""

from __future__ import annotations

import json

import jwt

GOOGLE_KEYS = "https://www.googleapis.com/oauth2/v3/certs"
_ISSUERS = ("https://accounts.google.com", "accounts.google.com")
_KEYS_LIFESPAN = 3600  # seconds; an unknown key is fetched immediately
_LEEWAY = 30  # seconds by which clocks can differ
_REMOVED = ".SIGNATURE_REMOVED_BY_GOOGLE"  # https://cloud.google.com/run/docs/troubleshooting#signature-removed


class TokenRefusedError(Exception):
    """The token does not prove that Pub/Sub sent this request to this endpoint."""


class KeysUnavailableError(Exception):
    """Google's public keys cannot be fetched."""


class TokenVerifier:
    """Verifies signature, issuer, time, audience and service account."""

    def __init__(self, audience: str, service_account: str, keys_url: str = GOOGLE_KEYS) -> None:
        self._audience = audience
        self._service_account = service_account
        self._keys = jwt.PyJWKClient(keys_url, lifespan=_KEYS_LIFESPAN, timeout=10)

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
                self._keys.get_signing_key_from_jwt(token).key,
                algorithms=["RS256"],
                audience=self._audience,
                issuer=_ISSUERS,
                leeway=_LEEWAY,
                options={"require": ["exp", "iat", "aud", "iss"]},
            )
        except (jwt.PyJWKClientConnectionError, json.JSONDecodeError) as error:
            raise KeysUnavailableError(str(error)) from None
        except jwt.PyJWTError as error:  # its text can quote the token
            raise TokenRefusedError(type(error).__name__) from None
        if claims.get("email_verified") is not True or claims.get("email") != self._service_account:
            raise TokenRefusedError("the token belongs to another service account")
