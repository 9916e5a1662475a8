"""The base of the clients: what the circuit breakers of a service know, and what a refusal concerns.

docs/decisions/0026-successes-and-refusals.md has the reasons.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING

from worker.errors import Disposition, EndpointRefused, NotForwarded, RequestBlocked, Transient, WorkerError
from worker.http.circuit_breaker import CircuitBreakers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from threading import Event

    from worker.errors import Misconfigured
    from worker.http.transport import Response, Transport
    from worker.settings import CommercetoolsSettings


class ServiceClient(ABC):
    """A client of commercetools or Klaviyo. Safe for many threads.

    One of `neutral_endpoints` accepts a neutral request if the service accepts the credentials, whichever scopes they
    have.
    """

    possessive: str  # of the service's name, for error texts
    url_setting: str  # the setting that names the service's URL

    def __init__(
        self,
        service: str,
        transport: Transport,
        neutral_endpoints: Sequence[str],
        settings: CommercetoolsSettings,
        stopping: Event,
    ) -> None:
        self._transport = transport
        self._breakers = CircuitBreakers(service, settings, stopping)
        self._neutral_endpoints = neutral_endpoints

    def outage_reason(self) -> str:
        """Return why a circuit is open, or "" if the service has no outage."""
        return self._breakers.outage_reason()

    def refusal_reason(self) -> str:
        """Return why the service refuses the worker as a whole, or "" if it does not."""
        return self._breakers.refusal_reason()

    def refused_endpoints(self) -> dict[str, str]:
        """Return the reason of each endpoint that refuses the worker, while the service accepts its credentials."""
        return self._breakers.refused_endpoints()

    def clock_offset(self) -> float:
        """Return how far the clock of the service is ahead of this machine's, in seconds; 0 if unknown."""
        return self._transport.clock.offset

    def answers(self) -> bool:
        """Return whether the service answers a neutral request. A refusal is an answer."""
        return any(map(self._answers, self._neutral_endpoints))

    @abstractmethod
    def _accepts(self, endpoint: str) -> bool:
        """Return whether the service does not refuse a neutral request to an endpoint. Raises WorkerError.

        A neutral request depends on no message and has no effect. Raises Transient if another response than the
        service's own arrives.
        """

    def _answers(self, endpoint: str) -> bool:
        try:
            self._accepts(endpoint)
        except Transient as error:
            return error.disposition is not Disposition.HOLD
        except WorkerError:
            pass
        return True

    def _foreign_response(self, response: Response) -> Transient:
        """Return the error for a response that is not the service's own. A redirect means that the URL is wrong."""
        is_redirect = HTTPStatus.MULTIPLE_CHOICES <= response.status < HTTPStatus.BAD_REQUEST
        todo = f"check {self.url_setting}" if is_redirect else ""
        return Transient(f"not {self.possessive} response: {response}", todo=todo)

    def _blocked_or_foreign(self, endpoint: str, response: Response) -> Transient:
        """Return the error for a response that is not the service's own. Raises Misconfigured.

        A firewall can refuse a single request because of its data. If the service itself answers a neutral request to
        the same endpoint, the request is blocked; otherwise the whole endpoint is unreachable.
        """
        error = self._foreign_response(response)
        if response.status < HTTPStatus.BAD_REQUEST:
            return error
        with suppress(Transient):
            if self._accepts(endpoint):
                return RequestBlocked(error.reason)
        return NotForwarded(error.reason)

    def _refusal(self, endpoint: str, error: Misconfigured, todo: str) -> WorkerError:
        """Return the error for a refused request: neutral requests show what is refused. Raises WorkerError.

        It is `error` if the whole service refuses the worker. `todo` is the advice if only the endpoint does.
        """
        if self._accepts(endpoint):
            return RequestBlocked(error.reason)
        if any(self._accepts(other) for other in self._neutral_endpoints if other != endpoint):
            return EndpointRefused(error.reason, todo=todo)
        return error
