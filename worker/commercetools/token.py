"""The access token for commercetools."""

from __future__ import annotations

import io
import time
from copy import copy
from http import HTTPStatus
from threading import Lock
from typing import TYPE_CHECKING, Any

import requests
from commercetools.base_client import RefreshingOAuth2Session
from oauthlib.oauth2 import BackendApplicationClient, OAuth2Error
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict

from worker.errors import CommercetoolsMisconfigured, ResponseTooLarge, Transient, WorkerError
from worker.http import transport as http
from worker.json_access import as_dict, as_text

if TYPE_CHECKING:
    from worker.settings import CommercetoolsSettings

TOKEN_MARGIN = 300.0  # seconds; a token is replaced this long before it expires
_ENDPOINT = "oauth/token"
_TRANSIENT_ERRORS = frozenset({"server_error", "temporarily_unavailable"})  # of OAuth 2.0 (RFC 6749)
_ADVICE = {  # by OAuth's error code
    "invalid_client": "check CT_API_CLIENT, and that CT_AUTH_URL is in the region of the project",
    "invalid_scope": "check CT_SCOPE, and that CT_API_CLIENT belongs to the project CT_PROJECT_ID",
}
_DEFAULT_ADVICE = "check CT_API_CLIENT, CT_SCOPE and CT_AUTH_URL"


class AccessToken:
    """An access token that many threads share. One thread fetches it while the others wait for its result."""

    def __init__(self, settings: CommercetoolsSettings, observe: http.Observe) -> None:
        self._settings = settings
        transport = http.Transport(http.pool(settings.ct_token_url, 1), settings, observe)
        self._adapter = _TokenAdapter(transport, settings.ct_token_url)
        self._lock = Lock()
        self._value = ""
        self._expires_at = 0.0  # monotonic seconds
        self._failure: WorkerError | None = None  # of the latest fetch that failed
        self._failed_at = 0.0  # monotonic seconds

    def get(self) -> str:
        """Return a valid token. Raises Transient and CommercetoolsMisconfigured."""
        asked_at = time.monotonic()
        with self._lock:
            if time.monotonic() >= self._expires_at:
                self._fetch(asked_at)
            return self._value

    def replace(self, refused: str) -> str:
        """Return a token other than `refused`. Raises as `get` does."""
        asked_at = time.monotonic()
        with self._lock:
            if self._value == refused:  # otherwise another thread has already replaced it
                self._fetch(asked_at)
            return self._value

    def _fetch(self, asked_at: float) -> None:
        """Fetch a token. A thread that has waited since `asked_at` for a fetch that failed raises its error instead.

        If every thread fetched, each would wait for the timeouts of all threads before it.
        """
        if self._failure is not None and self._failed_at >= asked_at:
            raise copy(self._failure)
        try:
            self._replace_value()
        except WorkerError as error:
            self._failure, self._failed_at = copy(error), time.monotonic()
            raise

    def _replace_value(self) -> None:
        try:
            token = self._request()
        except OAuth2Error as error:
            raise CommercetoolsMisconfigured(
                f"commercetools refuses a token ({error.error})", todo=_ADVICE.get(error.error, _DEFAULT_ADVICE)
            ) from None
        except (AttributeError, TypeError, ValueError):  # oauthlib does not check the shape of the response
            raise Transient("no token from commercetools: malformed response") from None
        lifetime = float(token.get("expires_in") or 0)
        self._value = as_text(token["access_token"])
        self._expires_at = time.monotonic() + max(lifetime - TOKEN_MARGIN, lifetime / 2)

    def _request(self) -> dict[str, Any]:
        client = self._settings.ct_api_client
        # oauthlib accepts http:// URLs only if an environment variable allows them for the whole process.
        url = f"https://{self._settings.ct_token_url.partition('://')[2]}"
        with RefreshingOAuth2Session(client=BackendApplicationClient(client_id=client.client_id)) as session:
            session.mount(url, self._adapter)
            token: dict[str, Any] = session.fetch_token(
                url,
                client_id=client.client_id,
                client_secret=client.secret.get_secret_value(),
                # The scopes are not given to the session, which would raise an error for a token with fewer scopes.
                # None requests all scopes of the API client.
                scope=self._settings.ct_scope.split() or None,
            )
            return token


class _TokenAdapter(BaseAdapter):
    """An adapter that sends the requests of the requests library over the transport of all other requests.

    The transport follows no redirects and limits the size and the duration of a response. Only a token and OAuth's
    error document reach oauthlib, which would take anything else for refused credentials.
    """

    def __init__(self, transport: http.Transport, url: str) -> None:
        super().__init__()
        self._transport = transport
        self._url = url

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        """Send a request for a token. Raises Transient if the response is neither a token nor OAuth's error."""
        body = request.body.encode() if isinstance(request.body, str) else request.body
        try:
            received = self._transport.request(_ENDPOINT, "POST", self._url, dict(request.headers), body)
        except ResponseTooLarge as error:  # a smaller query does not make a token smaller
            raise Transient(f"no token from commercetools: {error}") from None
        http.raise_for_transient(received)
        if not _is_oauth(received):
            raise Transient(f"no token from commercetools: {received}")
        response = requests.Response()
        response.status_code = received.status
        response.headers = CaseInsensitiveDict(received.headers)
        response.raw = io.BytesIO(received.body)
        response.request = request
        response.url = self._url
        return response

    def close(self) -> None:
        """Do nothing: the transport keeps its connections for the next token."""


def _is_oauth(response: http.Response) -> bool:
    """Return whether a response is a token or OAuth's error document (RFC 6749, sections 5.1 and 5.2)."""
    document = as_dict(response.json())
    if response.status == HTTPStatus.OK:
        return bool(as_text(document.get("access_token")))
    error = as_text(document.get("error"))
    is_refusal = response.status in {HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
    return is_refusal and bool(error) and error not in _TRANSIENT_ERRORS
