"""The queues of the rows: a new one each time."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from adapters import Publisher, open_queue
from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.cloud.pubsub_v1 import PublisherClient, SubscriberClient

_CHUNK = 500  # messages; few enough to hold in memory, whatever their size
_PROJECT, _NAME = "bench", "messages"
_HOST = "PUBSUB_EMULATOR_HOST"


class Queue:
    """A queue by its URL; `environment` points a worker at it."""

    def __init__(self, url: str, environment: dict[str, str]) -> None:
        self.environment = {"QUEUE_URL": url, **environment}
        self._queue = open_queue(url)

    def publish(self, bodies: Iterable[bytes]) -> None:
        """Put messages into the queue."""
        bodies = iter(bodies)
        publisher = cast("Publisher", self._queue)
        while chunk := list(islice(bodies, _CHUNK)):
            publisher.publish(chunk)

    def close(self) -> None:
        """Let go of it."""
        self._queue.close()


@contextmanager
def embedded(directory: Path) -> Iterator[Queue]:
    """Make an embedded queue."""
    queue = Queue(f"embedded://{directory}/queue.db", {})
    yield queue
    queue.close()


def emulator_jar() -> Path | None:
    """Return Google's Pub/Sub emulator, where gcloud and Java are installed."""
    gcloud = shutil.which("gcloud")
    if gcloud is None or shutil.which("java") is None:
        return None
    lib = Path(gcloud).resolve().parents[1] / "platform/pubsub-emulator/lib"
    return next(lib.glob("cloud-pubsub-emulator-*-all.jar"), None)


@contextmanager
def pubsub(_: Path) -> Iterator[Queue]:
    """Start Google's emulator and make a topic and a subscription."""
    from google.cloud import pubsub_v1  # noqa: PLC0415 - costs memory and time that other rows do not need

    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
    command = ["java", "-jar", str(emulator_jar()), "--host=127.0.0.1", f"--port={host.partition(':')[2]}"]
    os.environ[_HOST] = host  # Google's clients look there
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(host)
            _create(pubsub_v1.PublisherClient(), pubsub_v1.SubscriberClient())
            queue = Queue(f"pubsub://{_PROJECT}/{_NAME}", {_HOST: host})
            yield queue
            queue.close()
        finally:
            process.kill()


def _create(publisher: PublisherClient, subscriber: SubscriberClient) -> None:
    """Make topic and subscription; with a dead-letter policy, as documented: else Pub/Sub counts no attempts."""
    topic, dead = (f"projects/{_PROJECT}/topics/{name}" for name in (_NAME, f"{_NAME}-dead"))
    publisher.create_topic(name=topic)
    publisher.create_topic(name=dead)
    request = {
        "name": f"projects/{_PROJECT}/subscriptions/{_NAME}",
        "topic": topic,
        "ack_deadline_seconds": 60,
        "dead_letter_policy": {"dead_letter_topic": dead, "max_delivery_attempts": 20},
    }
    subscriber.create_subscription(request=request)


def _wait(host: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://{host}", timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise BenchmarkError("the Pub/Sub emulator did not start") from None
            time.sleep(0.1)
        else:
            return


QUEUES = {"embedded": embedded, "pubsub": pubsub}
