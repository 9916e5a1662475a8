"""The guarantees of `klaviyo-worker run`."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import time
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import urllib3

from tests.acceptance.conftest import Worker, events_named, log_lines
from tests.support.ports import free_port
from tests.support.waiting import wait_for
from worker.sandbox import Fault
from worker.sandbox.notifications import change, message
from worker.sandbox.samples import sample_notifications

if TYPE_CHECKING:
    from tests.acceptance.conftest import Process
    from worker.sandbox import Sandbox


def updated(customer_id: str) -> dict[str, Any]:
    return change("ResourceUpdated", "customer", customer_id)


def http_get(port: int, path: str) -> tuple[int, str]:
    """Return status and body, or status 0 if the port is closed."""
    try:
        response = urllib3.request("GET", f"http://127.0.0.1:{port}{path}", retries=False)
    except urllib3.exceptions.HTTPError:
        return 0, ""
    return response.status, response.data.decode()


def stop(process: Process) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 0


def test_samples_have_expected_outcomes_and_duplicates_no_effect(worker: Worker, sandbox: Sandbox) -> None:
    """The samples have all types, valid and invalid. The second run changes nothing in Klaviyo."""
    samples = sample_notifications(sandbox.shop)
    effects = []
    for _ in range(2):
        assert worker("publish", "-", stdin=b"\n".join(sample.body for sample in samples) + b"\n").returncode == 0
        done = worker("run", "--once")
        assert done.returncode == 0, done.stderr
        outcomes = {int(line["message_id"]): line["outcome"] for line in log_lines(done.stderr)}
        assert [(s.title, outcomes[name]) for s, name in zip(samples, sorted(outcomes), strict=True)] == [
            (s.title, s.outcome) for s in samples
        ]
        account = sandbox.account
        effects.append(
            [
                len(account.profiles),
                len(account.events),
                *map(len, (account.items, account.variants, account.categories)),
            ]
        )
    assert effects[0] == effects[1]
    assert min(effects[0]) > 0
    invalid = [sample for sample in samples if sample.outcome == "dead_lettered"]
    dead_letters = worker.dead_letters()
    assert len(dead_letters) == 2 * len(invalid)
    assert all(entry["reason"] and entry["stage"] for entry in dead_letters)
    assert set(dead_letters[0]) == {
        "message_id",
        "message_type",
        "resource_type",
        "resource_id",
        "reason",
        "stage",
        "attempts",
        "dead_lettered_at",
    }


def test_log_has_no_personal_data(worker: Worker, sandbox: Sandbox) -> None:
    """No email, phone, name, street or key is logged at any level."""
    samples = sample_notifications(sandbox.shop)
    worker("publish", "-", stdin=b"\n".join(sample.body for sample in samples) + b"\n")
    sandbox.klaviyo.faults.add(Fault(status=400, times=5, match="POST /api/events"))
    done = worker("run", "--once", "--log-level", "DEBUG")
    output = done.stderr + done.stdout + json.dumps(worker.dead_letters())
    assert len(log_lines(done.stderr)) == len(samples)
    secrets = {sandbox.environment["KLAVIYO_AUTH_KEY"], json.loads(sandbox.environment["CT_API_CLIENT"])["secret"]}
    found = {text for text in sandbox.shop.personal_data() | secrets if text in output}
    assert not found


@pytest.mark.parametrize("style", ["refused", "500", "token"])
def test_message_is_kept_if_enrichment_fails(style: str, worker: Worker, sandbox: Sandbox) -> None:
    """The message is processed when commercetools is available again."""
    customer = next(iter(sandbox.shop.customers.values()))
    worker.publish(updated(customer["id"]))
    if style == "refused":
        sandbox.commercetools.stop()
    else:
        sandbox.commercetools.faults.add(Fault(status=500, times=None, match="GET /" if style == "500" else ""))
    done = worker("run", "--once", "--max-wait", "0.1", "--retry-timeout", "0.3")
    assert done.returncode == 6
    assert done.stderr.endswith("messages are left after waiting 0.1 s: run the command again to process them\n")
    assert [line["outcome"] for line in log_lines(done.stderr)] == ["returned"]
    assert "wait_timed_out" in done.stderr
    assert sandbox.account.profiles == []
    if style == "refused":
        sandbox.commercetools.start()
    sandbox.commercetools.faults.clear()
    assert worker("run", "--once").returncode == 0
    assert len(sandbox.account.profiles) == 1
    assert worker.dead_letters() == []


@pytest.mark.parametrize(("seconds", "attempts"), [(2.0, 1), (6.0, 2)], ids=["20 minutes", "an hour"])
def test_delivery_attempts_after_an_outage(seconds: float, attempts: int, worker: Worker, sandbox: Sandbox) -> None:
    """An outage shorter than the hold uses no attempt. An outage twice as long uses one. The hold is 3 s here."""
    customers = [name for name, customer in sandbox.shop.customers.items() if customer.get("email")]
    sandbox.klaviyo.stop()
    worker.publish(*map(updated, customers))
    process = worker.start("run", "--outage-hold", "3", "--retry-timeout", "0.2", "--http-port", "0")
    wait_for(lambda: sandbox.commercetools.requests)
    time.sleep(seconds)
    assert process.poll() is None
    sandbox.klaviyo.start()
    wait_for(lambda: len(sandbox.account.profiles) == len(customers))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    lines = [line for line in log_lines(worker.log.read_text()) if line["outcome"] == "sent"]
    assert {line["attempt"] for line in lines} == {attempts}
    assert worker.dead_letters() == []


def test_health_and_metrics_of_a_parked_worker(worker: Worker, sandbox: Sandbox) -> None:
    """The worker resumes when the key is accepted. `/livez` stays 200."""
    port = free_port()
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(status=401, times=None))
    worker.publish(updated(customer))
    process = worker.start("run", "--http-port", str(port), "--park-retry-interval", "0.2")
    wait_for(lambda: http_get(port, "/readyz")[0] == 503)
    assert "KLAVIYO_AUTH_KEY" in http_get(port, "/readyz")[1]
    assert http_get(port, "/livez")[0] == 200
    metrics = http_get(port, "/metrics")[1]
    assert "klaviyo_worker_parked 1.0" in metrics
    assert "klaviyo_worker_oldest_message_age_seconds " in metrics
    assert "klaviyo_worker_oldest_message_age_seconds 0.0\n" not in metrics
    sandbox.klaviyo.faults.clear()
    wait_for(lambda: http_get(port, "/readyz")[0] == 200)
    wait_for(lambda: 'message_type="ResourceUpdated",outcome="sent"} 1.0' in http_get(port, "/metrics")[1])
    metrics = http_get(port, "/metrics")[1]
    assert "klaviyo_worker_parked 0.0" in metrics
    assert "klaviyo_worker_oldest_message_age_seconds 0.0\n" in metrics
    assert 'klaviyo_worker_klaviyo_requests_total{endpoint="GET /api/profiles",status="401"}' in metrics
    wait_for(
        lambda: "klaviyo_worker_queue_backlog_messages 0.0" in http_get(port, "/metrics")[1]
    )  # the backlog is read periodically
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_http_port_in_use_does_not_stop_the_worker(worker: Worker, sandbox: Sandbox) -> None:
    """A second worker on the host logs it and runs without the port."""
    worker.publish(updated(next(iter(sandbox.shop.customers))))
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = worker.start("run", "--http-port", port)
        wait_for(lambda: sandbox.account.profiles)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    (line,) = [line for line in worker.log.read_text().splitlines() if "http_port_unavailable" in line]
    assert port in line
    assert "KLAVIYO_WORKER_HTTP_PORT" in line


def test_wrong_http_host_does_not_stop_the_worker(worker: Worker, sandbox: Sandbox) -> None:
    """The worker logs the address and runs without the port."""
    worker.publish(updated(next(iter(sandbox.shop.customers))))
    process = worker.start("run", "--http-host", "192.0.2.1", "--http-port", str(free_port()))
    wait_for(lambda: sandbox.account.profiles)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    (line,) = events_named(worker, "http_port_unavailable")
    assert line["host"] == "192.0.2.1"
    assert "KLAVIYO_WORKER_HTTP_HOST" in line["reason"]


def test_once_serves_no_metrics(worker: Worker) -> None:
    """A run that ends by itself is not scraped."""
    with socket.create_server(("", 0)) as taken:
        done = worker("run", "--once", "--http-port", str(taken.getsockname()[1]))
    assert (done.returncode, "http_port_unavailable" in done.stderr) == (0, False)


@pytest.mark.parametrize("action", ["respond", "reset", "lose_response", "truncate"])
def test_failed_request_is_retried_without_duplicates(action: str, worker: Worker, sandbox: Sandbox) -> None:
    """Events that had been recorded are not duplicated."""
    order = next(order for order in sandbox.shop.orders.values() if len(order["lineItems"]) == 3)
    worker.publish(message("OrderCreated", "order", order["id"], order=order))
    sandbox.klaviyo.faults.add(Fault(status=503, times=2, match="POST /api/events", action=action))
    done = worker("run", "--once")
    assert [line["outcome"] for line in log_lines(done.stderr)] == ["sent"]
    assert Counter(event["metric"] for event in sandbox.account.events) == {"Placed Order": 1, "Ordered Product": 3}


def test_refused_credentials_end_once_and_keep_the_message(worker: Worker, sandbox: Sandbox) -> None:
    """The exit codes are 4 and 5. No message is acked or dead-lettered."""
    customer = next(iter(sandbox.shop.customers.values()))
    worker.publish(updated(customer["id"]))
    done = worker("run", "--once", env={"KLAVIYO_AUTH_KEY": "pk_wrong"})
    assert (done.returncode, "KLAVIYO_AUTH_KEY" in done.stderr) == (5, True)
    done = worker("run", "--once", env={"CT_API_CLIENT": '{"clientId": "no", "secret": "no"}'})
    assert (done.returncode, "CT_API_CLIENT" in done.stderr) == (4, True)
    assert worker.dead_letters() == []
    assert worker("run", "--once").returncode == 0
    assert len(sandbox.account.profiles) == 1


def test_worker_parks_while_its_key_is_refused(worker: Worker, sandbox: Sandbox) -> None:
    """It holds the message, retries at intervals, and resumes when the key is accepted."""
    customer = next(iter(sandbox.shop.customers.values()))
    worker.publish(updated(customer["id"]))
    sandbox.klaviyo.faults.add(Fault(status=401, times=None))
    process = worker.start("run", "--park-retry-interval", "0.1")
    wait_for(lambda: '"parked"' in worker.log.read_text())
    sandbox.klaviyo.faults.clear()
    wait_for(lambda: sandbox.account.profiles)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    output = worker.log.read_text()
    assert output.count('"parked"') == 1
    assert [line["attempt"] for line in log_lines(output)] == [1]


def test_sigterm_finishes_messages_in_flight_and_exits_0(worker: Worker, sandbox: Sandbox) -> None:
    """No message is lost or left leased."""
    customers = list(sandbox.shop.customers)
    sandbox.klaviyo.latency = 0.3
    worker.publish(*[updated(customer) for customer in customers])
    process = worker.start("run")
    wait_for(lambda: sandbox.commercetools.requests)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    sandbox.klaviyo.latency = 0.0
    started = time.monotonic()
    assert worker("run", "--once").returncode == 0
    assert time.monotonic() - started < 20
    assert {p["attributes"]["external_id"] for p in sandbox.account.profiles} >= {
        name for name, customer in sandbox.shop.customers.items() if customer.get("email")
    }


def test_shutdown_timeout_nacks_the_messages_and_exits_6(worker: Worker, sandbox: Sandbox) -> None:
    """The grace period limits the duration of a shutdown."""
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=15, times=1, match="POST /api/profiles"))
    worker.publish(updated(customer))
    process = worker.start("run", "--shutdown-grace-period", "0.3")
    wait_for(lambda: sandbox.klaviyo.faults.triggered)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 6
    assert worker("run", "--once").returncode == 0
    assert len(sandbox.account.profiles) == 1


def test_broken_queue_ends_the_process_although_calls_hang(worker: Worker, sandbox: Sandbox) -> None:
    """Python would wait for the threads of the hanging calls until their read timeout."""
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=600, times=None))
    order = next(iter(sandbox.shop.orders.values()))
    worker.publish(message("OrderImported", "order", order["id"]))  # has several events, which an executor sends
    process = worker.start(
        "run", env={"KLAVIYO_WORKER_SHUTDOWN_GRACE_PERIOD": "1", "KLAVIYO_WORKER_READ_TIMEOUT": "600"}
    )
    wait_for(lambda: sandbox.klaviyo.faults.triggered >= 2)
    with closing(sqlite3.connect(worker.directory / "queue.db")) as database:
        database.execute("DROP TABLE messages")
    assert process.wait(120) == 3


def test_second_signal_exits_without_waiting(worker: Worker, sandbox: Sandbox) -> None:
    """The messages stay on the queue, and away from a job that could still write their old state."""
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=15, times=1, match="POST /api/profiles"))
    worker.publish(updated(customer))
    process = worker.start("run", "--shutdown-grace-period", "60", "--job-timeout", "3")
    wait_for(lambda: sandbox.klaviyo.faults.triggered)
    while process.poll() is None:  # two signals at once can arrive as one
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert process.returncode == 6
    assert worker("run", "--once").returncode == 0
    assert len(sandbox.account.profiles) == 1


def test_killed_worker_loses_and_duplicates_nothing(worker: Worker, sandbox: Sandbox) -> None:
    """The next worker receives the messages when their leases expire."""
    sandbox.klaviyo.latency = 0.05
    orders = [order for order in sandbox.shop.orders.values() if order.get("customerEmail")]
    queue = {"QUEUE_URL": worker.environment["QUEUE_URL"] + "?lease=1"}
    worker.publish(*[message("OrderCreated", "order", order["id"], order=order) for order in orders])
    process = worker.start("run", env=queue)
    wait_for(lambda: len(sandbox.account.events) > 3)
    process.kill()
    process.wait()
    assert worker("run", "--once", env=queue).returncode == 0
    lines = sum(len(order["lineItems"]) + len(order.get("customLineItems") or []) for order in orders)
    metrics = Counter(event["metric"] for event in sandbox.account.events)
    assert metrics == {"Placed Order": len(orders), "Ordered Product": lines}
    assert worker.dead_letters() == []


def test_dry_run_writes_nothing_and_keeps_every_message(worker: Worker, sandbox: Sandbox) -> None:
    """It prints the requests. A real run then processes all messages."""
    samples = sample_notifications(sandbox.shop)
    worker("publish", "-", stdin=b"\n".join(sample.body for sample in samples) + b"\n")
    done = worker("run", "--dry-run")
    assert done.returncode == 0
    operations = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"create_event", "upsert_profile", "upsert_item"} <= {line["operation"] for line in operations}
    assert not sandbox.klaviyo.requests
    assert worker.dead_letters() == []
    done = worker("run", "--once")
    assert len({line["message_id"] for line in log_lines(done.stderr)}) == len(samples)


def test_dry_runs_and_refused_credentials_use_no_attempts(worker: Worker, sandbox: Sandbox) -> None:
    """However often they are repeated, no message is dead-lettered."""
    customer = next(iter(sandbox.shop.customers))
    queue = {"QUEUE_URL": worker.environment["QUEUE_URL"] + "?max_attempts=2"}
    worker.publish(updated(customer))
    for _ in range(2):
        assert worker("run", "--dry-run", env=queue).returncode == 0
        assert worker("run", "--once", env=queue | {"KLAVIYO_AUTH_KEY": "pk_wrong"}).returncode == 5
    assert worker.dead_letters() == []
    done = worker("run", "--once", env=queue)
    assert [line["attempt"] for line in log_lines(done.stderr)] == [1]


def test_messages_from_the_future_end_like_any_other(worker: Worker, sandbox: Sandbox) -> None:
    """Their resources do not exist. As many of them as the budget allows do not stop the worker for the whole hold."""
    future = {"modifiedAt": "2099-01-01T00:00:00Z", "createdAt": "2099-01-01T00:00:00Z"}
    customers = [updated(f"no-customer-{number}") | future for number in range(6)]
    states = {"orderState": "Complete"} | future
    orders = [message("OrderStateChanged", "order", f"no-order-{number}") | states for number in range(6)]
    placed = [message("OrderCreated", "order", name, order=order) for name, order in sandbox.shop.orders.items()]
    worker.publish(*customers, *orders, *placed)
    run = worker("run", "--once", env={"KLAVIYO_WORKER_MAX_IN_FLIGHT": "3", "KLAVIYO_WORKER_LANES": "1"})
    assert run.returncode == 0
    outcomes = {line["resource_id"]: line["outcome"] for line in log_lines(run.stderr)}
    assert {name: outcomes[name] for name in outcomes if name.startswith("no-")} == dict.fromkeys(
        [entry["resource"]["id"] for entry in (*customers, *orders)], "ignored"
    )
    assert len(outcomes) == len(customers) + len(orders) + len(placed)


def test_updates_of_one_customer_are_combined_per_batch(worker: Worker, sandbox: Sandbox) -> None:
    """A backlog forms batches, so calls per message decrease."""
    customer = next(iter(sandbox.shop.customers))
    worker.publish(*[updated(customer)] * 100)
    assert worker("run", "--once").returncode == 0
    queries = [request for request in sandbox.commercetools.requests if "/customers" in request.path]
    assert len(queries) < 10
    assert len(sandbox.klaviyo.requests) < 10
