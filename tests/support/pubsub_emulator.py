"""Google's Pub/Sub emulator, and a network in front of it that can fail."""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1 import PublisherClient, PullRequest, StreamingPullResponse, SubscriberClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from tests.support.ports import free_port
from tests.support.requirements import require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROJECT = "demo"


def missing() -> str:
    """Return why the emulator cannot run, or ""."""
    if shutil.which("java") is None:
        return "Google's Pub/Sub emulator needs Java"
    return "" if _jar() else "Google's Pub/Sub emulator is not installed: gcloud components install pubsub-emulator"


def _jar() -> Path | None:
    gcloud = shutil.which("gcloud")
    homes = [Path(gcloud).resolve().parents[1]] if gcloud else []
    found = [jar for home in homes for jar in home.glob("platform/pubsub-emulator/lib/cloud-pubsub-emulator-*-all.jar")]
    return found[0] if found else None


class Emulator:
    """The emulator, started in a separate process, or already running on `port`. It keeps messages in memory."""

    def __init__(self, port: int = 0) -> None:
        require(missing())
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        if not port:
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
        assert self._process is not None, "the emulator was started by another process"
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
        minimum_backoff: float | None = 1.0,
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
        """Create the topics and subscriptions. Needed again after a restart of the emulator."""
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

    def push_to(self, endpoint: str) -> None:
        """Set the push endpoint."""
        request = {"subscription": self.path, "push_config": {"push_endpoint": endpoint}}
        self.subscriber.modify_push_config(request=request)

    def publish(self, *bodies: bytes, **attributes: str) -> None:
        for start in range(0, len(bodies), 500):
            messages = [{"data": body, "attributes": attributes} for body in bodies[start : start + 500]]
            self.publisher.publish(request={"topic": self._path("topics"), "messages": messages})

    def pull(self, wait: float = 2.0, *, dead: bool = False, max_messages: int = 1000) -> list[Any]:
        """Receive and acknowledge messages until there are `max_messages`, for up to `wait` seconds."""
        path = self._path("subscriptions", "dead") if dead else self.path
        pull: Any = self.subscriber.transport.pull
        taken: list[Any] = []
        deadline = time.monotonic() + wait
        while True:
            # A waiting pull ends with a timeout or with an error of the emulator. The client warns of a pull
            # that does not wait; its transport does not.
            request = PullRequest(subscription=path, max_messages=max_messages, return_immediately=True)
            batch = pull(request, timeout=60).received_messages
            if batch:
                self.subscriber.acknowledge(subscription=path, ack_ids=[entry.ack_id for entry in batch])
            taken += batch
            if len(taken) >= max_messages or time.monotonic() > deadline:
                return taken
            time.sleep(0 if batch else 0.05)

    def unacked(self) -> list[bytes]:
        """Receive all messages that were never acknowledged. Seeking to a snapshot ends their leases."""
        snapshot = self._path("snapshots")
        self.subscriber.create_snapshot(name=snapshot, subscription=self.path)
        self.subscriber.seek(request={"subscription": self.path, "snapshot": snapshot})
        return bodies([entry.message for entry in self.pull(1.0)])

    def dead_letters(self, at_least: int = 0, wait: float = 20.0) -> list[Any]:
        """Receive the dead letters, waiting until there are `at_least`."""
        entries: list[Any] = []
        deadline = time.monotonic() + wait
        while True:
            entries += self.pull(1.0, dead=True)
            if len(entries) >= at_least or time.monotonic() > deadline:
                return [entry.message for entry in entries]

    def _path(self, kind: str, suffix: str = "") -> str:
        return f"projects/{PROJECT}/{kind}/{self.name}{suffix and '-' + suffix}"


def _policies(dead_letter_topic: str, attempts: int, minimum_backoff: float | None) -> dict[str, Any]:
    dead_letter = {"dead_letter_topic": dead_letter_topic, "max_delivery_attempts": attempts}
    if minimum_backoff is None:
        return {"dead_letter_policy": dead_letter}
    minimum = Duration(nanos=round(minimum_backoff % 1 * 1e9), seconds=int(minimum_backoff))
    retry = {"minimum_backoff": minimum, "maximum_backoff": Duration(seconds=600)}
    return {"dead_letter_policy": dead_letter, "retry_policy": retry}


class Network(grpc.GenericRpcHandler):
    """A relay to the emulator that can be taken down: connections are closed, and new ones refused.

    It relays calls, not bytes. The emulator does not detect closed connections and would send half of all messages to
    them; the relay ends its streams instead.
    """

    def __init__(self, emulator: Emulator) -> None:
        self.port = free_port()
        self._channel = grpc.insecure_channel(emulator.host, [("grpc.max_receive_message_length", -1)])
        self._streams: list[tuple[grpc.ServicerContext, list[str]]] = []  # with the ack ids that they delivered
        self.up()

    def up(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(32))
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def down(self) -> None:
        self._server.stop(None).wait()

    def end_leases(self, subscription: Subscription) -> None:
        """End the leases of messages that were delivered over closed streams, as if they had expired."""
        closed = [stream for stream in self._streams if not stream[0].is_active()]
        self._streams = [stream for stream in self._streams if stream not in closed]
        lost = [ack_id for _, ack_ids in closed for ack_id in ack_ids]
        for start in range(0, len(lost), 500):
            batch = lost[start : start + 500]
            subscription.subscriber.modify_ack_deadline(
                subscription=subscription.path, ack_ids=batch, ack_deadline_seconds=0
            )

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        if details.method.endswith("/StreamingPull"):
            return grpc.stream_stream_rpc_method_handler(partial(self._stream, details.method))
        return grpc.unary_unary_rpc_method_handler(partial(self._call, details.method))

    def _call(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            upstream: Any = self._channel.unary_unary(method)
            return bytes(upstream(request, timeout=60))
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")
            raise

    def _stream(self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        context.add_callback(lambda: outgoing.put(None))
        Thread(target=_forward, args=(requests, outgoing), daemon=True).start()
        try:
            upstream: Any = self._channel.stream_stream(method)
            ack_ids: list[str] = []
            self._streams.append((context, ack_ids))
            for response in upstream(iter(outgoing.get, None)):
                ack_ids += [entry.ack_id for entry in StreamingPullResponse.deserialize(response).received_messages]
                yield response
        except grpc.RpcError as error:
            context.abort(error.code(), error.details() or "")


def _forward(requests: Iterator[bytes], outgoing: SimpleQueue[bytes | None]) -> None:
    with suppress(Exception):  # the connection was closed
        for request in requests:
            outgoing.put(request)
    outgoing.put(None)


def bodies(messages: Sequence[Any]) -> list[bytes]:
    return [bytes(message.data) for message in messages]
