"""The access token for commercetools."""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING, Any

import requests
from commercetools.base_client import RefreshingOAuth2Session
from oauthlib.oauth2 import BackendApplicationClient, OAuth2Error
from requests.adapters import HTTPAdapter

from worker.errors import CommercetoolsMisconfigured, Transient
from worker.http import transport as http
from worker.http.connection_errors import connection_error
from worker.json_access import as_text

if TYPE_CHECKING:
    from worker.settings import CommercetoolsSettings

TOKEN_MARGIN = 300.0  # seconds; a token is replaced this long before it expires
_ENDPOINT = "oauth/token"
_ADVICE = {  # by OAuth's error code
    "invalid_client": "check CT_API_CLIENT, and that CT_AUTH_URL is in the region of the project",
    "invalid_scope": "check CT_SCOPE, and that CT_API_CLIENT belongs to the project CT_PROJECT_ID",
}
_DEFAULT_ADVICE = "check CT_API_CLIENT, CT_SCOPE and CT_AUTH_URL"


class AccessToken:
    """An access token that many threads share. One thread fetches it while the others wait."""

    def __init__(self, settings: CommercetoolsSettings, observe: http.Observe) -> None:
        self._settings = settings
        self._observe = observe
        self._lock = Lock()
        self._value = ""
        self._expires_at = 0.0  # monotonic seconds

    def get(self) -> str:
        """Return a valid token. Raises Transient and CommercetoolsMisconfigured."""
        with self._lock:
            if time.monotonic() >= self._expires_at:
                self._fetch()
            return self._value

    def replace(self, refused: str) -> str:
        """Return a token other than `refused`. Raises as `get` does."""
        with self._lock:
            if self._value == refused:  # otherwise another thread has already replaced it
                self._fetch()
            return self._value

    def _fetch(self) -> None:
        start = time.monotonic()
        try:
            token = self._request()
        except requests.RequestException as error:
            self._observe(_ENDPOINT, None, time.monotonic() - start)
            url = self._settings.ct_token_url
            raise connection_error(error, url, "no token from commercetools") from None
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
        scheme, _, address = self._settings.ct_token_url.partition("://")
        url = f"https://{address}"
        with RefreshingOAuth2Session(client=BackendApplicationClient(client_id=client.client_id)) as session:
            session.register_compliance_hook("access_token_response", self._check_response)
            if scheme == "http":
                session.mount(url, _PlainHTTPAdapter())
            token: dict[str, Any] = session.fetch_token(
                url,
                client_id=client.client_id,
                client_secret=client.secret.get_secret_value(),
                # The scopes are not given to the session, which would raise an error for a token with fewer scopes.
                # None requests all scopes of the API client.
                scope=self._settings.ct_scope.split() or None,
                timeout=(self._settings.connect_timeout, self._settings.read_timeout),
            )
            return token

    def _check_response(self, response: requests.Response) -> requests.Response:
        """Raise Transient for a transient status. oauthlib handles all other responses."""
        status = response.status_code
        self._observe(_ENDPOINT, status, response.elapsed.total_seconds())
        if http.is_transient(status):
            raise Transient(f"no token from commercetools: {status}", http.retry_after(response.headers))
        return response


class _PlainHTTPAdapter(HTTPAdapter):
    """A transport for the requests library that sends requests for https:// URLs over http://.

    The settings accept http:// URLs with loopback addresses. oauthlib accepts them only if an environment variable
    allows http:// for the whole process.
    """

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        """Send a request over http://."""
        request.url = f"http{(request.url or '').removeprefix('https')}"
        return super().send(request, *arguments, **options)
