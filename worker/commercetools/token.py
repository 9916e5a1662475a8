"""The access token of commercetools: fetched when needed, renewed before it expires."""

from __future__ import annotations

import os
import time
from threading import Lock
from typing import TYPE_CHECKING

import requests
from commercetools.base_client import RefreshingOAuth2Session
from oauthlib.oauth2 import BackendApplicationClient, OAuth2Error

from worker.errors import CommercetoolsMisconfigured, Transient
from worker.http import transport as http
from worker.json_access import as_text

if TYPE_CHECKING:
    from worker.settings import CommercetoolsSettings

TOKEN_MARGIN = 300.0  # seconds before its end that a token is renewed


_TOKEN = "oauth/token"  # noqa: S105 - the endpoint


class _Token:
    """An access token, fetched by one thread at a time while the others wait for it."""

    def __init__(self, settings: CommercetoolsSettings, observe: http.Observe) -> None:
        self._settings = settings
        self._observe = observe
        self._lock = Lock()
        self._value = ""
        self._expires_at = 0.0
        # oauthlib refuses http:// and narrowed scopes unless told so by environment. Settings allow http://
        # for loopback only; commercetools may grant fewer scopes than asked for.
        os.environ["OAUTHLIB_RELAX_TOKEN_SCOPE"] = "1"  # noqa: S105 - a switch
        if settings.ct_token_url.startswith("http://"):
            os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"

    def get(self) -> str:
        with self._lock:
            if time.monotonic() >= self._expires_at:
                self._fetch()
            return self._value

    def renew(self, refused: str) -> str:
        """Return another token than `refused`, which another thread may have fetched already."""
        with self._lock:
            if self._value == refused:
                self._fetch()
            return self._value

    def _fetch(self) -> None:
        scope = self._settings.ct_scope.split() or None  # None: all that the API client has
        client = self._settings.ct_api_client
        identity = BackendApplicationClient(client_id=client.client_id, scope=scope)
        began = time.monotonic()
        try:
            with RefreshingOAuth2Session(client=identity, scope=scope) as session:
                session.register_compliance_hook("access_token_response", self._judged)
                token = session.fetch_token(
                    self._settings.ct_token_url,
                    client_id=client.client_id,
                    client_secret=client.secret.get_secret_value(),
                    timeout=(self._settings.connect_timeout, self._settings.read_timeout),
                )
        except requests.RequestException as error:
            self._observe(_TOKEN, None, time.monotonic() - began)
            raise Transient(f"no token from commercetools: {type(error).__name__}") from None
        except OAuth2Error as error:
            raise CommercetoolsMisconfigured(
                f"commercetools refuses a token ({error.error})", todo="check CT_API_CLIENT, CT_SCOPE and CT_AUTH_URL"
            ) from None
        except (AttributeError, TypeError, ValueError):  # oauthlib reads it as if it had the right shape
            raise Transient("no token from commercetools: an answer of another shape") from None
        lifetime = float(token.get("expires_in") or 0)
        self._value = as_text(token["access_token"])
        self._expires_at = time.monotonic() + max(lifetime - TOKEN_MARGIN, lifetime / 2)

    def _judged(self, response: requests.Response) -> requests.Response:
        """Let oauthlib judge what the authorization server decided, not that it was down."""
        status = response.status_code
        self._observe(_TOKEN, status, response.elapsed.total_seconds())
        if http.is_transient(status):
            raise Transient(f"no token from commercetools: {status}", http.retry_after(response.headers))
        return response
