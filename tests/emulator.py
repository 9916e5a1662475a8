"""Google's Pub/Sub emulator, and a network in front of it that can fail."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.request
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1 import PublisherClient, SubscriberClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

if TYPE_CHECKING:
    from collections.abc import Sequence

PROJECT = "demo"


def missing() -> str:
    """Return why the emulator cannot run on this machine; "" when it can."""
    if shutil.which("java") is None:
        return "Google's Pub/Sub emulator needs Java"
    return "" if _jar() else "Google's Pub/Sub emulator is not installed: gcloud components install pubsub-emulator"


def _jar() -> Path | None:
    gcloud = shutil.which("gcloud")
    homes = [Path(gcloud).resolve().parents[1]] if gcloud else []
    found = [jar for home in homes for jar in home.glob("platform/pubsub-emulator/lib/cloud-pubsub-emulator-*-all.jar")]
    return found[0] if found else None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Emulator:
    """A process of its own; what it holds is gone when it ends."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ["java", "-Xmx256m", "-jar", str(_jar()), "--host=127.0.0.1", f"--port={self.port}"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://{self.host}", timeout=1).close()
            except OSError:
                assert time.monotonic() < deadline, "the emulator did not start"
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Subscription:
    """A topic, a subscription with policies, and a subscription that collects the dead letters."""

    def __init__(
        self,
        emulator: Emulator,
        *,
        name: str = "",
        attempts: int = 5,
        minimum_backoff: float = 1.0,
        bare: bool = False,
        push: str = "",
    ) -> None:
        self.emulator = emulator
        self.name = name or f"s{uuid.uuid4().hex[:8]}"
        channel = grpc.insecure_channel(emulator.host, [("grpc.max_receive_message_length", -1)])
        self.publisher = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        self.subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        self._policies: dict[str, Any] = (
            {} if bare else _policies(self._path("topics", "dead"), attempts, minimum_backoff)
        )
        if push:
            self._policies["push_config"] = {"push_endpoint": push}
        self.create()

    def create(self) -> None:
        """Create everything; also what an emulator that was restarted has forgotten."""
        for suffix in ("", "dead"):
            self.publisher.create_topic(request={"name": self._path("topics", suffix)})
        dead = {"name": self._path("subscriptions", "dead"), "topic": self._path("topics", "dead")}
        self.subscriber.create_subscription(request=dead)
        request = {"name": self.path, "topic": self._path("topics"), "ack_deadline_seconds": 60, **self._policies}
        self.subscriber.create_subscription(request=request)

    @property
    def path(self) -> str:
        return self._path("subscriptions")

    @property
    def url(self) -> str:
        return f"pubsub://{PROJECT}/{self.name}"

    def publish(self, *bodies: bytes, **attributes: str) -> None:
        for start in range(0, len(bodies), 500):
            messages = [{"data": body, "attributes": attributes} for body in bodies[start : start + 500]]
            self.publisher.publish(request={"topic": self._path("topics"), "messages": messages})

    def pull(self, wait: float = 2.0, *, dead: bool = False, at_most: int = 1000) -> list[Any]:
        """Take what is ready and acknowledge it."""
        path = self._path("subscriptions", "dead") if dead else self.path
        taken: list[Any] = []
        deadline = time.monotonic() + wait
        while len(taken) < at_most and (left := deadline - time.monotonic()) > 0:
            with suppress(Exception):
                request = {"subscription": path, "max_messages": at_most}
                batch = self.subscriber.pull(request=request, timeout=left, retry=None).received_messages
                if batch:
                    self.subscriber.acknowledge(subscription=path, ack_ids=[entry.ack_id for entry in batch])
                taken += batch
        return taken

    def dead_letters(self, at_least: int = 0, wait: float = 20.0) -> list[Any]:
        """Take the dead letters, waiting until there are so many."""
        letters: list[Any] = []
        deadline = time.monotonic() + wait
        while True:
            letters += self.pull(1.0, dead=True)
            if len(letters) >= at_least or time.monotonic() > deadline:
                return [letter.message for letter in letters]

    def _path(self, kind: str, suffix: str = "") -> str:
        return f"projects/{PROJECT}/{kind}/{self.name}{suffix and '-' + suffix}"


def _policies(dead_letter_topic: str, attempts: int, minimum_backoff: float) -> dict[str, Any]:
    return {
        "dead_letter_policy": {"dead_letter_topic": dead_letter_topic, "max_delivery_attempts": attempts},
        "retry_policy": {
            "minimum_backoff": Duration(nanos=round(minimum_backoff % 1 * 1e9), seconds=int(minimum_backoff)),
            "maximum_backoff": Duration(seconds=600),
        },
    }


@dataclass
class Network:
    """A TCP relay to `target` that can be taken down: links are cut and new ones refused."""

    target: tuple[str, int]

    def __post_init__(self) -> None:
        self.port = free_port()
        self._server: socket.socket | None = None
        self._links: set[socket.socket] = set()
        self._lock = Lock()
        self.up()

    def up(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port), reuse_port=True)
        Thread(target=self._accept, args=(self._server,), daemon=True).start()

    def down(self) -> None:
        assert self._server is not None
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            links, self._links = self._links, set()
        for link in links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                near = server.accept()[0]
                far = socket.create_connection(self.target)
            except OSError:
                return
            with self._lock:
                self._links |= {near, far}
            for pair in ((near, far), (far, near)):
                Thread(target=_relay, args=pair, daemon=True).start()


def _relay(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def bodies(messages: Sequence[Any]) -> list[bytes]:
    return [bytes(message.data) for message in messages]
