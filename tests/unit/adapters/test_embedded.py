"""The embedded queue."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adapters import QueueError, open_queue
from adapters.base import Failure, Interruption, SupportsDeadLetters, SupportsPublish
from adapters.embedded.queue import EmbeddedQueue
from worker.commands.dlq.dead_letters import iter_dead_letters

if TYPE_CHECKING:
    from collections.abc import Callable

FAILURE = Failure("Klaviyo answered 503", "send", "Transient")


def bodies(queue: EmbeddedQueue, wait: float = 0.0) -> list[bytes]:
    return [delivery.body for delivery in queue.receive(100, wait)]


def test_messages_are_delivered_once_in_order(queue: EmbeddedQueue) -> None:
    """A received message is invisible to other workers, and an ack removes it."""
    assert queue.publish([b"one", b"", b"\xff\x00"]) == 3
    deliveries = queue.receive(2, 0)
    assert [(d.body, d.attempt) for d in deliveries] == [(b"one", 1), (b"", 1)]
    assert bodies(queue) == [b"\xff\x00"]
    queue.ack(deliveries)
    assert queue.backlog() == 1


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    """Messages contain personal data. SQLite's own files, which contain messages too, exist while the queue is open."""
    umask = os.umask(0o022)
    try:
        with closing(EmbeddedQueue(tmp_path / "new/folder/q.db")) as queue:
            queue.publish([b"x"])
            modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*")}
    finally:
        os.umask(umask)
    assert modes == {"folder": 0o700, "q.db": 0o600, "q.db-shm": 0o600, "q.db-wal": 0o600}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_link_to_nothing_is_not_followed(tmp_path: Path) -> None:
    """In a folder that others can write to, the file would be created where a link of theirs points."""
    (tmp_path / "q.db").symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(QueueError, match="cannot open"):
        EmbeddedQueue(tmp_path / "q.db")
    assert not (tmp_path / "elsewhere.db").exists()
    (tmp_path / "elsewhere.db").touch()  # the link of an operator
    EmbeddedQueue(tmp_path / "q.db").close()


def test_settled_message_leaves_nothing_in_the_file(tmp_path: Path) -> None:
    """Deleted rows are overwritten, whether the message was acked or its dead letter was dropped."""
    path = tmp_path / "q.db"
    with closing(EmbeddedQueue(path)) as queue:
        queue.publish([b"grete@mail.example " * 500] * 20)
        deliveries = queue.receive(20, 0)
        queue.ack(deliveries[:10])
        for delivery in deliveries[10:]:
            queue.dead_letter(delivery, FAILURE)
        with closing(queue.dead_letters()) as dead_letters:
            dead_letters.remove(dead_letters.receive(20, 0))
    assert b"grete" not in path.read_bytes()


def test_receive_from_empty_queue_waits_as_long_as_requested(queue: EmbeddedQueue) -> None:
    """`receive` returns after `wait` seconds."""
    started_at = time.monotonic()
    assert queue.receive(10, 0.1) == []
    assert 0.1 <= time.monotonic() - started_at < 1


def test_nacked_message_is_delayed_and_counts_attempts(queue: EmbeddedQueue) -> None:
    """Every delivery counts as an attempt."""
    queue.publish([b"x"])
    queue.nack(queue.receive(1, 0), delay=0.2, failure=FAILURE)
    assert queue.receive(1, 0) == []
    (again,) = queue.receive(1, 2)
    assert again.attempt == 2


def test_message_is_redelivered_after_its_lease(tmp_path: Path) -> None:
    """Settling the old delivery has no effect."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=0.1)
    queue.publish([b"x"])
    first = queue.receive(1, 0)
    (second,) = queue.receive(1, 2)
    assert second.attempt == 2
    queue.ack(first)
    queue.nack(first)
    queue.dead_letter(first[0], FAILURE)
    assert queue.backlog() == 1
    assert list(iter_dead_letters(queue)) == []
    queue.ack([second])
    assert queue.backlog() == 0


def test_extended_lease_lasts(tmp_path: Path) -> None:
    """Work that takes longer than the lease keeps its message."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=0.1)
    queue.publish([b"x"])
    held = queue.receive(1, 0)
    queue.extend(held, 30)
    assert queue.receive(1, 0.3) == []
    queue.ack(held)
    assert queue.backlog() == 0


def test_dead_letter_keeps_its_reason(queue: EmbeddedQueue) -> None:
    """The dead letter also has the body and the number of deliveries."""
    queue.publish([b"x"])
    queue.dead_letter(queue.receive(1, 0)[0], FAILURE)
    (dead_letter,) = iter_dead_letters(queue)
    assert (dead_letter.delivery.body, dead_letter.failure, dead_letter.delivery.attempt) == (b"x", FAILURE, 1)
    assert queue.backlog() == 0


def test_message_is_dead_lettered_after_its_last_attempt(queue: EmbeddedQueue) -> None:
    """The dead letter has the reason of the last failure."""
    queue.publish([b"x"])
    for _ in range(3):
        queue.nack(queue.receive(1, 0), failure=FAILURE)
    (dead_letter,) = iter_dead_letters(queue)
    assert dead_letter.failure == Failure("failed after 3 attempts: Klaviyo answered 503", "send", "Transient")
    assert queue.receive(1, 0) == []


def test_nack_without_failure_does_not_count_as_attempt(queue: EmbeddedQueue) -> None:
    """Shutdowns, dry runs and rejected credentials are not the message's fault."""
    queue.publish([b"x"])
    queue.nack(queue.receive(1, 0), failure=FAILURE)
    for _ in range(10):
        (delivery,) = queue.receive(1, 0)
        assert delivery.attempt == 2
        queue.nack([delivery])
    for _ in range(2):
        queue.nack(queue.receive(1, 0), failure=FAILURE)
    assert len(list(iter_dead_letters(queue))) == 1


def test_extension_of_a_lost_lease_has_no_effect(queue: EmbeddedQueue) -> None:
    """A worker that was paused must not keep a message from the others."""
    queue.publish([b"x"])
    (lost,) = queue.receive(1, 0)
    queue.nack([lost])
    queue.extend([lost], 600.0)
    (again,) = queue.receive(1, 0)
    queue.extend([lost], 0.0)
    assert queue.receive(1, 0) == []
    assert again.attempt == 1


def test_interruption_counts_as_attempt_and_keeps_its_delay(queue: EmbeddedQueue) -> None:
    """The next worker must see that another one possibly wrote a state, and not before a job has ended."""
    queue.publish([b"x"])
    queue.nack(queue.receive(1, 0), 600.0, Interruption("stopped", "send", "JobUnfinished"))
    assert queue.receive(1, 0) == []
    with closing(sqlite3.connect(queue._path, isolation_level=None)) as database:
        database.execute("UPDATE messages SET visible_at = 0")
    assert [delivery.attempt for delivery in queue.receive(1, 0)] == [2]


def test_dead_letter_of_the_policy_is_logged(queue: EmbeddedQueue, caplog: pytest.LogCaptureFixture) -> None:
    """The worker's own log line says `retried`, because it does not know the queue's policy."""
    queue.publish([b"x"])
    for _ in range(3):
        queue.nack(queue.receive(1, 0), failure=FAILURE)
    (record,) = caplog.records
    assert (record.message, record.levelname, vars(record)["message_id"]) == ("attempts_exhausted", "ERROR", "1")


def test_message_that_kills_its_workers_is_dead_lettered(tmp_path: Path) -> None:
    """No worker nacks it, so the end of its lease counts as an attempt."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=0.01, max_attempts=2)
    queue.publish([b"poison", b"good"])
    for _ in range(2):
        assert len(queue.receive(10, 1)) == 2
        time.sleep(0.02)
    assert queue.receive(10, 0) == []
    assert {dead_letter.failure.stage for dead_letter in iter_dead_letters(queue)} == {"queue"}


def test_messages_survive_the_process(tmp_path: Path) -> None:
    """The next process receives them."""
    queue = EmbeddedQueue(tmp_path / "q.db")
    queue.publish([b"x"])
    queue.close()
    queue.close()
    assert bodies(EmbeddedQueue(tmp_path / "q.db")) == [b"x"]


def _consume(path: str, done: str) -> None:
    queue = EmbeddedQueue(Path(path), lease_seconds=0.3, max_attempts=100)
    while deliveries := queue.receive(7, 1.0):
        with open(done, "ab") as file:  # noqa: PTH123
            file.writelines(delivery.body + b"\n" for delivery in deliveries)
        queue.ack(deliveries)


def test_no_message_is_lost_if_workers_are_killed(tmp_path: Path) -> None:
    """Processes are killed at random moments; every message is processed at least once."""
    path, done = str(tmp_path / "q.db"), tmp_path / "done"
    EmbeddedQueue(tmp_path / "q.db").publish(str(number).encode() for number in range(600))
    context = multiprocessing.get_context("spawn")
    for _ in range(3):
        workers = [context.Process(target=_consume, args=(path, str(done))) for _ in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.4)
        for worker in workers:
            assert worker.pid
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
    _consume(path, str(done))
    assert {int(line) for line in done.read_bytes().split()} == set(range(600))
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_publish_is_atomic(queue: EmbeddedQueue) -> None:
    """A publisher that fails before the end has published nothing, and can retry."""

    def breaking() -> object:
        yield b"one"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        queue.publish(breaking())  # type: ignore[arg-type]
    assert queue.backlog() == 0


def test_queue_supports_publish_and_dead_letters(queue: EmbeddedQueue) -> None:
    """The commands that need more than the basic contract find it."""
    assert isinstance(queue, SupportsPublish)
    assert isinstance(queue, SupportsDeadLetters)
    queue.check()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("embedded:///", "embedded:///path"),
        ("embedded:///tmp/q.db?lease=soon", "lease=SECONDS"),
        ("embedded:///tmp/q.db?lease=inf", "lease=SECONDS"),
        ("embedded:///tmp/q.db?lease=0", "embedded:///path"),
        ("embedded:///tmp/q.db?colour=red", "embedded:///path"),
        ("embedded:///proc/nowhere/q.db", "cannot open"),
        ("kafka://x", "embedded://"),
        ("queue.db", "no scheme"),
    ],
)
def test_invalid_url_error_has_the_expected_form(url: str, expected: str) -> None:
    """The error names QUEUE_URL."""
    with pytest.raises(QueueError, match="QUEUE_URL") as error:
        open_queue(url)
    assert expected in str(error.value)


def test_url_has_options_and_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default queue is below the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    queue = open_queue("embedded://~/deep/er/q.db?lease=5&max_attempts=2")
    assert (tmp_path / "deep/er/q.db").exists()
    assert queue.lease_seconds == 5


def test_invalid_file_is_a_queue_error(tmp_path: Path) -> None:
    """A file that is not a database causes no traceback."""
    (tmp_path / "q.db").write_bytes(b"no database" * 1000)
    with pytest.raises(QueueError, match="cannot open"):
        EmbeddedQueue(tmp_path / "q.db")


@pytest.mark.parametrize(
    "ask", [EmbeddedQueue.backlog, EmbeddedQueue.check, lambda queue: list(iter_dead_letters(queue))]
)
def test_sqlite_error_is_a_queue_error(ask: Callable[[EmbeddedQueue], object], queue: EmbeddedQueue) -> None:
    """The runner handles QueueError, not SQLite's own errors."""
    queue.close()
    with pytest.raises(QueueError):
        ask(queue)


def test_full_disk_is_named(queue: EmbeddedQueue) -> None:
    """SQLite rolls back by itself; the failing rollback is not reported."""
    queue._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(QueueError, match="database or disk is full"):
        queue.publish([b"x" * 1_000_000])


def test_temporary_files_are_not_needed(queue: EmbeddedQueue) -> None:
    """In a container with a read-only root, often only the queue's directory is writable."""
    in_memory = 2
    assert queue._db.execute("PRAGMA temp_store").fetchone() == (in_memory,)


def test_receive_limits_the_total_size(tmp_path: Path) -> None:
    """Flow control counts bytes only after `receive`, so large messages are received a few at a time."""
    queue = EmbeddedQueue(tmp_path / "queue.db")
    sizes = [1_000_000] * 5 + [9_000_000, 10, 10]
    queue.publish(b"x" * size for size in sizes)
    received = []
    while batch := queue.receive(100, 0):
        received.append([len(delivery.body) for delivery in batch])
    assert received == [sizes[:4], sizes[4:6], sizes[6:]]


@pytest.mark.parametrize("step", [-3600.0, 3600.0], ids=["set back", "set forward"])
def test_change_of_the_wall_clock_has_no_effect(
    step: float, queue: EmbeddedQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages become ready, and leases and delays end, as if the clock had not changed."""
    queue.publish([b"ready", b"delayed", b"leased"])
    deliveries = queue.receive(3, 0)
    queue.nack(deliveries[:1])
    queue.nack(deliveries[1:2], delay=60)
    wall_clock = time.time
    monkeypatch.setattr("adapters.embedded.queue.time.time", lambda: wall_clock() + step)
    assert [delivery.body for delivery in queue.receive(9, 0)] == [b"ready"]


def test_all_messages_are_ready_after_the_machine_boots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monotonic clock starts again, and no process survives that could hold a lease."""
    before = EmbeddedQueue(tmp_path / "q.db")
    before.publish([b"leased", b"delayed"])
    before.nack(before.receive(2, 0)[1:], delay=600)
    assert EmbeddedQueue(tmp_path / "q.db").receive(9, 0) == []  # another process of the same boot
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another\n")
    monkeypatch.setattr("adapters.embedded.database._BOOT_ID", boot_id)
    after = EmbeddedQueue(tmp_path / "q.db")
    assert [delivery.body for delivery in after.receive(9, 0)] == [b"leased", b"delayed"]
    assert EmbeddedQueue(tmp_path / "q.db").receive(9, 0) == []


def test_boot_is_known_on_systems_without_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the boot serves as its id."""
    now = {"time": 1_000_000.0, "monotonic": 500.0}
    monkeypatch.setattr("adapters.embedded.queue.time.time", lambda: now["time"])
    monkeypatch.setattr("adapters.embedded.queue.time.monotonic", lambda: now["monotonic"])
    monkeypatch.setattr("adapters.embedded.database._BOOT_ID", tmp_path / "missing")
    EmbeddedQueue(tmp_path / "q.db").publish([b"a"])
    EmbeddedQueue(tmp_path / "q.db").receive(1, 0)
    now |= {"time": 1_000_010.0, "monotonic": 510.0}
    assert EmbeddedQueue(tmp_path / "q.db").receive(1, 0) == []
    now |= {"time": 1_000_100.0, "monotonic": 1.0}
    assert len(EmbeddedQueue(tmp_path / "q.db").receive(1, 0)) == 1
