"""What the worker promises, seen from outside."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import urllib3

from tests.acceptance.conftest import Worker, log_lines
from tests.support.pubsub_emulator import free_port
from worker.sandbox import Fault
from worker.sandbox.notifications import change, message, sample_notifications

if TYPE_CHECKING:
    import subprocess

    from worker.sandbox import Sandbox


def updated(customer_id: str) -> dict[str, Any]:
    return change("ResourceUpdated", "customer", customer_id)


def ask(port: int, path: str) -> tuple[int, str]:
    """Return status and body; 0 while nobody listens."""
    try:
        answer = urllib3.request("GET", f"http://127.0.0.1:{port}{path}", retries=False)
    except urllib3.exceptions.HTTPError:
        return 0, ""
    return answer.status, answer.data.decode()


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Look again and again, but leave the machine to the worker: a look at a long log takes its time."""
    deadline = time.monotonic() + seconds
    looked_at = time.monotonic()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(max(0.02, 10 * (time.monotonic() - looked_at)))
        looked_at = time.monotonic()


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(40) == 0


def test_every_sample_ends_as_expected_and_twice_adds_nothing(worker: Worker, sandbox: Sandbox) -> None:
    """All types, good and bad, from the queue into Klaviyo; the second time nothing is new."""
    samples = sample_notifications(sandbox.shop)
    effects = []
    for _ in range(2):
        assert worker("publish", "-", stdin=b"\n".join(sample.body for sample in samples) + b"\n").returncode == 0
        done = worker("run", "--once")
        assert done.returncode == 0, done.stderr
        endings = {int(line["message_id"]): line["outcome"] for line in log_lines(done.stderr)}
        assert [(s.title, endings[name]) for s, name in zip(samples, sorted(endings), strict=True)] == [
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
    bad = [sample for sample in samples if sample.outcome == "dead_lettered"]
    letters = worker.dead_letters()
    assert len(letters) == 2 * len(bad)
    assert all(letter["reason"] and letter["stage"] for letter in letters)
    assert set(letters[0]) == {
        "message_id",
        "message_type",
        "resource_type",
        "resource_id",
        "reason",
        "stage",
        "attempts",
        "dead_lettered_at",
    }


def test_nobody_is_in_the_log(worker: Worker, sandbox: Sandbox) -> None:
    """No email, phone, name, street or key of the shop, at any level, good message or bad."""
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
def test_failed_enrichment_is_never_acked(style: str, worker: Worker, sandbox: Sandbox) -> None:
    """Commercetools down: the message stays, and goes through when it is back."""
    customer = next(iter(sandbox.shop.customers.values()))
    worker.publish(updated(customer["id"]))
    if style == "refused":
        sandbox.commercetools.stop()
    else:
        sandbox.commercetools.faults.add(Fault(status=500, times=None, match="GET /" if style == "500" else ""))
    done = worker("run", "--once", "--max-wait", "0.1", "--retry-timeout", "0.3")
    assert done.returncode == 0
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
def test_what_an_outage_costs(seconds: float, attempts: int, worker: Worker, sandbox: Sandbox) -> None:
    """Shorter than the hold nothing, twice as long one more delivery: here the half hour is 3 s."""
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
    assert process.wait(20) == 0
    lines = [line for line in log_lines(worker.log.read_text()) if line["outcome"] == "sent"]
    assert {line["attempt"] for line in lines} == {attempts}
    assert worker.dead_letters() == []


def test_health_and_metrics_tell_that_the_worker_is_parked(worker: Worker, sandbox: Sandbox) -> None:
    """And that it goes on by itself once the key is accepted; the live probe never minds."""
    port = free_port()
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(status=401, times=None))
    worker.publish(updated(customer))
    process = worker.start("run", "--http-port", str(port), "--park-retry-interval", "0.2")
    wait_for(lambda: ask(port, "/readyz")[0] == 503)
    assert "KLAVIYO_AUTH_KEY" in ask(port, "/readyz")[1]
    assert ask(port, "/livez")[0] == 200
    metrics = ask(port, "/metrics")[1]
    assert "klaviyo_worker_parked 1.0" in metrics
    assert "klaviyo_worker_oldest_message_age_seconds " in metrics
    assert "klaviyo_worker_oldest_message_age_seconds 0.0\n" not in metrics
    sandbox.klaviyo.faults.clear()
    wait_for(lambda: ask(port, "/readyz")[0] == 200)
    wait_for(lambda: 'message_type="ResourceUpdated",outcome="sent"} 1.0' in ask(port, "/metrics")[1])
    metrics = ask(port, "/metrics")[1]
    assert "klaviyo_worker_parked 0.0" in metrics
    assert "klaviyo_worker_oldest_message_age_seconds 0.0\n" in metrics
    assert 'klaviyo_worker_klaviyo_requests_total{endpoint="POST /api/profile-import",status="401"}' in metrics
    wait_for(lambda: "klaviyo_worker_queue_backlog_messages 0.0" in ask(port, "/metrics")[1])  # asked now and then
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_metrics_port_that_is_taken_is_said_and_costs_no_message(worker: Worker, sandbox: Sandbox) -> None:
    """A second worker on a host must not stand still for want of a port."""
    worker.publish(updated(next(iter(sandbox.shop.customers))))
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = worker.start("run", "--http-port", port)
        wait_for(lambda: sandbox.account.profiles)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    (line,) = [line for line in worker.log.read_text().splitlines() if "http_port_unavailable" in line]
    assert port in line
    assert "KLAVIYO_WORKER_HTTP_PORT" in line


def test_once_serves_no_metrics(worker: Worker) -> None:
    """Nobody scrapes a run that ends by itself, and it may share a host with a worker that is scraped."""
    with socket.create_server(("", 0)) as taken:
        done = worker("run", "--once", "--http-port", str(taken.getsockname()[1]))
    assert (done.returncode, "http_port_unavailable" in done.stderr) == (0, False)


@pytest.mark.parametrize("action", ["respond", "reset", "lose_response", "truncate"])
def test_klaviyo_failing_once_costs_nothing(action: str, worker: Worker, sandbox: Sandbox) -> None:
    """An answer that does not come is asked for again, and what did arrive is not doubled."""
    order = next(order for order in sandbox.shop.orders.values() if len(order["lineItems"]) == 3)
    worker.publish(message("OrderCreated", "order", order["id"], order=order))
    sandbox.klaviyo.faults.add(Fault(status=503, times=2, match="POST /api/events", action=action))
    done = worker("run", "--once")
    assert [line["outcome"] for line in log_lines(done.stderr)] == ["sent"]
    assert Counter(event["metric"] for event in sandbox.account.events) == {"Placed Order": 1, "Ordered Product": 3}


def test_credentials_that_are_refused_stop_the_run_and_keep_the_message(worker: Worker, sandbox: Sandbox) -> None:
    """Exit codes 4 and 5; nothing acked, nothing dead-lettered."""
    customer = next(iter(sandbox.shop.customers.values()))
    worker.publish(updated(customer["id"]))
    done = worker("run", "--once", env={"KLAVIYO_AUTH_KEY": "pk_wrong"})
    assert (done.returncode, "KLAVIYO_AUTH_KEY" in done.stderr) == (5, True)
    done = worker("run", "--once", env={"CT_API_CLIENT": '{"clientId": "no", "secret": "no"}'})
    assert (done.returncode, "CT_API_CLIENT" in done.stderr) == (4, True)
    assert worker.dead_letters() == []
    assert worker("run", "--once").returncode == 0
    assert len(sandbox.account.profiles) == 1


def test_a_running_worker_parks_while_its_key_is_refused(worker: Worker, sandbox: Sandbox) -> None:
    """It keeps the message, tries again slowly, and goes on by itself when the key is restored."""
    customer = next(iter(sandbox.shop.customers.values()))
    worker.publish(updated(customer["id"]))
    sandbox.klaviyo.faults.add(Fault(status=401, times=3))
    process = worker.start("run", "--park-retry-interval", "0.1")
    wait_for(lambda: sandbox.account.profiles)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    output = worker.log.read_text()
    assert output.count('"parked"') == 1
    assert [line["attempt"] for line in log_lines(output)] == [1]


def test_sigterm_finishes_what_is_in_flight_and_exits_0(worker: Worker, sandbox: Sandbox) -> None:
    """Nothing is lost and nothing is left leased."""
    customers = list(sandbox.shop.customers)
    sandbox.klaviyo.latency = 0.3
    worker.publish(*[updated(customer) for customer in customers])
    process = worker.start("run")
    wait_for(lambda: sandbox.commercetools.requests)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    sandbox.klaviyo.latency = 0.0
    began = time.monotonic()
    assert worker("run", "--once").returncode == 0
    assert time.monotonic() - began < 20
    assert {p["attributes"]["external_id"] for p in sandbox.account.profiles} >= {
        name for name, customer in sandbox.shop.customers.items() if customer.get("email")
    }


def test_a_shutdown_that_takes_too_long_returns_the_messages_and_exits_6(worker: Worker, sandbox: Sandbox) -> None:
    """The grace period is a promise to whoever runs the worker."""
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=15, times=1))
    worker.publish(updated(customer))
    process = worker.start("run", "--shutdown-grace-period", "0.3")
    wait_for(lambda: sandbox.klaviyo.requests or sandbox.commercetools.requests)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 6
    assert worker("run", "--once").returncode == 0
    assert len(sandbox.account.profiles) == 1


def test_a_second_signal_does_not_wait(worker: Worker, sandbox: Sandbox) -> None:
    """An operator who insists gets the exit, and the messages stay."""
    customer = next(iter(sandbox.shop.customers))
    sandbox.klaviyo.faults.add(Fault(action="hang", seconds=15, times=1))
    worker.publish(updated(customer))
    process = worker.start("run", "--shutdown-grace-period", "60")
    wait_for(lambda: sandbox.commercetools.requests)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 6
    assert worker("run", "--once").returncode == 0
    assert len(sandbox.account.profiles) == 1


def test_a_killed_worker_loses_nothing_and_doubles_nothing(worker: Worker, sandbox: Sandbox) -> None:
    """Kill -9 in the middle of the work; the next worker takes over when the leases end."""
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


def test_a_dry_run_writes_nothing_and_keeps_every_message(worker: Worker, sandbox: Sandbox) -> None:
    """It prints what would be sent, and the messages are there for the real run."""
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


def test_looking_and_being_refused_spend_no_attempts(worker: Worker, sandbox: Sandbox) -> None:
    """Dry runs and refused credentials, again and again, bury nothing."""
    customer = next(iter(sandbox.shop.customers))
    queue = {"QUEUE_URL": worker.environment["QUEUE_URL"] + "?max_attempts=2"}
    worker.publish(updated(customer))
    for _ in range(2):
        assert worker("run", "--dry-run", env=queue).returncode == 0
        assert worker("run", "--once", env=queue | {"KLAVIYO_AUTH_KEY": "pk_wrong"}).returncode == 5
    assert worker.dead_letters() == []
    done = worker("run", "--once", env=queue)
    assert [line["attempt"] for line in log_lines(done.stderr)] == [1]


def test_one_customer_updated_many_times_is_fetched_and_sent_once_per_batch(worker: Worker, sandbox: Sandbox) -> None:
    """A backlog makes batches: calls per message fall by themselves."""
    customer = next(iter(sandbox.shop.customers))
    worker.publish(*[updated(customer)] * 100)
    assert worker("run", "--once").returncode == 0
    queries = [request for request in sandbox.commercetools.requests if "/customers" in request.path]
    assert len(queries) < 10
    assert len(sandbox.klaviyo.requests) < 10
