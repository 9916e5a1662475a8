"""Whatever the order of changes, messages, readings, writes and jobs, Klaviyo ends with the state of commercetools."""

from __future__ import annotations

import json
import time
from collections import deque
from typing import TYPE_CHECKING

from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.conftest import FakeDelivery
from worker.commercetools.queries import CUSTOMERS, InMemoryReader
from worker.enrich import Enricher
from worker.errors import JobUnfinished, Transient
from worker.mapping import MappingConfig
from worker.model import Json, OperationKind, SendResult
from worker.pipeline import Pipeline
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics
from worker.versions import READ_LAG

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from adapters.base import Delivery, Failure
    from worker.commercetools.queries import Query, QueryResult
    from worker.model import Message, Operation

STEPS = ("change", "repeat", "deliver", "lag", "job", "lost answer", "land", "fail", "restart")
MAX_DEPTH = 4  # of workers that process a message while another one is between two of its steps
MAX_ROUNDS = 200


class World:
    """commercetools with a customer, Klaviyo with a profile, a queue, and workers that are interrupted by steps.

    Before every reading and before every write, the next steps of the history happen. A step can be the processing of
    another message by another worker, which is interrupted in the same way.
    """

    def __init__(self, steps: Sequence[str]) -> None:
        self.steps = deque(steps)
        self.version = 1
        self.lag = 0  # how many changes the next reading does not show
        self.queue: deque[Delivery] = deque([_updated(1)])
        self.held: deque[tuple[Pipeline, Message]] = deque()
        self.profile: int | None = None  # the version that Klaviyo has
        self.jobs: deque[int] = deque()  # versions that started jobs will write
        self.next_write = ""
        self.depth = 0
        self.is_settling = False
        self.landed = 0

    def interrupt(self) -> None:
        """Take some steps of the history."""
        while self.steps:
            step = self.steps.popleft()
            if step == "go on":
                return
            self.take(step)

    def take(self, step: str) -> None:
        """Take one step."""
        if step == "change":
            self.version += 1
            self.queue.append(_updated(self.version))
        elif step == "repeat":
            self.queue.append(_updated(self.version))
        elif step == "deliver" and self.depth < MAX_DEPTH:
            self.deliver()
        elif step == "lag":
            self.lag = min(self.version, self.lag + 1)
        elif step in {"job", "lost answer", "fail"}:
            self.next_write = step
        elif step == "land" and self.jobs:
            self.profile = self.jobs.popleft()
            self.landed += 1
        elif step == "restart" and self.held:
            self.restart(*self.held.popleft())

    def restart(self, pipeline: Pipeline, message: Message) -> None:
        """Return a held message to the queue. The queue delays the message of a job."""
        if message.not_before > time.monotonic() and self.jobs:
            self.held.append((pipeline, message))
        else:
            self.queue.append(message.delivery)

    def deliver(self) -> None:
        """Let a worker process the next message: a new one, or the one that is held longest."""
        self.depth += 1
        try:
            if self.queue:
                worker = Worker(self)
                message = worker.pipeline.parse(self.queue.popleft())
                self.process(worker.pipeline, message)
            elif self.held:
                self.process(*self.held.popleft())
        finally:
            self.depth -= 1

    def process(self, pipeline: Pipeline, message: Message) -> None:
        """Process a message. No time passes before the end of the history, except that jobs land in their time."""
        if self.is_settling:
            message.received_at -= READ_LAG
        if not self.jobs:
            message.not_before = 0.0
        for held in pipeline.process([message]):
            self.held.append((pipeline, held))

    def settle(self) -> None:
        """Let commercetools catch up and the jobs land, and process all messages."""
        while self.steps:
            self.interrupt()
        self.lag, self.next_write, self.is_settling = 0, "", True
        while self.jobs:
            self.take("land")
        for _ in range(MAX_ROUNDS):
            if not self.queue and not self.held:
                return
            self.deliver()
        raise AssertionError("the messages are never acked")


class Worker:
    """A worker in a world: its queue, its reader and its send stage."""

    def __init__(self, world: World) -> None:
        self._world = world
        enricher = Enricher(self, MappingConfig())
        self.pipeline = Pipeline(self, enricher.enrich, self.send, MappingConfig(), Telemetry(Metrics("embedded")))  # type: ignore[arg-type]

    def find(self, query: Query, values: Collection[str]) -> QueryResult:
        assert query == CUSTOMERS
        world = self._world
        world.interrupt()
        shown = world.version - world.lag  # 0: not even the creation
        world.lag = 0
        return InMemoryReader({"customers": [_customer(shown)] if shown else []}).find(query, values)

    def send(self, operations: Sequence[Operation]) -> list[SendResult]:
        return [self._write(operation) for operation in operations]

    def _write(self, operation: Operation) -> SendResult:
        assert operation.kind is OperationKind.UPSERT_PROFILE
        world = self._world
        version = int((operation.resource or {})["attributes"]["first_name"])
        how, world.next_write = world.next_write, ""
        if how in {"job", "lost answer"}:
            world.jobs.append(version)
        if how == "lost answer":
            return SendResult(JobUnfinished("a job has possibly started", 600.0), 1)
        world.interrupt()
        if how == "job" and version in world.jobs:  # the worker does not wait longer
            return SendResult(JobUnfinished("a job has not ended yet", 600.0), 1)
        if how == "fail":
            return SendResult(Transient("503"), 1)
        world.profile = version if how != "job" else world.profile
        return SendResult(None, 1)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Forget the messages."""

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        raise AssertionError(failure.reason)


def _customer(version: int) -> Json:
    return {"id": "c", "version": version, "email": "ada@example.com", "firstName": str(version)}


def _updated(version: int) -> FakeDelivery:
    body: Json = {"notificationType": "ResourceUpdated", "resource": {"typeId": "customer", "id": "c"}}
    return FakeDelivery(json.dumps(body | {"version": version}).encode())


HISTORIES = st.lists(st.sampled_from(("go on", "go on", "change", "deliver", *STEPS)), min_size=20, max_size=80)


@settings(max_examples=30)
@given(HISTORIES)
def test_klaviyo_ends_with_the_state_of_commercetools(history: list[str]) -> None:
    """The history has updates, repeats, several workers, lagging readings, late jobs, lost answers and failures."""
    world = World(history)
    world.settle()
    event(f"{world.version} versions, {world.landed} late jobs")
    assert world.profile == world.version
