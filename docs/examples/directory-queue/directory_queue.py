"""A queue of files in a directory.

A message is a file. Its name holds the time when it is ready, the number of deliveries, and an id:
`0001764201600.000.1-KEY`. Workers lease a file by renaming it. Renaming is atomic, so only one of them succeeds.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from adapters import Delivery, Failure, QueueAdapter, QueueError, QueueOptions, QueueURLError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from adapters import QueueWarning

MAX_ATTEMPTS = 20
POLL_SECONDS = 0.05
_NAME = re.compile(r"\d{13}\.\d{3}\..+")  # other files are not messages


@dataclass(slots=True, eq=False)
class FileDelivery:
    """A leased file. `path` is its current name; after a lost lease, no file has that name."""

    id: str
    body: bytes = field(repr=False)
    attempt: int
    published_at: datetime
    path: Path
    attributes: Mapping[str, str] = field(default_factory=dict)


def open_url(url: str, options: QueueOptions) -> QueueAdapter:
    """Open `directory:///path`, which must exist. The entry point names this function."""
    del options  # flow control is the worker's task; every dead letter has its reason
    path = Path(unquote(urlsplit(url).path))
    if path == Path("/"):
        raise QueueURLError("QUEUE_URL is malformed", todo="expected directory:///path")
    return DirectoryQueue(path)


class DirectoryQueue:
    """Implements QueueAdapter and SupportsPublish."""

    def __init__(self, path: Path, lease_seconds: float = 60.0) -> None:
        self._path = path
        self._dead = path / "dead"
        self._lease_seconds = lease_seconds
        self._lock = Lock()  # an extension changes the path of a delivery that another thread may settle

    @property
    def lease_seconds(self) -> float:
        """Seconds that a received file stays leased."""
        return self._lease_seconds

    def publish(self, bodies: Iterable[bytes]) -> int:
        """Write a file per message, under a draft name first, so that no worker reads an incomplete file."""
        count = 0
        for count, body in enumerate(bodies, start=1):  # noqa: B007 - returned
            name = f"{time.time_ns()}-{uuid.uuid4().hex}"
            draft = self._path / f"draft-{name}"
            draft.write_bytes(body)
            draft.rename(self._path_of(time.time(), 0, name))
        return count

    def receive(self, max_messages: int, wait: float) -> Sequence[FileDelivery]:
        """Lease ready files, the oldest first."""
        deadline = time.monotonic() + wait
        while True:
            names = sorted(name for name in self._names() if _ready_at(name) <= time.time())
            deliveries = [leased for name in names[:max_messages] if (leased := self._lease(name))]
            remaining = deadline - time.monotonic()
            if deliveries or remaining <= 0:
                return deliveries
            time.sleep(min(POLL_SECONDS, remaining))

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Delete the files."""
        for delivery in _file_deliveries(deliveries):
            with self._lock, suppress(FileNotFoundError):
                delivery.path.unlink()

    def nack(self, deliveries: Sequence[Delivery], delay: float = 0.0, failure: Failure | None = None) -> None:
        """Make the files ready after `delay`. Without a failure the delivery does not count."""
        for delivery in _file_deliveries(deliveries):
            if failure is not None and delivery.attempt >= MAX_ATTEMPTS:
                self.dead_letter(delivery, failure)
            else:
                attempts = delivery.attempt if failure else delivery.attempt - 1
                self._rename(delivery, time.time() + delay, attempts)

    def dead_letter(self, delivery: Delivery, failure: Failure) -> bool:
        """Move the file into `dead`, and write its reason beside it."""
        self._dead.mkdir(exist_ok=True)
        for file in _file_deliveries([delivery]):
            with self._lock, suppress(FileNotFoundError):
                file.path.rename(self._dead / file.id)
                text = f"{failure.stage}: {failure.error}: {failure.reason}\n"
                (self._dead / f"{file.id}.reason").write_text(text, encoding="utf-8")
        return True

    def extend(self, deliveries: Sequence[Delivery], seconds: float) -> None:
        """Rename the files to the new end of their leases."""
        for delivery in _file_deliveries(deliveries):
            self._rename(delivery, time.time() + seconds, delivery.attempt)

    def backlog(self) -> int:
        """Count the files."""
        return len(self._names())

    def check(self) -> Sequence[QueueWarning]:
        """Raise QueueError unless the directory can be written."""
        if not os.access(self._path, os.R_OK | os.W_OK | os.X_OK):
            raise QueueError(f"QUEUE_URL: {self._path} is not a writable directory", todo="create it")
        return ()

    def stop(self) -> None:
        """Do nothing: `receive` returns all files that it leases."""

    def close(self) -> None:
        """Do nothing: no connection is open."""

    def _names(self) -> list[str]:
        return [path.name for path in self._path.iterdir() if _NAME.fullmatch(path.name)]

    def _path_of(self, ready_at: float, attempt: int, name: str) -> Path:
        return self._path / f"{round(ready_at * 1000):013}.{attempt:03}.{name}"

    def _lease(self, name: str) -> FileDelivery | None:
        """Lease a file; None if another worker was faster."""
        _, attempts, id_ = name.split(".", 2)
        attempt = int(attempts) + 1
        path = self._path_of(time.time() + self._lease_seconds, attempt, id_)
        try:
            (self._path / name).rename(path)
            published_at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            delivery = FileDelivery(id_, path.read_bytes(), attempt, published_at, path)
        except FileNotFoundError:
            return None
        if attempt > MAX_ATTEMPTS:  # the worker was killed each time
            self.dead_letter(
                delivery,
                Failure("was delivered the maximum number of times and never settled", "queue", "LeaseExpired"),
            )
            return None
        return delivery

    def _rename(self, delivery: FileDelivery, ready_at: float, attempt: int) -> None:
        with self._lock, suppress(FileNotFoundError):
            delivery.path = delivery.path.rename(self._path_of(ready_at, attempt, delivery.id))


def _file_deliveries(deliveries: Sequence[Delivery]) -> Iterator[FileDelivery]:
    return (delivery for delivery in deliveries if isinstance(delivery, FileDelivery))


def _ready_at(name: str) -> float:
    return int(name.partition(".")[0]) / 1000
