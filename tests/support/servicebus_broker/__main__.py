"""The broker: speaks AMQP 1.0 on loopback, and executes commands from stdin: JSON lines with one response each.

It has no TLS, accepts every client, and keeps messages in memory. It has no sessions, transactions, deferral,
scheduling and time to live, because the tests do not use them. A lock can be shorter than Azure's five seconds.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections import Counter
from os import dup
from socket import socket
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from proton import (
    Condition,
    Connection,
    Delivery,
    Endpoint,
    Event,
    EventType,
    Handler,
    Link,
    Message,
    Terminus,
    int32,
    symbol,
)
from proton.reactor import ApplicationEvent, Container, EventInjector

from tests.support.servicebus_broker.encoding import split, unbatched
from tests.support.servicebus_broker.entities import Entity
from tests.support.servicebus_broker.requests import LOST, handle_request

WAITING_CONNECTIONS = 1024
TICK = 0.25  # seconds between two checks of the locks
NOT_FOUND = "amqp:not-found"
COMMAND = EventType("command")
MANAGEMENT = "/$management"


class Broker(Handler):  # type: ignore[misc]
    """All entities, and the links to them."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._entities: dict[str, Entity] = {}  # by address
        self._topics: dict[str, list[Entity]] = {}
        self._senders: list[Link] = []  # links that deliver messages
        self._connections: list[Connection] = []
        self._calls: Counter[str] = Counter()
        self._acceptor: Any = None
        self._container: Container = Container(self)

    def run(self) -> None:
        """Serve until standard input ends."""
        injector = EventInjector()
        self._container.selectable(injector)
        Thread(target=self._listen_to_commands, args=(injector,), daemon=True).start()
        self._container.run()

    def _listen_to_commands(self, injector: EventInjector) -> None:
        for line in sys.stdin:
            injector.trigger(ApplicationEvent(COMMAND, subject=json.loads(line)))
        injector.trigger(ApplicationEvent(COMMAND, subject={"do": "end"}))

    # Events of the reactor.

    def on_reactor_init(self, event: Event) -> None:
        self.up()
        self._container.schedule(TICK, self)
        _respond({"listening": self._port})

    def on_command(self, event: Any) -> None:
        command = dict(event.subject)
        action = getattr(self, command.pop("do"))
        _respond(action(**command) or {})

    def on_timer_task(self, event: Event) -> None:
        now = time.time()
        for entity in self._entities.values():
            entity.end_locks(now)
        self._deliver()
        self._container.schedule(TICK, self)

    def on_connection_bound(self, event: Event) -> None:
        sasl = event.transport.sasl()
        sasl.allow_insecure_mechs = True
        sasl.allowed_mechs("ANONYMOUS PLAIN")

    def on_connection_remote_open(self, event: Event) -> None:
        self._connections.append(event.connection)
        event.connection.open()

    def on_session_remote_open(self, event: Event) -> None:
        event.session.open()

    def on_session_remote_close(self, event: Event) -> None:
        event.session.close()

    def on_connection_remote_close(self, event: Event) -> None:
        self._forget(event.connection)
        event.connection.close()

    def on_transport_closed(self, event: Event) -> None:
        self._forget(event.connection)

    def on_link_remote_open(self, event: Event) -> None:
        link = event.link
        address = (link.remote_source if link.is_sender else link.remote_target).address or ""
        link.address = _path(address)
        link.source.copy(link.remote_source)
        link.target.copy(link.remote_target)
        link.snd_settle_mode, link.rcv_settle_mode = link.remote_snd_settle_mode, link.remote_rcv_settle_mode
        if link.address != "$cbs" and (refusal := self._refusal(link.address)):
            link.source.type = link.target.type = Terminus.UNSPECIFIED
            link.condition = Condition(refusal, f"The messaging entity '{address}' cannot be used.")
            link.open()
            link.close()
            return
        link.max_message_size = 1024 * 1024
        link.open()
        if link.is_receiver:
            link.flow(500)
        elif link.address in self._entities:
            self._senders.append(link)

    def on_link_remote_close(self, event: Event) -> None:
        if event.link in self._senders:
            self._senders.remove(event.link)
        if not event.link.state & Endpoint.LOCAL_CLOSED:
            event.link.close()

    on_link_remote_detach = on_link_remote_close

    def on_link_flow(self, event: Event) -> None:
        if event.link.is_sender:
            self._deliver()

    def on_delivery(self, event: Event) -> None:
        delivery, link = event.delivery, event.link
        if link.is_sender:
            if delivery.updated and delivery.remote_state:
                self._settle(delivery)
        elif delivery.readable and not delivery.partial:
            raw = link.recv(delivery.pending)
            link.advance()
            link.flow(1)
            delivery.update(Delivery.ACCEPTED)
            delivery.settle()
            if link.address == "$cbs" or link.address.endswith(MANAGEMENT):
                self._answer(link, raw)
            else:
                self._store(link.address, raw)

    # Commands of the tests.

    def create(self, name: str, lock: float, max_delivery: int, topic: str = "") -> None:
        """Create a queue, or a subscription of `topic`."""
        path = _path(f"{topic}/Subscriptions/{name}" if topic else name)
        entity = self._entities[path] = Entity(path, lock, max_delivery)
        if entity.dead is not None:
            self._entities[entity.dead.name] = entity.dead
        if topic:
            self._topics.setdefault(_path(topic), []).append(entity)

    def counts(self, name: str) -> dict[str, int]:
        """Count the messages of an entity: ready, locked, dead."""
        entity = self._entities[_path(name)]
        dead = entity.dead
        counts = {"ready": len(entity.ready), "locked": len(entity.locked)}
        return counts | {"dead": len(dead.ready) + len(dead.locked) if dead else 0}

    def dead_letter_ready(self, name: str, reason: str, description: str) -> None:
        """Dead-letter all ready messages."""
        entity = self._entities[_path(name)]
        while entity.ready:
            entity.dead_letter(entity.lock_next()[0], reason, description)

    def expire(self, name: str) -> None:
        """End all locks."""
        self._entities[_path(name)].end_locks(float("inf"))

    def refuse(self, name: str, condition: str) -> None:
        """Refuse access to an entity with this condition; "" grants it again."""
        self._entities[_path(name)].refusal = condition
        if condition:
            self.drop()

    def busy(self, name: str, requests: int) -> None:
        """Respond to the next `requests` requests that the server is busy."""
        self._entities[_path(name)].busy = requests

    def clock(self, name: str, ahead: float) -> None:
        """Set how many seconds the clock of an entity is ahead."""
        self._entities[_path(name)].ahead = ahead

    def drop(self) -> None:
        """Close all connections."""
        for connection in list(self._connections):
            self._forget(connection)
            if connection.transport is not None:
                connection.transport.close_head()
                connection.transport.close_tail()

    def down(self) -> None:
        """Close all connections and accept no new ones."""
        self._acceptor.close()
        self.drop()

    def up(self) -> None:
        """Accept connections.

        Proton lets 10 connections wait. The kernel drops the next one, its client tries again after a second, and the
        SDK waits no longer than that second.
        """
        self._acceptor = self._container.acceptor("127.0.0.1", self._port)
        with socket(fileno=dup(self._acceptor._selectable.fileno())) as listening:
            listening.listen(WAITING_CONNECTIONS)

    def calls(self) -> dict[str, int]:
        """Return the number of requests by operation."""
        return dict(self._calls)

    def end(self) -> None:
        """End the process."""
        sys.exit(0)

    # Access to the entities.

    def _refusal(self, address: str) -> str:
        entity = self._entities.get(address.removesuffix(MANAGEMENT))
        if entity is not None:
            return entity.refusal
        return "" if address.removesuffix(MANAGEMENT) in self._topics else NOT_FOUND

    def _forget(self, connection: Connection | None) -> None:
        self._senders = [link for link in self._senders if link.connection != connection]
        self._connections = [each for each in self._connections if each != connection]

    def _store(self, address: str, raw: bytes) -> None:
        for entity in self._topics.get(address) or [self._entities[address]]:
            for message in unbatched(raw):
                entity.put(split(message))
        self._deliver()

    def _deliver(self) -> None:
        """Send ready messages to the links with credit, in turns."""
        progress = True
        while progress:
            progress = False
            for link in list(self._senders):
                entity = self._entities[link.address]
                if link.credit > 0 and entity.ready and not entity.refusal:
                    self._send(link, entity)
                    self._senders.remove(link)
                    self._senders.append(link)
                    progress = True
        for link in self._senders:
            if link.drain_mode:
                link.drained()

    def _send(self, link: Link, entity: Entity) -> None:
        token, stored = entity.lock_next()
        delivery = link.delivery(token.bytes_le)
        delivery.token = token
        link.send(stored.encode(entity.ahead))
        link.advance()
        if link.remote_snd_settle_mode == Link.SND_SETTLED:  # receive and delete
            delivery.settle()
            entity.complete(token)

    def _settle(self, delivery: Delivery) -> None:
        entity, token = self._entities[delivery.link.address], delivery.token
        state = delivery.remote_state
        self._calls["disposition"] += 1
        if state == Delivery.ACCEPTED:
            is_locked = entity.complete(token)
        elif state == Delivery.REJECTED:
            about = {str(name): str(value) for name, value in (delivery.remote.condition.info or {}).items()}
            reason, description = about.get("DeadLetterReason", ""), about.get("DeadLetterErrorDescription", "")
            is_locked = entity.dead_letter(token, reason, description)
        elif state == Delivery.MODIFIED and delivery.remote.failed:
            is_locked = entity.abandon(token)
        else:
            is_locked = entity.release(token)
        if not delivery.settled:  # the client waits for the outcome
            if not is_locked:
                delivery.local.condition = Condition(LOST, "The lock supplied is invalid.")
            delivery.update(state if is_locked else Delivery.REJECTED)
        delivery.settle()
        self._deliver()

    # Requests.

    def _answer(self, link: Link, raw: bytes) -> None:
        request = Message()
        request.decode(raw)
        reply = Message(correlation_id=request.id, address=request.reply_to)
        if link.address == "$cbs":
            reply.properties = {"status-code": int32(202), "status-description": "Accepted"}
        else:
            operation = str((request.properties or {}).get("operation")).removeprefix("com.microsoft:")
            self._calls[operation] += 1
            entity = self._entities[link.address.removesuffix(MANAGEMENT)]
            status, body, condition = handle_request(entity, operation, request.body or {})
            reply.properties = {"statusCode": int32(status), "statusDescription": condition or "OK"}
            if condition:
                reply.properties["errorCondition"] = symbol(condition)
            reply.body = body
        back = link.session.connection.link_head(Endpoint.REMOTE_ACTIVE)
        while back is not None and not (back.is_sender and back.address == link.address):
            back = back.next(Endpoint.REMOTE_ACTIVE)
        if back is not None:
            answer = back.delivery(uuid.uuid4().bytes)
            back.send(reply.encode())
            back.advance()
            answer.settle()
        self._deliver()


def _path(address: str) -> str:
    """Return an address in the form that identifies entities: without the host, in lower case."""
    return (urlsplit(address).path if "://" in address else address).strip("/").lower()


def _respond(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    Broker(int(sys.argv[1])).run()
