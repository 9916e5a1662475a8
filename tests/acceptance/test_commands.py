"""The other commands, and their error messages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from worker.sandbox.envelopes import cloudevent, sqs
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from tests.acceptance.conftest import Worker
    from worker.sandbox import Sandbox


@pytest.mark.parametrize("name", ["CT_API_URL", "CT_AUTH_URL", "CT_PROJECT_ID", "CT_API_CLIENT", "KLAVIYO_AUTH_KEY"])
def test_missing_variable_is_one_line_and_exit_code_2(name: str, worker: Worker) -> None:
    """The line names the variable."""
    done = worker("run", "--once", env={name: ""})
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: {name} is missing")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CT_API_URL", "nonsense"),
        ("CT_AUTH_URL", "http://example.com"),
        ("CT_API_CLIENT", "s3cret"),
        ("KLAVIYO_AUTH_KEY", "s3 cret"),
        ("KLAVIYO_WORKER_LANES", "s3cret"),
        ("KLAVIYO_WORKER_CONFIG", "/nowhere/mapping.toml"),
        ("QUEUE_URL", "kafka://topic"),
        ("QUEUE_URL", "embedded:///tmp/queue.db?lease=never"),
    ],
)
def test_malformed_variable_is_one_line_and_exit_code_2(name: str, value: str, worker: Worker) -> None:
    """The line names the variable and does not contain its value."""
    done = worker("run", "--once", env={name: value})
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: {name}")
    assert done.stderr.count("\n") == 1
    assert "s3" not in done.stderr


def test_scope_is_optional(worker: Worker) -> None:
    """Without CT_SCOPE the worker requests all scopes of the API client."""
    worker.publish(b"bad")
    assert worker("run", "--once", env={"CT_SCOPE": ""}).returncode == 0


def test_queue_that_cannot_be_opened_is_exit_code_3(worker: Worker) -> None:
    """The error has the reason and no traceback."""
    done = worker("run", "--once", env={"QUEUE_URL": "embedded:///proc/nowhere/queue.db"})
    assert done.returncode == 3
    assert done.stderr.startswith("Error: QUEUE_URL: cannot open ")


def test_publish_does_not_change_lines(worker: Worker) -> None:
    """Empty lines and invalid UTF-8 are messages too. The number of messages is printed."""
    done = worker("publish", "-", stdin=b"\xff\xfe\n\n{}\nlast without newline")
    assert (done.returncode, done.stdout) == (0, "4\n")
    assert worker("publish", "-", stdin=b"").stdout == "0\n"


def test_transform_needs_no_network(worker: Worker, sandbox: Sandbox) -> None:
    """The payload is in the message, so no lookup is needed."""
    order = next(order for order in sandbox.shop.orders.values() if len(order["lineItems"]) == 3)
    notification = message("OrderCreated", "order", order["id"], order=order)
    done = worker("transform", "-", stdin=sqs(notification), env={"CT_API_URL": "", "KLAVIYO_AUTH_KEY": ""})
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["operation"] for line in lines] == ["create_event"] * 4
    assert {(line["method"], line["path"]) for line in lines} == {("POST", "/api/events")}
    assert lines[0]["body"]["data"]["attributes"]["unique_id"] == order["id"]
    assert not sandbox.klaviyo.requests
    assert not sandbox.commercetools.requests


def test_transform_reads_resources_from_a_file(worker: Worker, sandbox: Sandbox) -> None:
    """--commercetools names a file with the resources in commercetools."""
    order = next(order for order in sandbox.shop.orders.values() if order.get("customerEmail"))
    (worker.directory / "shop.json").write_text(json.dumps({"orders": [order]}))
    notification = message("OrderStateChanged", "order", order["id"], orderState="Complete")
    done = worker("transform", "-", "--commercetools", "shop.json", stdin=cloudevent(notification))
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line["body"]["data"]["attributes"]["metric"]["data"]["attributes"]["name"] == "Fulfilled Order"


def test_transform_reports_errors_on_stderr(worker: Worker) -> None:
    """Ignored notifications are also reported on stderr. Errors lead to exit code 1."""
    subscription = b'{"notificationType": "ResourceCreated", "resource": {"typeId": "subscription", "id": "1"}}'
    done = worker("transform", "-", stdin=subscription + b"\nnonsense\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ignored: no handler for this type")
    assert "error: expected a JSON object" in done.stderr
    assert worker("transform", "-", "--commercetools", "-", stdin=b"[]").returncode == 2


def test_handlers_and_help_are_complete(worker: Worker) -> None:
    """`handlers` lists every type. `run --help` lists the variable of every option."""
    table = worker("handlers").stdout
    assert "OrderCreatedFromRecurringOrder" in table
    assert "inventory-entry" in table
    text = " ".join(worker("run", "--help").stdout.split())
    for name in ("QUEUE_URL", "CT_PROJECT_ID", "KLAVIYO_WORKER_LANES", "PREFERRED_LOCALE"):
        assert f"[env: {name}]" in text
    assert "secret" not in worker("run", "--help", env={"CT_API_CLIENT": '{"clientId":"a","secret":"secretly"}'}).stdout
    assert worker("--version").stdout.startswith("klaviyo-worker, version ")


def test_dead_letters_as_text(worker: Worker) -> None:
    """The output has one line per dead letter, oldest first."""
    assert worker("dlq", "list").stderr == "no dead letters\n"
    worker.publish(b"[]", message("OrderCreated", "order", "o-1", order={"id": "o-1"}))
    worker("run", "--once")
    lines = worker("dlq", "list").stdout.splitlines()[-2:]  # the lines before are counts
    first, second = sorted(lines, key=lambda line: "OrderCreated" in line)
    assert "unreadable  [parse] expected a JSON object; found an array" in first
    assert "OrderCreated order o-1  [transform]" in second
