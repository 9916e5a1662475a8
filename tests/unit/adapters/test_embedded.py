"""The embedded queue."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adapters import QueueError, open_queue
from adapters.base import Failure, SupportsDeadLetters, SupportsPublish
from adapters.embedded import EmbeddedQueue
from worker.commands.dlq.dead_letters import iter_dead_letters

if TYPE_CHECKING:
    from collections.abc import Callable

FAILURE = Failure("Klaviyo answered 503", "send", "Transient")


def bodies(queue: EmbeddedQueue, wait: float = 0.0) -> list[bytes]:
    return [delivery.body for delivery in queue.receive(100, wait)]


def test_messages_come_out_in_order_and_once(queue: EmbeddedQueue) -> None:
    """A received message is invisible to others, and gone once acked."""
    assert queue.publish([b"one", b"", b"\xff\x00"]) == 3
    deliveries = queue.receive(2, 0)
    assert [(d.body, d.attempt) for d in deliveries] == [(b"one", 1), (b"", 1)]
    assert bodies(queue) == [b"\xff\x00"]
    queue.ack(deliveries)
    assert queue.backlog() == 1


def test_an_empty_queue_answers_in_time(queue: EmbeddedQueue) -> None:
    """Receive waits as long as it was told, and no longer."""
    began = time.monotonic()
    assert queue.receive(10, 0.1) == []
    assert 0.1 <= time.monotonic() - began < 1


def test_a_nacked_message_waits_and_counts_its_attempts(queue: EmbeddedQueue) -> None:
    """A delay is kept, and every delivery is an attempt."""
    queue.publish([b"x"])
    queue.nack(queue.receive(1, 0), delay=0.2, failure=FAILURE)
    assert queue.receive(1, 0) == []
    (again,) = queue.receive(1, 2)
    assert again.attempt == 2


def test_the_lease_ends_and_the_message_comes_again(tmp_path: Path) -> None:
    """A worker that died leaves its messages to the others; its late ack changes nothing."""
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


def test_an_extended_lease_holds(tmp_path: Path) -> None:
    """Work that takes longer than the lease keeps its message."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=0.1)
    queue.publish([b"x"])
    held = queue.receive(1, 0)
    queue.extend(held, 30)
    assert queue.receive(1, 0.3) == []
    queue.ack(held)
    assert queue.backlog() == 0


def test_a_dead_letter_keeps_its_reason(queue: EmbeddedQueue) -> None:
    """What was given up on can be looked at."""
    queue.publish([b"x"])
    queue.dead_letter(queue.receive(1, 0)[0], FAILURE)
    (letter,) = iter_dead_letters(queue)
    assert (letter.delivery.body, letter.failure, letter.delivery.attempt) == (b"x", FAILURE, 1)
    assert queue.backlog() == 0


def test_the_last_attempt_ends_in_the_dead_letters_with_the_last_reason(queue: EmbeddedQueue) -> None:
    """The queue's own policy gives up after max_attempts, and says why."""
    queue.publish([b"x"])
    for _ in range(3):
        queue.nack(queue.receive(1, 0), failure=FAILURE)
    (letter,) = iter_dead_letters(queue)
    assert letter.failure == Failure("failed after 3 attempts: Klaviyo answered 503", "send", "Transient")
    assert queue.receive(1, 0) == []


def test_a_message_returned_unhandled_has_spent_no_attempt(queue: EmbeddedQueue) -> None:
    """Shutdowns, dry runs and refused credentials are not the message's fault, however often they come."""
    queue.publish([b"x"])
    queue.nack(queue.receive(1, 0), failure=FAILURE)
    for _ in range(10):
        (delivery,) = queue.receive(1, 0)
        assert delivery.attempt == 2
        queue.nack([delivery])
    for _ in range(2):
        queue.nack(queue.receive(1, 0), failure=FAILURE)
    assert len(list(iter_dead_letters(queue))) == 1


def test_giving_up_is_logged(queue: EmbeddedQueue, caplog: pytest.LogCaptureFixture) -> None:
    """The worker's own line says `retried`: it cannot know that the queue had enough."""
    queue.publish([b"x"])
    for _ in range(3):
        queue.nack(queue.receive(1, 0), failure=FAILURE)
    (record,) = caplog.records
    assert (record.message, record.levelname, vars(record)["message_id"]) == ("queue_gave_up", "ERROR", "1")


def test_a_message_that_kills_its_workers_ends_in_the_dead_letters(tmp_path: Path) -> None:
    """Nobody nacks it, so the lease's end counts."""
    queue = EmbeddedQueue(tmp_path / "q.db", lease_seconds=0.01, max_attempts=2)
    queue.publish([b"poison", b"good"])
    for _ in range(2):
        assert len(queue.receive(10, 1)) == 2
        time.sleep(0.02)
    assert queue.receive(10, 0) == []
    assert {letter.failure.stage for letter in iter_dead_letters(queue)} == {"queue"}


def test_a_queue_survives_its_process(tmp_path: Path) -> None:
    """What was published is there for the next process."""
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


def test_nothing_is_lost_when_workers_are_killed(tmp_path: Path) -> None:
    """Three processes on one queue, killed at random moments: every message is handled at least once."""
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
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_publish_is_all_or_nothing(queue: EmbeddedQueue) -> None:
    """A publisher that fails half-way has published nothing, and may try again."""

    def breaking() -> object:
        yield b"one"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        queue.publish(breaking())  # type: ignore[arg-type]
    assert queue.backlog() == 0


def test_the_queue_can_be_published_to_and_has_dead_letters(queue: EmbeddedQueue) -> None:
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
def test_a_wrong_url_says_what_was_expected(url: str, expected: str) -> None:
    """The error names QUEUE_URL and the form it takes."""
    with pytest.raises(QueueError, match="QUEUE_URL") as error:
        open_queue(url)
    assert expected in str(error.value)


def test_options_and_home_directories_in_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default queue lives below the home directory; lease and attempts can be set."""
    monkeypatch.setenv("HOME", str(tmp_path))
    queue = open_queue("embedded://~/deep/er/q.db?lease=5&max_attempts=2")
    assert (tmp_path / "deep/er/q.db").exists()
    assert queue.lease_seconds == 5


def test_a_queue_that_breaks_says_so(tmp_path: Path) -> None:
    """A file that is no database is a QueueError, not a traceback."""
    (tmp_path / "q.db").write_bytes(b"no database" * 1000)
    with pytest.raises(QueueError, match="cannot open"):
        EmbeddedQueue(tmp_path / "q.db")


@pytest.mark.parametrize(
    "ask", [EmbeddedQueue.backlog, EmbeddedQueue.check, lambda queue: list(iter_dead_letters(queue))]
)
def test_a_queue_that_breaks_later_says_so_too(ask: Callable[[EmbeddedQueue], object], queue: EmbeddedQueue) -> None:
    """The runner knows QueueError, not SQLite's errors."""
    queue.close()
    with pytest.raises(QueueError):
        ask(queue)


def test_a_full_disk_is_named(queue: EmbeddedQueue) -> None:
    """SQLite rolls back by itself then; that there is nothing left to roll back is not the reason."""
    queue._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(QueueError, match="database or disk is full"):
        queue.publish([b"x" * 1_000_000])


def test_no_temporary_files_are_needed(queue: EmbeddedQueue) -> None:
    """In a container whose root is read-only the queue's directory may be all that can be written."""
    in_memory = 2
    assert queue._db.execute("PRAGMA temp_store").fetchone() == (in_memory,)


def test_no_more_is_handed_out_at_a_time_than_memory_is_meant_for(tmp_path: Path) -> None:
    """Flow control counts bytes once they are received: large messages come a few at a time, the largest alone."""
    queue = EmbeddedQueue(tmp_path / "queue.db")
    sizes = [1_000_000] * 5 + [9_000_000, 10, 10]
    queue.publish(b"x" * size for size in sizes)
    received = []
    while batch := queue.receive(100, 0):
        received.append([len(delivery.body) for delivery in batch])
    assert received == [sizes[:4], sizes[4:6], sizes[6:]]
