"""The outside world of the workers: the queue, both services in the same process, and the content of the shop."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import orjson
import urllib3

from tests.model.simulation import START, Process, Simulation
from worker.sandbox.commercetools.api import CommercetoolsApi
from worker.sandbox.commercetools.api import error_document as commercetools_error
from worker.sandbox.commercetools.shop import Shop
from worker.sandbox.faults import Faults
from worker.sandbox.http import ApiRequest, ApiResponse
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.klaviyo.api import KlaviyoApi
from worker.sandbox.klaviyo.api import error_document as klaviyo_error
from worker.sandbox.klaviyo.jobs import BulkJob, BulkJobs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from adapters.base import Delivery, Failure, QueueWarning
    from worker.model import Json

LEASE = 60.0  # seconds
COMMERCETOOLS, KLAVIYO = "commercetools.example", "klaviyo.example"


@dataclass(frozen=True, slots=True)
class QueuedDelivery:
    """A message that is leased to a worker."""

    id: str
    body: bytes = field(repr=False)
    attempt: int
    published_at: datetime
    lease: int
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Entry:
    id: str
    body: bytes
    published_at: datetime
    visible_at: float  # monotonic seconds; the end of a lease or of a delay
    attempts: int = 0
    lease: int = 0


class Queue:
    """A queue in memory, with leases. It dead-letters no message by itself."""

    def __init__(self, simulation: Simulation, max_messages: int) -> None:
        self._simulation = simulation
        self._max_messages = max_messages  # per `receive`
        self._entries: dict[str, _Entry] = {}
        self._published = 0
        self._leases = 0
        self.dead_letters: list[tuple[bytes, Failure]] = []

    def publish(self, body: bytes, delay: float = 0.0) -> None:
        """Add a message. It is not delivered for `delay` seconds."""
        self._published += 1
        now = datetime.fromtimestamp(START + self._simulation.now, UTC)
        name = str(self._published)
        self._entries[name] = _Entry(name, body, now, self._simulation.now + delay)

    def adapter(self) -> QueueAdapter:
        """Return a connection of a worker."""
        return QueueAdapter(self, self._simulation)

    def ready(self) -> list[_Entry]:
        """Return the messages that can be delivered, in order."""
        now = self._simulation.now
        found = [entry for entry in self._entries.values() if entry.visible_at <= now]
        return sorted(found, key=lambda entry: entry.visible_at)

    def lease(self, max_messages: int) -> list[QueuedDelivery]:
        """Deliver messages."""
        self._leases += 1
        leased = self.ready()[: min(max_messages, self._max_messages)]
        for entry in leased:
            entry.attempts += 1
            entry.lease = self._leases
            entry.visible_at = self._simulation.now + LEASE
        return [QueuedDelivery(e.id, e.body, e.attempts, e.published_at, e.lease) for e in leased]

    def leased(self, deliveries: Sequence[Delivery]) -> list[_Entry]:
        """Return the messages of those deliveries whose lease has not been given to another worker."""
        entries = [(self._entries.get(delivery.id), delivery) for delivery in deliveries]
        return [
            entry
            for entry, delivery in entries
            if entry is not None and isinstance(delivery, QueuedDelivery) and entry.lease == delivery.lease
        ]

    def remove(self, entries: Sequence[_Entry]) -> None:
        """Remove messages."""
        for entry in entries:
            del self._entries[entry.id]

    def bodies(self) -> list[bytes]:
        """Return the messages that are not settled."""
        return [entry.body for entry in self._entries.values()]


class QueueAdapter:
    """The connection of a worker to the queue. Each call is an effect: a worker can be killed before and after it."""

    lease_seconds = LEASE

    def __init__(self, queue: Queue, simulation: Simulation) -> None:
        self._queue = queue
        self._simulation = simulation
        self._is_stopped = False

    def receive(self, max_messages: int, wait: float) -> Sequence[QueuedDelivery]:
        if not self._simulation.wait(lambda: bool(self._queue.ready()), wait):
            return ()
        self._simulation.pause()
        return self._queue.lease(max_messages)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self._simulation.pause()
        self._queue.remove(self._queue.leased(deliveries))

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        self._simulation.pause()
        for entry in self._queue.leased(deliveries):
            entry.lease = 0
            entry.attempts -= failure is None
            entry.visible_at = self._simulation.now + delay

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        self._simulation.pause()
        entries = self._queue.leased([delivery])
        self._queue.remove(entries)
        self._queue.dead_letters += [(entry.body, failure) for entry in entries]
        return True

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        for entry in self._queue.leased(deliveries):
            entry.visible_at = self._simulation.now + seconds

    def backlog(self) -> int:
        return len(self._queue.bodies())

    def check(self) -> Sequence[QueueWarning]:
        return ()

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


class Service:
    """A service: its emulator, and the faults that a test injects."""

    def __init__(self, handle: Callable[[ApiRequest], ApiResponse], error_document: Callable[[int], Any]) -> None:
        self.handle = handle
        self.error_document = error_document
        self.faults = Faults()


class Pool:
    """A urllib3.PoolManager of a worker whose requests reach the services without a network."""

    def __init__(self, world: World) -> None:
        self._world = world

    def connection_from_host(self, host: str, *_: object) -> ConnectionPool:
        return ConnectionPool(self._world, host)


class ConnectionPool:
    """The urllib3.HTTPConnectionPool of a service.

    The worker can be killed before a request has an effect, and before it reads the response.
    """

    def __init__(self, world: World, host: str) -> None:
        self._world = world
        self._host = host

    def urlopen(
        self, method: str, target: str, *, headers: Mapping[str, str], body: bytes | None = None, **_: object
    ) -> urllib3.HTTPResponse:
        parts = urlsplit(target)
        request = ApiRequest(
            method,
            parts.path,
            parse_qs(parts.query, keep_blank_values=True),
            {**headers, "Host": self._host, "X-Correlation-ID": "1"},
            body.encode() if isinstance(body, str) else body or b"",
            target,
        )
        service = self._world.klaviyo if self._host == KLAVIYO else self._world.commercetools
        self._world.simulation.pause()
        response = self._respond(service, request)
        self._world.simulation.pause()
        return response

    def _respond(self, service: Service, request: ApiRequest) -> urllib3.HTTPResponse:
        fault = service.faults.trigger(request)
        action = fault.action if fault else ""
        content: bytes | None = None
        if fault and action == "hang":
            self._world.simulation.wait(lambda: False, fault.seconds)
        elif fault and action == "respond":
            response = ApiResponse(fault.status, service.error_document(fault.status), fault.headers)
            content = fault.body
        elif action != "reset":
            response = service.handle(request)
        self._world.note(f"{request.method} {request.path} {fault or response.status}")
        if action in {"hang", "reset", "lose_response"}:
            raise urllib3.exceptions.ProtocolError("Connection aborted.", ConnectionResetError())
        if content is None:
            content = b"" if response.document is None else orjson.dumps(response.document)
        headers = {"Content-Type": "application/json"} if content else {}
        return urllib3.HTTPResponse(
            io.BytesIO(content), {**headers, **response.headers}, response.status, preload_content=False
        )


class Jobs(BulkJobs):
    """Klaviyo's bulk jobs. A job has its effect `duration` seconds after its start, whatever other jobs do."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(0.0)
        self._simulation = simulation
        self._process = Process("Klaviyo")
        self.duration = 0.0
        self.in_progress = 0
        self.ends_at = 0.0  # monotonic seconds; when the last job has ended

    def start(self, kind: str, entries: list[Json], work: Callable[[Json], object]) -> Json:
        self._seconds = self.duration
        return super().start(kind, entries, work)

    def _complete_later(self, job: BulkJob, entries: list[Json], work: Callable[[Json], object]) -> None:
        def complete() -> None:
            self._simulation.wait(lambda: False, seconds)
            self._complete(job, entries, work)
            self.in_progress -= 1

        seconds = self.duration
        self.in_progress += 1
        self.ends_at = max(self.ends_at, self._simulation.now + seconds)
        self._simulation.start(self._process, complete)


class LaggingShop(Shop):
    """A shop whose changes can be read only some time after they were made.

    A state that was read is never followed by an older one.
    """

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation
        self._states: dict[tuple[str, str], list[tuple[float, Json | None]]] = {}  # when each can be read

    def write(self, collection: str, resource_id: str, resource: Json | None, lag: float) -> None:
        """Set the state of a resource; None: it is gone. It can be read in `lag` seconds."""
        states = self._states.setdefault((collection, resource_id), [])
        readable_at = max([self._simulation.now + lag, *(moment for moment, _ in states[-1:])])
        states.append((readable_at, resource))

    def collection(self, path: str) -> dict[str, Json] | None:
        """Return the resources behind a path of the HTTP API as they can be read now, or None."""
        if super().collection(path) is None:
            return None
        found = {key: self._readable(states) for (name, key), states in self._states.items() if name == path}
        return {key: resource for key, resource in found.items() if resource is not None}

    def _readable(self, states: list[tuple[float, Json | None]]) -> Json | None:
        readable = [resource for moment, resource in states if moment <= self._simulation.now]
        return readable[-1] if readable else None


class World:
    """Everything outside the workers."""

    current: World

    def __init__(self, simulation: Simulation, bulk_repeats: str, max_messages: int) -> None:
        World.current = self
        self.simulation = simulation
        self.trace: list[str] = []
        self.shop = LaggingShop(simulation)
        self.account = Account(bulk_repeats)
        self.jobs = Jobs(simulation)
        commercetools = CommercetoolsApi(self.shop, token_lifetime=1_000_000_000)
        klaviyo = KlaviyoApi(self.account, rate_limits=0.0)
        klaviyo._jobs = self.jobs
        self.commercetools = Service(commercetools.handle, commercetools_error)
        self.klaviyo = Service(klaviyo.handle, klaviyo_error)
        self.queue = Queue(simulation, max_messages)

    def note(self, line: str) -> None:
        """Remember a line for the report of a failing history."""
        self.trace.append(f"{self.simulation.now:.1f} {line}")
