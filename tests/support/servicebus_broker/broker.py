"""Starts the broker and controls it: by commands, and by the SDK for publishers and operators."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from azure.servicebus import ServiceBusClient, ServiceBusMessage, ServiceBusReceiveMode, ServiceBusSubQueue

from tests.support.ports import free_port

if TYPE_CHECKING:
    from azure.servicebus import ServiceBusReceivedMessage, ServiceBusReceiver, ServiceBusSender
    from azure.servicebus.amqp import AmqpAnnotatedMessage


def missing() -> str:
    """Return why the broker cannot run, or ""."""
    if find_spec("proton") is not None:
        return ""
    return "the Service Bus broker needs python-qpid-proton, which needs a C compiler: pip install python-qpid-proton"


class Broker:
    """The broker, in a separate process. It keeps messages in memory."""

    def __init__(self) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "tests.support.servicebus_broker", str(self.port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._lock = Lock()
        self._answer()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def connection_string(self) -> str:
        key = "SharedAccessKeyName=tests;SharedAccessKey=c2VjcmV0"
        return f"Endpoint=sb://{self.host};{key};UseDevelopmentEmulator=true"

    def __call__(self, do: str, **fields: Any) -> dict[str, Any]:
        """Execute a command: a public method of the broker in __main__.py."""
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self._process.stdin.flush()
            return self._answer()

    def freeze(self) -> None:
        """Make the broker accept connections without responding."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


class Queue:
    """A queue on the broker, or a subscription of a topic."""

    def __init__(
        self, broker: Broker, *, lock: float = 30.0, attempts: int = 5, topic: str = "", name: str = ""
    ) -> None:
        self.broker = broker
        self.name = name or f"q{uuid.uuid4().hex[:8]}"
        self.topic = topic
        self._client = ServiceBusClient.from_connection_string(broker.connection_string)
        broker("create", name=self.name, topic=topic, lock=lock, max_delivery=attempts)

    @property
    def url(self) -> str:
        path = f"{self.topic}/{self.name}" if self.topic else self.name.replace("/", "%2F")
        return f"servicebus://{self.broker.host}/{path}"

    @property
    def address(self) -> str:
        return f"{self.topic}/Subscriptions/{self.name}" if self.topic else self.name

    def publish(self, *bodies: bytes | AmqpAnnotatedMessage, **properties: str | int) -> None:
        """Send messages. Bytes are sent in batches."""
        typed = dict[Any, Any](properties)
        plain = [ServiceBusMessage(body, application_properties=typed) for body in bodies if isinstance(body, bytes)]
        for start in range(0, len(plain), 100):
            self._sender.send_messages(plain[start : start + 100])
        for body in bodies:
            if not isinstance(body, bytes):
                self._sender.send_messages(body)

    @cached_property
    def _sender(self) -> ServiceBusSender:
        return self._client.get_topic_sender(self.topic) if self.topic else self._client.get_queue_sender(self.name)

    def close(self) -> None:
        """Close the connection."""
        _close(self._client)

    def counts(self) -> tuple[int, int, int]:
        """Count the ready, locked and dead messages."""
        counts = self.broker("counts", name=self.address)
        return counts["ready"], counts["locked"], counts["dead"]

    def wait_for(self, *, ready: int = 0, locked: int = 0, dead: int = 0, seconds: float = 60.0) -> None:
        """Wait until the counts are these."""
        deadline = time.monotonic() + seconds
        while self.counts() != (ready, locked, dead):
            assert time.monotonic() < deadline, f"ready, locked, dead: {self.counts()}"
            time.sleep(0.02)

    def read(self, *, dead: bool = False) -> list[ServiceBusReceivedMessage]:
        """Return all messages, locked or not."""
        receiver = self._receiver(dead)
        found: list[ServiceBusReceivedMessage] = []
        while more := receiver.peek_messages(250, sequence_number=1 + (found[-1].sequence_number or 0 if found else 0)):
            found += more
        _close(receiver)
        return found

    def dead_letters(self, number: int, wait: float = 10.0) -> list[ServiceBusReceivedMessage]:
        """Receive and delete `number` dead letters, or those that arrive within `wait` seconds."""
        receiver = self._receiver(dead=True)
        taken: list[ServiceBusReceivedMessage] = []
        deadline = time.monotonic() + wait
        while len(taken) < number and time.monotonic() < deadline:
            taken += receiver.receive_messages(number - len(taken), 0.5)
        _close(receiver)
        return taken

    def _receiver(self, dead: bool) -> ServiceBusReceiver:
        options: Any = {
            "receive_mode": ServiceBusReceiveMode.RECEIVE_AND_DELETE,
            "sub_queue": ServiceBusSubQueue.DEAD_LETTER if dead else None,
        }
        if self.topic:
            receiver = self._client.get_subscription_receiver(self.topic, self.name, **options)
        else:
            receiver = self._client.get_queue_receiver(self.name, **options)
        return receiver.__enter__()  # otherwise the timeout of the first call also limits the opening


def _close(link: ServiceBusClient | ServiceBusReceiver) -> None:
    """Close in the background: the SDK waits up to a second for a thread.

    A client also closes its receivers. The SDK raises AttributeError if both threads close one at the same time.
    """

    def closing() -> None:
        with suppress(AttributeError):
            link.close()

    Thread(target=closing, daemon=True).start()


def bodies(messages: list[ServiceBusReceivedMessage]) -> list[bytes]:
    return [b"".join(message.body) for message in messages]
