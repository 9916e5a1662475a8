"""The queue of docs/examples, installed like another package's."""

from __future__ import annotations

import sys
import tempfile
import time
import tomllib
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapters import ENTRY_POINTS, QueueOptions, open_queue
from tests.rigs.base import Guarantees, StoredDeadLetter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from adapters import Delivery, QueueAdapter

EXAMPLE = Path(__file__).parents[2] / "docs/examples/directory-queue"


class Directory:
    """Implements Rig."""

    guarantees: ClassVar = Guarantees(
        in_order=True,
        lease_seconds=60.0,
        max_delay=float("inf"),
        unhandled_counts_as_attempt=False,
        dead_letter="always",
        keeps_last_reason=True,
        backlog="exact",
        max_message_bytes=100_000_000,
        any_bytes=True,
    )
    attempts = 20

    def __init__(self, server: str, directory: Path, *, kills: bool = False) -> None:
        self.lease_seconds = 2.0 if kills else 60.0
        self._path = directory / "messages"
        self._path.mkdir()
        self.environment = {"QUEUE_URL": f"directory://{self._path}", "PYTHONPATH": f"{server}:{EXAMPLE}"}
        self.missing_url = "directory:///nowhere"

    @staticmethod
    def missing() -> str:
        return ""

    @staticmethod
    @contextmanager
    def server() -> Iterator[str]:
        """Install the example's entry point as pip does; yield the directory."""
        project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        with tempfile.TemporaryDirectory() as site:
            about = Path(site) / f"directory_queue-{project['version']}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
            entries = [f"{name} = {value}" for name, value in project["entry-points"][ENTRY_POINTS].items()]
            (about / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *entries]))
            sys.path += [site, str(EXAMPLE)]
            try:
                yield site
            finally:
                sys.path.remove(site)
                sys.path.remove(str(EXAMPLE))

    def opener(self, **options: Any) -> Callable[[], QueueAdapter]:
        return partial(_open, self.environment["QUEUE_URL"], self.lease_seconds, options)

    def publish(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            path = self._path / f"draft-{time.time_ns()}"
            path.write_bytes(body)
            path.rename(self._path / f"{time.time_ns() // 1_000_000:013}.000.{path.name}")

    def is_empty(self) -> bool:
        return not self.unsettled()

    def dead_letters(self, at_least: int = 0) -> list[StoredDeadLetter]:
        dead = self._path / "dead"
        reasons = {path.stem: path.read_text(encoding="utf-8") for path in dead.glob("*.reason")}
        return [StoredDeadLetter((dead / name).read_bytes(), {"reason": reason}) for name, reason in reasons.items()]

    def unsettled(self) -> list[bytes]:
        return [path.read_bytes() for path in self._path.iterdir() if path.is_file()]

    def expire_leases_of_killed(self) -> None:
        """Do nothing, because the leases are short."""

    def expire_leases(self, deliveries: Sequence[Delivery]) -> None:
        time.sleep(self.lease_seconds)

    def close(self) -> None:
        """Do nothing: nothing is open."""


def _open(url: str, lease_seconds: float, options: dict[str, Any]) -> QueueAdapter:
    queue = open_queue(url, QueueOptions(**options))
    vars(queue)["_lease_seconds"] = lease_seconds
    return queue
