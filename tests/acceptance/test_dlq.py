"""`klaviyo-worker dlq`, as an operator meets it; in this process, but where a process has to die."""

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
from adapters.embedded import EmbeddedQueue
from tests.acceptance.conftest import Worker
from tests.integration.conftest import settings_for
from tests.support.dead_letters import REFUSED, bury_at, left_at
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

    from worker.sandbox.server import ApiRequest, ApiResponse

    Terminal = Callable[..., tuple[int, str]]

BULK, SINGLE = "/api/event-bulk-create-jobs", "/api/events"
EVENTS_EACH = 4  # of an order with three lines
PERSONAL = b'{"email": "grete@example.com\x1b[2J"}'


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A shop with forty orders, and a Klaviyo that doubles an event which is repeated in bulk."""
    with Sandbox(account=Account("duplicate"), copies=40) as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "queue.db"


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Return what a signal would call."""
    stops: list[Callable[[], None]] = []
    monkeypatch.setattr(sys.modules["worker.cli.dlq_replay"], "on_signals", stops.append)
    return stops


class Dlq(Protocol):
    """Runs `klaviyo-worker dlq` with these arguments."""

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
    """Return the orders whose events are all in Klaviyo, each once; any other event is an error."""
    of_orders: dict[str, int] = {}
    for event in sandbox.account.events:
        number = (event["properties"].get("OrderId") or event["unique_id"]).split("-")[1]
        of_orders[number] = of_orders.get(number, 0) + 1
    return [number for number, events in of_orders.items() if events == EVENTS_EACH]


def calls(sandbox: Sandbox, path: str = SINGLE) -> int:
    return sum(request.path == path for request in sandbox.klaviyo.requests)


def words(text: str) -> str:
    return " ".join(text.split())


def test_replay_removes_what_has_its_effect(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """What fails again stays and says why; what has nothing to do goes; neighbours do not mind."""
    ignored = message("OrderTeleported", "order", "order-9")
    made = bury_at(path, *map(order, range(1, 6)), ignored)
    sandbox.klaviyo.faults.add(Fault(400, times=None, match="POST", contains=b"order-3"))
    result = dlq("replay")
    assert result.exit_code == 1
    assert words(result.stdout).startswith(
        "replayed 4 sent to Klaviyo, removed ignored 1 nothing to send, removed failed again 1 still dead letters "
        "1 [send] Klaviyo answered 400 to POST /api/events"
    )
    assert result.stderr.endswith("Error: 1 dead letter failed again\n")
    assert left_at(path) == [made[2]]
    sandbox.klaviyo.faults.clear()
    assert dlq("replay").exit_code == 0
    assert sorted(orders(sandbox)) == ["1", "2", "3", "4", "5"]
    assert left_at(path) == []


def test_what_was_sent_before_is_not_doubled(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """No event goes in bulk, where this Klaviyo would double it: any may have been sent before."""
    for _ in range(2):
        bury_at(path, *map(order, range(1, 31)))
        assert dlq("replay").exit_code == 0
    assert len(sandbox.account.events) == 30 * EVENTS_EACH
    assert (calls(sandbox, BULK), calls(sandbox)) == (0, 2 * 30 * EVENTS_EACH)


def test_who_says_that_repeats_do_no_harm_is_believed(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """Three thousand letters are a minute's work then."""
    bury_at(path, *map(order, range(1, 31)))
    assert dlq("replay", "--bulk-events", "always").exit_code == 0
    assert calls(sandbox, BULK) > 0


def test_a_canary_that_fails_spares_the_others(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """It is named, with why it failed and how to go on."""
    made = bury_at(path, *map(order, range(1, 31)))
    sandbox.klaviyo.faults.add(Fault(400, times=None, match="POST"))
    result = dlq("replay")
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    start = "Error: the first dead letter failed again, so the others were not tried: "
    assert error.startswith(f"{start}{made[0]} OrderCreated order order-1: Klaviyo answered 400")
    assert all(flag in error for flag in ("--type", "--reason", "--no-canary"))
    assert calls(sandbox) == EVENTS_EACH
    assert left_at(path) == made
    assert dlq("replay", "--no-canary").exit_code == 1
    assert calls(sandbox) == (1 + 30) * EVENTS_EACH
    assert dlq("replay", made[0]).stderr.endswith("Error: 1 dead letter failed again\n")  # there was no other


@pytest.mark.parametrize(("service", "code", "why"), [("commercetools", 4, "refuses"), ("klaviyo", 5, "answered 401")])
def test_refused_credentials_end_it_at_once(
    service: str, code: int, why: str, dlq: Dlq, path: Path, sandbox: Sandbox
) -> None:
    """With the worker's exit code and sentence; nothing is lost."""
    made = bury_at(path, *map(order, range(1, 11)))
    getattr(sandbox, service).faults.add(Fault(401, times=None))
    result = dlq("replay", "--no-canary")
    assert result.exit_code == code
    assert why in result.stderr.splitlines()[-1]
    assert words(result.stdout) == "replayed 0 sent to Klaviyo, removed not finished 10 still dead letters"
    assert left_at(path) == made


def test_an_outage_is_not_waited_for_without_end(
    dlq: Dlq, path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it kept waiting is a dead letter still."""
    monkeypatch.setattr(replay, "MAX_WAIT", 0.1)
    made = bury_at(path, *map(order, range(1, 5)))
    sandbox.klaviyo.faults.add(Fault(503, times=None))
    result = dlq("replay", "--retry-timeout", "0")
    assert result.exit_code == 1
    assert (
        result.stderr.splitlines()[-1]
        == "Error: the outage did not end in time: replay the remaining dead letters later"
    )
    assert left_at(path) == made


def test_letters_are_chosen_by_name_and_by_what_they_are(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """Together the options mean less, not more; a name that is none is an error."""
    made = bury_at(path, order(1), order(2), failure=Failure("Timeout at noon", "send", "Rejected"))
    made += bury_at(path, order(3), order(4), b"[]")
    assert dlq("replay", "--reason", "timeout", "--since", "1h", "--limit", "1").exit_code == 0
    assert dlq("replay", "--type", "ordercreated", made[1], made[3], made[4]).exit_code == 1
    assert sorted(orders(sandbox)) == ["1", "2", "4"]
    assert left_at(path) == [made[2], made[4]]
    assert dlq("replay", "--since", "2100-01-01").stderr == "no dead letters to replay\n"
    missing = dlq("replay", made[2], "4711", "x\x1b")
    assert missing.exit_code == 1
    assert missing.stderr.splitlines()[-1].startswith("Error: no dead letter 4711, x\\u001b: ")
    assert left_at(path) == [made[4]]


def test_a_dry_run_prints_requests_and_does_nothing(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """As `transform` prints them: data on stdout, all else on stderr."""
    made = bury_at(path, order(1), b"[]", order(2))
    result = dlq("replay", "--dry-run")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["operation"], line["path"]) for line in lines] == [("create_event", SINGLE)] * 2 * EVENTS_EACH
    assert "would be sent 2 failed again 1" in words(result.stderr)
    assert calls(sandbox) == 0
    assert left_at(path) == made


def test_an_interruption_finishes_what_is_in_flight(
    dlq: Dlq, path: Path, sandbox: Sandbox, signals: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else, however long the next would take; the same command goes on."""
    bury_at(path, *map(order, range(1, 11)))
    waits_for_its_turn = Event()
    turn = replay.ReplayRateLimiter.acquire

    def noted(pace: replay.ReplayRateLimiter) -> None:
        if sandbox.account.events:
            waits_for_its_turn.set()
        turn(pace)

    def interrupt() -> None:
        waits_for_its_turn.wait()
        signals[0]()

    monkeypatch.setattr(replay.ReplayRateLimiter, "acquire", noted)
    interrupting = Thread(target=interrupt)
    interrupting.start()
    result = dlq("replay", "--rate", "0.001")
    interrupting.join()
    assert result.exit_code == ExitCode.INTERRUPTED
    assert result.stderr.splitlines()[-1].startswith("Error: interrupted: the remaining dead letters are unchanged")
    assert len(left_at(path)) == 10 - len(orders(sandbox))
    assert dlq("replay").exit_code == 0
    assert len(orders(sandbox)) == 10
    assert len(sandbox.account.events) == 10 * EVENTS_EACH


def test_a_replay_that_is_killed_loses_and_doubles_nothing(
    dlq: Dlq, path: Path, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Kill -9 in the middle: every letter is a dead letter still, or in Klaviyo, or both."""
    bury_at(path, *map(order, range(1, 41)))
    sandbox.klaviyo.latency = 0.05
    process = Worker(sandbox.environment | {"QUEUE_URL": f"embedded://{path}"}, tmp_path).start("dlq", "replay")
    while len(sandbox.account.events) < 5 * EVENTS_EACH:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sandbox.klaviyo.latency = 0.0
    left = left_at(path)
    assert 0 < len(left) < 40
    assert len(left) + len(orders(sandbox)) >= 40
    assert dlq("replay").exit_code == 0
    assert left_at(path) == []
    assert len(orders(sandbox)) == 40
    assert len(sandbox.account.events) == 40 * EVENTS_EACH


def test_a_signal_before_anything_has_begun_ends_it_at_once(
    dlq: Dlq, path: Path, signals: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A queue out of reach may take half a minute to say so."""

    def opening(*_: object) -> None:
        signals[0]()

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("worker.cli.options.open_queue", opening)
    monkeypatch.setattr(os, "_exit", ended)
    assert dlq("replay").exit_code == ExitCode.INTERRUPTED


def test_a_second_signal_does_not_wait(
    dlq: Dlq, path: Path, sandbox: Sandbox, signals: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hangs stays a dead letter; exit code 6 says that the grace was not enough."""
    made = bury_at(path, order(1), order(2))
    asked = Event()
    answered = Event()
    handle = sandbox.klaviyo.handle

    def hang(request: ApiRequest) -> ApiResponse:
        asked.set()
        answered.wait()
        return handle(request)

    def interrupt() -> None:
        asked.wait()
        signals[0]()
        signals[0]()

    def ended(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(sandbox.klaviyo, "handle", hang)
    monkeypatch.setattr(os, "_exit", ended)
    interrupting = Thread(target=interrupt)
    interrupting.start()
    result = dlq("replay")
    assert result.exit_code == 6
    assert "the dead letters in flight are unchanged" in result.stderr
    assert left_at(path) == made
    answered.set()
    interrupting.join()


def test_two_replays_at_once_do_no_harm(dlq: Dlq, path: Path, sandbox: Sandbox) -> None:
    """A worker may run beside them too."""
    bury_at(path, *map(order, range(1, 31)))
    settings = settings_for(sandbox, queue_url=f"embedded://{path}")

    def run() -> None:
        with closing(open_queue(settings.queue_url)) as queue:
            assert isinstance(queue, SupportsDeadLetters)
            replay.Replay(queue, settings, DeadLetterFilter(), replay.ReplayOptions()).run()

    other = Thread(target=run)
    other.start()
    run()
    other.join()
    assert left_at(path) == []
    assert len(sandbox.account.events) == 30 * EVENTS_EACH


def test_list_counts_first_and_lists_the_oldest(dlq: Dlq, path: Path) -> None:
    """By type and reason, the most first; then so many letters, and how many more there are."""
    bury_at(path, *map(order, range(1, 60)))
    bury_at(path, b"[]", failure=Failure("found an array", "parse", "Rejected"))
    counts, _, letters = dlq("list").stdout.partition("\n\n")
    assert [words(line) for line in counts.splitlines()] == [
        "COUNT TYPE REASON",
        "59 OrderCreated [send] Klaviyo answered 400: invalid",
        "1 unreadable [parse] found an array",
    ]
    assert [line.split()[1] for line in letters.splitlines()] == [str(number) for number in range(1, 51)]
    assert dlq("list").stderr == "10 more: use --limit 60 to list all\n"
    assert len(dlq("list", "--limit", "60").stdout.splitlines()) == 3 + 1 + 60
    assert words(dlq("list", "--type", "unreadable").stdout).count("unreadable") == 2
    assert "59  OrderCreated" in dlq("list", "--limit", "1").stdout
    assert dlq("list", "--reason", "nonsense").stderr == "no dead letters\n"


def test_list_counts_no_more_kinds_than_fit_a_screen(dlq: Dlq, path: Path) -> None:
    """Reasons may be as many as there are letters."""
    for number in range(25):
        bury_at(path, b"[]", failure=Failure(f"reason {number}", "parse", "Rejected"))
    counts, _, _ = dlq("list").stdout.partition("\n\n")
    assert len(counts.splitlines()) == 1 + 20 + 1
    assert counts.endswith("\n    5  of 5 other types and reasons")


def test_the_json_list_is_complete_and_keeps_its_form(dlq: Dlq, path: Path) -> None:
    """Scripts read it: a line per letter, all of them, these fields."""
    bury_at(path, *map(order, range(1, 60)), b"[]")
    lines = [json.loads(line) for line in dlq("list", "--json").stdout.splitlines()]
    assert len(lines) == 60
    when = [line.pop("dead_lettered_at") for line in lines]
    assert when == sorted(when)
    about = {"message_type": "OrderCreated", "resource_type": "order", "resource_id": "order-1"}
    why = {"reason": REFUSED.reason, "stage": "send", "attempts": 1}
    assert lines[0] == {"message_id": "1"} | about | why
    assert lines[-1] == {"message_id": "60"} | dict.fromkeys(about) | why
    assert len(dlq("list", "--json", "--limit", "3").stdout.splitlines()) == 3


def test_hostile_letters_cannot_steer_the_terminal(dlq: Dlq, path: Path) -> None:
    """Types, reasons and bodies are anybody's input; only `show` prints a body, and says what that means."""
    steering = message("Order\x1b]0;x\x07\u009b2J\u202e", "order", "order-1")
    hostile = [PERSONAL, b"\xff\x1b[2J\x00", json.dumps(steering).encode(), b'"' + b"x" * 1_000_000 + b'"']
    made = bury_at(path, *hostile, failure=Failure("because\x1b[2J\nof \u202e", "send", "Rejected"))
    outputs = [dlq("list"), dlq("list", "--json"), *(dlq("show", each) for each in made)]
    for result in outputs:
        assert result.exit_code == 0
        assert all(char.isprintable() or char == "\n" for char in result.output)
    assert len(outputs[1].stdout.splitlines()) == len(made)
    assert ["grete" in result.output for result in outputs] == [False, False, True, False, False, False]
    assert all("personal data" in result.stderr for result in outputs[2:])
    assert len(outputs[-1].stdout) > 1_000_000


def test_show_tells_all_of_one_letter(dlq: Dlq, path: Path) -> None:
    """The body alone on stdout, as indented JSON, for `transform --explain -`; one that is none is an error."""
    (made,) = bury_at(path, order(1))
    shown = dlq("show", made)
    assert (shown.stdout[0], json.loads(shown.stdout)) == ("{", order(1))
    told = dict(line.split(maxsplit=1) for line in shown.stderr.splitlines() if line)
    assert (told["message_id"], told["resource"], told["reason"]) == (made, "order order-1", REFUSED.reason)
    assert (told["error"], told["attempts"]) == ("Rejected", "1")
    assert told["dead_lettered_at"] >= told["published_at"] > "2026"
    missing = dlq("show", "4711")
    assert (missing.exit_code, missing.stdout) == (1, "")
    assert missing.stderr == "Error: no dead letter 4711: `klaviyo-worker dlq list` shows the ids\n"


def test_drop_removes_what_is_chosen(dlq: Dlq, path: Path) -> None:
    """It counts first, and says what it removed; a wrong name drops nothing."""
    made = bury_at(path, *map(order, range(1, 4)), *[b"[]"] * 250)
    result = dlq("drop", "--type", "unreadable", "--yes")
    assert result.exit_code == 0
    assert words(result.stdout).startswith("COUNT TYPE REASON 250 unreadable")
    assert result.stdout.endswith("dropped 250 dead letters\n")
    assert left_at(path) == made[:3]
    assert dlq("drop", made[0], "4711", "--yes").exit_code == 1
    assert left_at(path) == made[:3]
    assert dlq("drop", made[0], "--yes").stdout.endswith("dropped 1 dead letter\n")
    assert dlq("drop", "--all", "--limit", "1", "--yes").exit_code == 0
    assert left_at(path) == made[2:3]
    assert dlq("drop", "--since", "2100-01-01", "--yes").stderr == "no dead letters to drop\n"


def test_a_look_that_is_interrupted_has_a_code_of_its_own(dlq: Dlq, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `klaviyo-worker --help` says."""
    monkeypatch.setattr(EmbeddedQueue, "buried_after", Mock(side_effect=KeyboardInterrupt))
    result = dlq("list")
    assert (result.exit_code, result.stderr) == (ExitCode.INTERRUPTED, "Error: interrupted\n")


def test_drop_knows_letters_by_more_than_their_ids(dlq: Dlq, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who publishes to Service Bus may use an id twice. And it says so when some could not be had again."""
    bury_at(path, b"[]", b"[]", b"[]")
    looks: list[str] = []
    buried_after = EmbeddedQueue.buried_after
    same = [("1", "2", "1"), ("1", "2", "1"), ("1", "2", "1"), ("1", "2", "gone")]

    def named(self: EmbeddedQueue, last: tuple[float, int], limit: int) -> list[tuple[tuple[float, int], DeadLetter]]:
        found = buried_after(self, last, limit)
        names = same.pop(0) if found else ()
        return [
            (place, replace(letter, delivery=replace(letter.delivery, id=name)))  # type: ignore[type-var]
            for (place, letter), name in zip(found, names, strict=True)
        ]

    monkeypatch.setattr(EmbeddedQueue, "buried_after", named)
    monkeypatch.setattr(EmbeddedQueue, "unbury", lambda _, deliveries: looks.extend(each.id for each in deliveries))
    assert dlq("drop", "--all", "--yes").stdout.endswith("dropped 3 dead letters\n")
    assert looks == ["1", "2", "1"]
    short = dlq("drop", "--all", "--yes")
    assert (short.exit_code, short.stdout.splitlines()[-1]) == (1, "dropped 2 dead letters")
    assert "1 dead letter not dropped: removed or leased by another process; try again" in short.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["drop", "--yes"], "expected MESSAGE_ID, --reason"),
        (["drop", "--yes", "--limit", "3"], "expected MESSAGE_ID, --reason"),
        (["drop", "--yes", "--all", "--type", "OrderCreated"], "expected MESSAGE_ID, --reason"),
        (["drop", "--all"], "cannot ask for confirmation without a terminal: use --yes"),
        (["drop", "--all", "--yes", "--since", "yesterday"], "expected an age like"),
        (["replay", "--since", "yesterday"], "expected an age like"),
        (["replay", "--rate", "0"], "--rate"),
        (["replay", "--limit", "0"], "--limit"),
        (["list", "--limit", "x"], "--limit"),
        (["show"], "MESSAGE_ID"),
    ],
)
def test_misuse_is_exit_code_2_and_does_nothing(arguments: list[str], expected: str, dlq: Dlq, path: Path) -> None:
    """With a sentence that says what was expected."""
    made = bury_at(path, order(1))
    result = dlq(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert left_at(path) == made


@pytest.mark.parametrize("command", [["list"], ["show", "1"], ["replay"], ["drop", "--all", "--yes"]])
def test_queues_without_dead_letters_say_what_to_do(
    command: list[str], dlq: Dlq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3; who is pushed to is told where to look instead."""
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
    """Run `klaviyo-worker dlq` on a terminal, with what is typed there; return exit code and what is seen."""
    ours, theirs = os.openpty()
    for name, value in (sandbox.environment | {"QUEUE_URL": f"embedded://{path}"}).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str, typed: str = "") -> tuple[int, str]:
        os.write(ours, typed.encode())
        with monkeypatch.context() as patched, ExitStack() as stack:
            for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
                patched.setattr(sys, name, stack.enter_context(os.fdopen(os.dup(theirs), mode)))
            with pytest.raises(SystemExit) as ended:
                main.main(["dlq", *arguments])
        return int(str(ended.value.code)), _seen(ours)

    yield run
    os.close(ours)
    os.close(theirs)


def _seen(terminal: int) -> str:
    """Return all that a terminal shows by now."""
    os.set_blocking(terminal, False)
    seen = b""
    with suppress(BlockingIOError):
        while True:
            seen += os.read(terminal, 4_096)
    return seen.decode()


def test_drop_asks_on_a_terminal(terminal: Terminal, path: Path) -> None:
    """No is no, and is what an empty line means; yes is asked for after the counts."""
    made = bury_at(path, order(1), order(2))
    code, seen = terminal("drop", made[0], typed="\n")
    assert (code, "Drop 1 dead letter permanently? [y/N]" in seen) == (1, True)
    assert left_at(path) == made
    code, seen = terminal("drop", "--all", typed="y\n")
    assert (code, "dropped 2 dead letters" in seen) == (0, True)
    assert left_at(path) == []


def test_a_terminal_shows_progress_and_warnings_only(terminal: Terminal, path: Path, sandbox: Sandbox) -> None:
    """A line per message would tear the bar to pieces; a warning is worth a line of its own, in the bar's place."""
    bury_at(path, *map(order, range(1, 21)))
    pointer = {"pointer": "/data/attributes/profile/data/attributes/phone_number"}
    refusal = json.dumps({"errors": [{"code": "invalid", "title": "Invalid", "source": pointer}]}).encode()
    code, seen = terminal("replay", "--type", "OrderCreated", "--limit", "5")
    assert (code, "0 of 5" in seen) == (0, True)
    code, seen = terminal("replay", "--type", "OrderImported")  # nobody knows how many there are
    assert (code, "replaying 0  0.0/s" in seen) == (0, True)
    sandbox.klaviyo.faults.add(Fault(400, body=refusal, contains=b"phone_number"))
    code, seen = terminal("replay")
    assert code == 0
    assert "0 of 15" in seen
    assert "message_processed" not in seen
    assert re.search(r"\r\x1b\[K[0-9:]+ identifier_dropped .*\n", seen)
    assert words(seen).endswith("replayed 15 sent to Klaviyo, removed")
