"""`klaviyo-worker dlq`, run in this process unless the test kills it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol
from unittest.mock import Mock

import pytest
from click.testing import CliRunner, Result

from adapters import DeadLetter, Failure, SupportsDeadLetters, open_queue
from adapters.embedded.queue import EmbeddedQueue
from tests.acceptance.conftest import Worker
from tests.integration.conftest import settings_for
from tests.support.dead_letters import REFUSED, dead_letter_ids_at, make_dead_letters_at
from tests.support.verdicts import give_verdict
from worker.cli import main
from worker.commands.dlq import replay
from worker.commands.dlq.dead_letters import DeadLetterFilter
from worker.errors import ExitCode
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from worker.sandbox.http import ApiRequest, ApiResponse

    Position = tuple[float, int]
    Terminal = Callable[..., tuple[int, str]]

BULK, SINGLE = "/api/event-bulk-create-jobs", "/api/events"
EVENTS_EACH = 4  # per order with three lines
PERSONAL = b'{"email": "grete@example.com\x1b[2J"}'


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A shop with forty orders, and a Klaviyo that duplicates an event repeated in bulk."""
    with Sandbox(account=Account("duplicate"), copies=40) as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Return the functions that a signal would call."""
    stops: list[Callable[[], None]] = []
    monkeypatch.setattr(sys.modules["worker.cli.dlq_replay"], "on_signals", stops.append)
    return stops


class Dlq(Protocol):
    """A function that runs `klaviyo-worker dlq` with the arguments."""

    def __call__(self, *arguments: str, **environment: str) -> Result: ...


@pytest.fixture
def dlq(sandbox: Sandbox, path: Path, signals: object) -> Dlq:
    def run(*arguments: str, **environment: str) -> Result:
        variables = sandbox.environment | {"QUEUE_URL": f"embedded://{path}"} | environment
        result = CliRunner().invoke(main, ["dlq", *arguments], env=variables)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return run


def order(number: int) -> dict[str, Any]:
    return message("OrderCreated", "order", f"order-{number}")


def orders(sandbox: Sandbox) -> list[str]:
    """Return the orders that have each of their events in Klaviyo exactly once."""
    of_orders: dict[str, int] = {}
    for event in sandbox.account.events:
        number = (event["properties"].get("OrderId") or event["unique_id"]).split("-")[1]
        of_orders[number] = of_orders.get(number, 0) + 1
    return [number for number, events in of_orders.items() if events == EVENTS_EACH]


def calls(sandbox: Sandbox, path: str = SINGLE) -> int:
    return sum(request.path == path for request in sandbox.klaviyo.requests)


def words(text: str) -> str:
    return " ".join(text.split())


def test_replay_removes_dead_letters_that_were_sent(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """A dead letter that fails again stays, and its reason is printed. An ignored dead letter is removed."""
    ignored = message("OrderTeleported", "order", "order-9")
    ids = make_dead_letters_at(path, *map(order, range(1, 6)), ignored)
    sandbox.klaviyo.faults.add(Fault(400, times=None, match="POST", contains=b"order-3"))
    result = dlq("replay")
    assert result.exit_code == 1
    assert words(result.stdout).startswith(
        "replayed 4 sent to Klaviyo, removed ignored 1 nothing to send, removed failed again 1 still dead letters "
        "1 [send] Klaviyo answered 400 to POST /api/events"
    )
    assert result.stderr.endswith("Error: 1 dead letter failed again\n")
    assert dead_letter_ids_at(path) == [ids[2]]
    sandbox.klaviyo.faults.clear()
    assert dlq("replay").exit_code == 0
    assert sorted(orders(sandbox)) == ["1", "2", "3", "4", "5"]
    assert dead_letter_ids_at(path) == []


def test_replay_sends_nothing_of_another_project(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """Its dead letters came from a queue that staging shares."""
    make_dead_letters_at(path, order(1) | {"projectKey": "another-shop"}, order(2))
    assert dlq("replay").exit_code == 0
    assert orders(sandbox) == ["2"]
    assert dead_letter_ids_at(path) == []


def test_replay_does_not_duplicate_events(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """Events are sent individually, because this Klaviyo duplicates an event that is repeated in bulk."""
    for _ in range(2):
        make_dead_letters_at(path, *map(order, range(1, 31)))
        assert dlq("replay").exit_code == 0
    assert len(sandbox.account.events) == 30 * EVENTS_EACH
    assert (calls(sandbox, BULK), calls(sandbox)) == (0, 2 * 30 * EVENTS_EACH)


def test_replay_sends_in_bulk_if_the_account_ignores_repeats(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """Hundreds of dead letters then need a few requests."""
    give_verdict(sandbox.account)
    make_dead_letters_at(path, *map(order, range(1, 31)))
    assert dlq("replay").exit_code == 0
    assert calls(sandbox, BULK) > 0


def test_failed_canary_ends_the_replay(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """The error names the canary, its reason, and how to continue."""
    ids = make_dead_letters_at(path, *map(order, range(1, 31)))
    sandbox.klaviyo.faults.add(Fault(400, times=None, match="POST"))
    result = dlq("replay")
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert error == (
        "Error: the first dead letter failed again, so the others were not tried: "
        f"{ids[0]} OrderCreated order order-1: Klaviyo answered 400 to POST /api/events: Invalid input (invalid). "
        "Fix the cause, select others with --type, --reason or MESSAGE_ID, or try all with --no-canary"
    )
    assert calls(sandbox) == EVENTS_EACH
    assert dead_letter_ids_at(path) == ids
    assert dlq("replay", "--no-canary").exit_code == 1
    assert calls(sandbox) == (1 + 30) * EVENTS_EACH
    assert dlq("replay", ids[0]).stderr.endswith("Error: 1 dead letter failed again\n")  # without a canary


@pytest.mark.parametrize(("service", "code", "why"), [("commercetools", 4, "refuses"), ("klaviyo", 5, "answered 401")])
def test_rejected_credentials_end_the_replay(
    service: str, code: int, why: str, dlq: Dlq, path: Path, sandbox: Sandbox
) -> None:
    """The exit code and the message are those of `run`; nothing is lost."""
    ids = make_dead_letters_at(path, *map(order, range(1, 11)))
    getattr(sandbox, service).faults.add(Fault(401, times=None))
    result = dlq("replay", "--no-canary")
    assert result.exit_code == code
    assert why in result.stderr.splitlines()[-1]
    assert words(result.stdout) == "replayed 0 sent to Klaviyo, removed not finished 10 still dead letters"
    assert dead_letter_ids_at(path) == ids


def test_replay_ends_if_an_outage_lasts_too_long(
    dlq: Dlq, path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held messages are still dead letters."""
    monkeypatch.setattr(replay, "MAX_WAIT", 0.1)
    ids = make_dead_letters_at(path, *map(order, range(1, 5)))
    sandbox.klaviyo.faults.add(Fault(503, times=None))
    result = dlq("replay", "--retry-timeout", "0")
    assert result.exit_code == 1
    assert (
        result.stderr.splitlines()[-1]
        == "Error: the outage did not end in time: replay the remaining dead letters later"
    )
    assert dead_letter_ids_at(path) == ids


def test_replay_selects_dead_letters_by_id_and_by_filter(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """Several options are combined with AND; an unknown id is an error."""
    ids = make_dead_letters_at(path, order(1), order(2), failure=Failure("Timeout at noon", "send", "Rejected"))
    ids += make_dead_letters_at(path, order(3), order(4), b"[]")
    assert dlq("replay", "--reason", "timeout", "--since", "1h", "--limit", "1").exit_code == 0
    assert dlq("replay", "--type", "ordercreated", ids[1], ids[3], ids[4]).exit_code == 1
    assert sorted(orders(sandbox)) == ["1", "2", "4"]
    assert dead_letter_ids_at(path) == [ids[2], ids[4]]
    assert dlq("replay", "--since", "2100-01-01").stderr == "no dead letters to replay\n"
    missing = dlq("replay", ids[2], "4711", "x\x1b")
    assert missing.exit_code == 1
    assert missing.stderr.splitlines()[-1].startswith("Error: no dead letter 4711, x\\u001b: ")
    assert dead_letter_ids_at(path) == [ids[4]]


def test_dry_run_prints_requests_and_changes_nothing(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """Requests are on stdout, as `transform` prints them; everything else is on stderr."""
    ids = make_dead_letters_at(path, order(1), b"[]", order(2))
    result = dlq("replay", "--dry-run")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["operation"], line["path"]) for line in lines] == [("create_event", SINGLE)] * 2 * EVENTS_EACH
    assert "would be sent 2 failed again 1" in words(result.stderr)
    assert calls(sandbox) == 0
    assert dead_letter_ids_at(path) == ids


def test_interruption_finishes_the_messages_in_flight(
    dlq: Dlq, path: Path, sandbox: Sandbox, signals: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other message is sent. The same command continues the replay."""
    make_dead_letters_at(path, *map(order, range(1, 11)))
    waits_for_rate = Event()
    acquire = replay.ReplayRateLimiter.acquire

    def acquire_and_report(limiter: replay.ReplayRateLimiter) -> None:
        if sandbox.account.events:
            waits_for_rate.set()
        acquire(limiter)

    def interrupt() -> None:
        waits_for_rate.wait()
        signals[0]()

    monkeypatch.setattr(replay.ReplayRateLimiter, "acquire", acquire_and_report)
    interrupting = Thread(target=interrupt)
    interrupting.start()
    result = dlq("replay", "--rate", "0.001")
    interrupting.join()
    assert result.exit_code == ExitCode.INTERRUPTED
    interrupted = "Error: interrupted: the remaining dead letters are unchanged; run the same command to continue"
    assert result.stderr.splitlines()[-1] == interrupted
    assert len(dead_letter_ids_at(path)) == 10 - len(orders(sandbox))
    assert dlq("replay").exit_code == 0
    assert len(orders(sandbox)) == 10
    assert len(sandbox.account.events) == 10 * EVENTS_EACH


def test_killed_replay_loses_and_duplicates_nothing(dlq: Dlq, path: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    """After kill -9, every message is a dead letter, in Klaviyo, or both."""
    make_dead_letters_at(path, *map(order, range(1, 41)))
    sandbox.klaviyo.latency = 0.05
    process = Worker(sandbox.environment | {"QUEUE_URL": f"embedded://{path}"}, tmp_path).start("dlq", "replay")
    while len(sandbox.account.events) < 5 * EVENTS_EACH:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sandbox.klaviyo.latency = 0.0
    remaining = dead_letter_ids_at(path)
    assert 0 < len(remaining) < 40
    assert len(remaining) + len(orders(sandbox)) >= 40
    assert dlq("replay").exit_code == 0
    assert dead_letter_ids_at(path) == []
    assert len(orders(sandbox)) == 40
    assert len(sandbox.account.events) == 40 * EVENTS_EACH


def test_signal_while_the_queue_opens_ends_the_replay(
    dlq: Dlq, path: Path, signals: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreachable queue can take half a minute to fail."""

    def signal_while_opening(*_: object) -> None:
        signals[0]()

    def raise_system_exit(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("worker.cli.options.open_queue", signal_while_opening)
    monkeypatch.setattr(os, "_exit", raise_system_exit)
    assert dlq("replay").exit_code == ExitCode.INTERRUPTED


def test_second_signal_ends_the_replay_immediately(
    dlq: Dlq, path: Path, sandbox: Sandbox, signals: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message whose request hangs is still a dead letter; the exit code is 6."""
    ids = make_dead_letters_at(path, order(1), order(2))
    is_requested = Event()
    can_answer = Event()
    handle = sandbox.klaviyo.handle

    def hang(request: ApiRequest) -> ApiResponse:
        if request.method == "POST":
            is_requested.set()
            can_answer.wait()
        return handle(request)

    def interrupt() -> None:
        is_requested.wait()
        signals[0]()
        signals[0]()

    def raise_system_exit(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(sandbox.klaviyo, "handle", hang)
    monkeypatch.setattr(os, "_exit", raise_system_exit)
    interrupting = Thread(target=interrupt)
    interrupting.start()
    result = dlq("replay")
    assert result.exit_code == 6
    assert "the dead letters in flight are unchanged" in result.stderr
    assert dead_letter_ids_at(path) == ids
    can_answer.set()
    interrupting.join()


def test_two_concurrent_replays_do_not_duplicate_events(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """A worker can also run at the same time."""
    make_dead_letters_at(path, *map(order, range(1, 31)))
    settings = settings_for(sandbox, queue_url=f"embedded://{path}")

    def run() -> None:
        with closing(open_queue(settings.queue_url)) as queue:
            assert isinstance(queue, SupportsDeadLetters)
            replay.Replay(queue, settings, DeadLetterFilter(), replay.ReplayOptions()).run()

    other = Thread(target=run)
    other.start()
    run()
    other.join()
    assert dead_letter_ids_at(path) == []
    assert len(sandbox.account.events) == 30 * EVENTS_EACH


def test_list_prints_counts_and_then_the_oldest(dlq: Dlq, path: Path) -> None:
    """Counts are by type and reason, the most frequent first; the number of unlisted dead letters follows."""
    make_dead_letters_at(path, *map(order, range(1, 60)))
    make_dead_letters_at(path, b"[]", failure=Failure("found an array", "parse", "Rejected"))
    counts, _, lines = dlq("list").stdout.partition("\n\n")
    assert [words(line) for line in counts.splitlines()] == [
        "COUNT TYPE REASON",
        "59 OrderCreated [send] Klaviyo answered 400: invalid",
        "1 unreadable [parse] found an array",
    ]
    assert [line.split()[1] for line in lines.splitlines()] == [str(number) for number in range(1, 51)]
    assert dlq("list").stderr == "10 more: use --limit 60 to list all\n"
    assert len(dlq("list", "--limit", "60").stdout.splitlines()) == 3 + 1 + 60
    assert words(dlq("list", "--type", "unreadable").stdout).count("unreadable") == 2
    assert "59  OrderCreated" in dlq("list", "--limit", "1").stdout
    assert dlq("list", "--reason", "nonsense").stderr == "no dead letters\n"


def test_list_limits_the_rows_of_counts(dlq: Dlq, path: Path) -> None:
    """There can be as many reasons as dead letters."""
    for number in range(25):
        make_dead_letters_at(path, b"[]", failure=Failure(f"reason {number}", "parse", "Rejected"))
    counts, _, _ = dlq("list").stdout.partition("\n\n")
    assert len(counts.splitlines()) == 1 + 20 + 1
    assert counts.endswith("\n    5  of 5 other types and reasons")


def test_json_list_is_complete(dlq: Dlq, path: Path) -> None:
    """Scripts read it: one line per dead letter with these fields."""
    make_dead_letters_at(path, *map(order, range(1, 60)), b"[]")
    lines = [json.loads(line) for line in dlq("list", "--json").stdout.splitlines()]
    assert len(lines) == 60
    times = [line.pop("dead_lettered_at") for line in lines]
    assert times == sorted(times)
    resource = {"message_type": "OrderCreated", "resource_type": "order", "resource_id": "order-1"}
    failure = {"reason": REFUSED.reason, "stage": "send", "attempts": 1}
    assert lines[0] == {"message_id": "1"} | resource | failure
    assert lines[-1] == {"message_id": "60"} | dict.fromkeys(resource) | failure
    assert len(dlq("list", "--json", "--limit", "3").stdout.splitlines()) == 3


def test_output_contains_no_control_characters(dlq: Dlq, path: Path) -> None:
    """Types, reasons and bodies are untrusted input; only `show` prints a body, with a warning."""
    malicious = message("Order\x1b]0;x\x07\u009b2J\u202e", "order", "order-1")
    bodies = [PERSONAL, b"\xff\x1b[2J\x00", json.dumps(malicious).encode(), b'"' + b"x" * 1_000_000 + b'"']
    ids = make_dead_letters_at(path, *bodies, failure=Failure("because\x1b[2J\nof \u202e", "send", "Rejected"))
    outputs = [dlq("list"), dlq("list", "--json"), *(dlq("show", each) for each in ids)]
    for result in outputs:
        assert result.exit_code == 0
        assert all(char.isprintable() or char == "\n" for char in result.output)
    assert len(outputs[1].stdout.splitlines()) == len(ids)
    assert ["grete" in result.output for result in outputs] == [False, False, True, False, False, False]
    assert all("personal data" in result.stderr for result in outputs[2:])
    assert len(outputs[-1].stdout) > 1_000_000


def test_show_prints_one_dead_letter(dlq: Dlq, path: Path) -> None:
    """Only the body is on stdout, as indented JSON; an unknown id is an error."""
    (message_id,) = make_dead_letters_at(path, order(1))
    shown = dlq("show", message_id)
    assert (shown.stdout[0], json.loads(shown.stdout)) == ("{", order(1))
    details = dict(line.split(maxsplit=1) for line in shown.stderr.splitlines() if line)
    assert (details["message_id"], details["resource"], details["reason"]) == (
        message_id,
        "order order-1",
        REFUSED.reason,
    )
    assert (details["error"], details["attempts"]) == ("Rejected", "1")
    assert details["dead_lettered_at"] >= details["published_at"] > "2026"
    missing = dlq("show", "4711")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr == "Error: no dead letter 4711: `klaviyo-worker dlq list` shows the ids\n"


def test_drop_removes_selected_dead_letters(dlq: Dlq, path: Path) -> None:
    """The counts come first, then the number removed; an unknown id drops nothing."""
    ids = make_dead_letters_at(path, *map(order, range(1, 4)), *[b"[]"] * 250)
    result = dlq("drop", "--type", "unreadable", "--yes")
    assert result.exit_code == 0
    assert words(result.stdout).startswith("COUNT TYPE REASON 250 unreadable")
    assert result.stdout.endswith("dropped 250 dead letters\n")
    assert dead_letter_ids_at(path) == ids[:3]
    assert dlq("drop", ids[0], "4711", "--yes").exit_code == 1
    assert dead_letter_ids_at(path) == ids[:3]
    assert dlq("drop", ids[0], "--yes").stdout.endswith("dropped 1 dead letter\n")
    assert dlq("drop", "--all", "--limit", "1", "--yes").exit_code == 0
    assert dead_letter_ids_at(path) == ids[2:3]
    assert dlq("drop", "--since", "2100-01-01", "--yes").stderr == "no dead letters to drop\n"


def test_interrupted_list_has_its_own_exit_code(dlq: Dlq, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is in `klaviyo-worker --help`."""
    monkeypatch.setattr(EmbeddedQueue, "dead_letters_after", Mock(side_effect=KeyboardInterrupt))
    result = dlq("list")
    assert (result.exit_code, result.stderr) == (ExitCode.INTERRUPTED, "Error: interrupted\n")


def test_drop_removes_dead_letters_with_the_same_id(dlq: Dlq, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service Bus publisher can repeat an id. Dead letters that could not be leased again are reported."""
    make_dead_letters_at(path, b"[]", b"[]", b"[]")
    removed: list[str] = []
    dead_letters_after = EmbeddedQueue.dead_letters_after
    ids_per_read = [("1", "2", "1"), ("1", "2", "1"), ("1", "2", "1"), ("1", "2", "gone")]

    def with_repeated_ids(self: EmbeddedQueue, last: Position, limit: int) -> list[tuple[Position, DeadLetter]]:
        found = dead_letters_after(self, last, limit)
        ids = ids_per_read.pop(0) if found else ()
        return [
            (position, replace(dead_letter, delivery=replace(dead_letter.delivery, id=new_id)))  # type: ignore[type-var]
            for (position, dead_letter), new_id in zip(found, ids, strict=True)
        ]

    monkeypatch.setattr(EmbeddedQueue, "dead_letters_after", with_repeated_ids)
    monkeypatch.setattr(
        EmbeddedQueue, "delete_dead_letters", lambda _, deliveries: removed.extend(each.id for each in deliveries)
    )
    assert dlq("drop", "--all", "--yes").stdout.endswith("dropped 3 dead letters\n")
    assert removed == ["1", "2", "1"]
    short = dlq("drop", "--all", "--yes")
    assert (short.exit_code, short.stdout.splitlines()[-1]) == (1, "dropped 2 dead letters")
    expected = "1 dead letter not dropped, because another process has removed or leased them: try again"
    assert expected in short.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["drop", "--yes"], "expected MESSAGE_ID or an option"),
        (["drop", "--yes", "--limit", "3"], "expected MESSAGE_ID or an option"),
        (["drop", "--yes", "--all", "--type", "OrderCreated"], "expected MESSAGE_ID or an option"),
        (["drop", "--all"], "cannot ask for confirmation without a terminal: use --yes"),
        (["drop", "--all", "--yes", "--since", "yesterday"], "expected an age like"),
        (["replay", "--since", "yesterday"], "expected an age like"),
        (["replay", "--rate", "0"], "--rate"),
        (["replay", "--limit", "0"], "--limit"),
        (["list", "--limit", "x"], "--limit"),
        (["show"], "MESSAGE_ID"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], expected: str, dlq: Dlq, path: Path) -> None:
    """The message says what was expected; nothing is changed."""
    ids = make_dead_letters_at(path, order(1))
    result = dlq(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert dead_letter_ids_at(path) == ids


@pytest.mark.parametrize("command", [["list"], ["show", "1"], ["replay"], ["drop", "--all", "--yes"]])
def test_queue_without_dead_letters_is_exit_code_3(
    command: list[str], dlq: Dlq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For push://, the message names the URL to use instead."""
    pushed = dlq(*command, QUEUE_URL="push://0.0.0.0:8080")
    assert pushed.exit_code == 3
    assert "pubsub://PROJECT/SUBSCRIPTION" in pushed.stderr

    class Other:
        def close(self) -> None:
            """Do nothing."""

    monkeypatch.setattr("worker.cli.options.open_queue", lambda *_: Other())
    other = dlq(*command)
    assert (other.exit_code, other.stderr.count("\n")) == (3, 1)
    assert "cannot read the dead letters of this queue" in other.stderr


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox, path: Path, signals: object) -> Iterator[Terminal]:
    """Return a function that runs `klaviyo-worker dlq` on a terminal; it returns the exit code and the output."""
    controller, terminal_side = os.openpty()
    for name, value in (sandbox.environment | {"QUEUE_URL": f"embedded://{path}"}).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str, typed: str = "") -> tuple[int, str]:
        os.write(controller, typed.encode())
        with monkeypatch.context() as patched, ExitStack() as stack:
            for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
                patched.setattr(sys, name, stack.enter_context(os.fdopen(os.dup(terminal_side), mode)))
            with pytest.raises(SystemExit) as ended:
                main.main(["dlq", *arguments])
        return int(str(ended.value.code)), _read_all(controller)

    yield run
    os.close(controller)
    os.close(terminal_side)


def _read_all(terminal: int) -> str:
    """Return the output of a terminal up to now."""
    os.set_blocking(terminal, False)
    seen = b""
    with suppress(BlockingIOError):
        while True:
            seen += os.read(terminal, 4_096)
    return seen.decode()


def test_drop_asks_for_confirmation_on_a_terminal(terminal: Terminal, path: Path) -> None:
    """The counts come before the question; an empty answer means no."""
    ids = make_dead_letters_at(path, order(1), order(2))
    code, output = terminal("drop", ids[0], typed="\n")
    assert (code, "Drop 1 dead letter permanently? [y/N]" in output) == (1, True)
    assert dead_letter_ids_at(path) == ids
    code, output = terminal("drop", "--all", typed="y\n")
    assert (code, "dropped 2 dead letters" in output) == (0, True)
    assert dead_letter_ids_at(path) == []


def test_terminal_shows_progress_and_warnings_only(terminal: Terminal, path: Path, sandbox: Sandbox) -> None:
    """Lines per message would hide the bar; a warning appears above it."""
    make_dead_letters_at(path, *map(order, range(1, 21)))
    pointer = {"pointer": "/data/attributes/profile/data/attributes/email"}
    refusal = json.dumps({"errors": [{"code": "invalid", "title": "Invalid", "source": pointer}]}).encode()
    code, output = terminal("replay", "--type", "OrderCreated", "--limit", "5")
    assert (code, "0 of 5" in output) == (0, True)
    code, output = terminal("replay", "--type", "OrderImported")  # the number is unknown
    assert (code, "replaying 0  0.0/s" in output) == (0, True)
    sandbox.klaviyo.faults.add(Fault(400, body=refusal, contains=b"email"))
    code, output = terminal("replay")
    assert code == 0
    assert "0 of 15" in output
    assert "message_processed" not in output
    assert re.search(r"\r\x1b\[K[0-9:]+ identifier_dropped .*\n", output)
    assert words(output).endswith("replayed 15 sent to Klaviyo, removed")
