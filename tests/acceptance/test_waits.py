"""No effect waits for the outage or the rate limit of another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.acceptance.conftest import Worker, events_named, settled
from tests.acceptance.test_run import stop
from tests.support.waiting import wait_for
from worker.sandbox import Fault, Sandbox
from worker.sandbox.notifications import change, message

if TYPE_CHECKING:
    from pathlib import Path


def order(number: int) -> dict[str, Any]:
    total = {"centAmount": 100, "fractionDigits": 2, "currencyCode": "EUR"}
    document = {"id": f"o-{number}", "customerEmail": "ada@example.com", "totalPrice": total, "lineItems": []}
    return message("OrderCreated", "order", f"o-{number}", order=document)


def has_profile(sandbox: Sandbox, customer: str) -> bool:
    with sandbox.account.lock:
        return any(profile["attributes"].get("external_id") == customer for profile in sandbox.account.profiles)


def test_held_message_delays_no_order(worker: Worker, sandbox: Sandbox) -> None:
    """Only the endpoints of categories fail. All that is in flight is one category, which is held."""
    methods = ("POST", "PATCH")
    sandbox.klaviyo.faults.add(
        *(Fault(status=503, times=None, match=f"{name} /api/catalog-categories") for name in methods)
    )
    worker.publish(change("ResourceUpdated", "category", next(iter(sandbox.shop.categories)), version=1))
    process = worker.start("run", env={"KLAVIYO_WORKER_RETRY_TIMEOUT": "0.1"})
    wait_for(lambda: events_named(worker, "outage"))
    worker.publish(*(order(number) for number in range(5)))
    wait_for(lambda: len(sandbox.account.events) == 5)
    assert not events_named(worker, "pulling_paused")
    sandbox.klaviyo.faults.clear()
    wait_for(lambda: len(settled(worker)) == 6)
    stop(process)


def test_deletions_beyond_their_budget_delay_no_order_and_no_profile(tmp_path: Path) -> None:
    """Klaviyo accepts 60 deletions a minute, so those of this test take a minute. Three times the budget is waiting."""
    with Sandbox(rate_limits=1.0) as sandbox:
        environment = sandbox.environment | {"QUEUE_URL": f"embedded://{tmp_path}/queue.db"}
        worker = Worker(environment | {"KLAVIYO_WORKER_MAX_IN_FLIGHT": "20"}, tmp_path)
        (tmp_path / "mapping.toml").write_text("[customer]\nerasure = true\n")
        names = [f"gone-{number}" for number in range(60)]
        customer = next(name for name, entry in sandbox.shop.customers.items() if entry.get("email"))
        for name in names:
            sandbox.account.import_profile({"attributes": {"external_id": name, "email": f"{name}@example.com"}})
        worker.publish(
            *(change("ResourceDeleted", "customer", name, version=2, dataErasure=True) for name in names),
            *(order(number) for number in range(5)),
            change("ResourceUpdated", "customer", customer, version=1),
        )
        process = worker.start("run", "--config", "mapping.toml")
        wait_for(lambda: len(sandbox.account.events) == 5 and has_profile(sandbox, customer))
        assert len(sandbox.account.deletion_requests) < 60
        assert worker.dead_letters() == []
        stop(process)


def cart(number: int) -> dict[str, Any]:
    total = {"centAmount": 100, "fractionDigits": 2, "currencyCode": "EUR"}
    line = {"id": f"line-{number}", "quantity": 1, "variant": {"sku": "S"}, "totalPrice": total}
    fields = {"cartState": "Active", "customerEmail": f"c{number}@example.com", "totalPrice": total}
    return {"id": f"cart-{number}", "version": 2, "lineItems": [line], **fields}


def test_carts_delay_no_order(tmp_path: Path) -> None:
    """2,000 changed carts are in front of 20 orders. Their events would take more than a minute."""
    with Sandbox(rate_limits=1.0) as sandbox:
        environment = sandbox.environment | {"QUEUE_URL": f"embedded://{tmp_path}/queue.db"}
        worker = Worker(environment, tmp_path)
        (tmp_path / "mapping.toml").write_text('[metrics]\nstarted_checkout = "Started Checkout"\n')
        sandbox.shop.carts.update({f"cart-{number}": cart(number) for number in range(2_000)})
        worker.publish(
            *(change("ResourceUpdated", "cart", name) for name in sandbox.shop.carts),
            *(order(number) for number in range(20)),
        )
        process = worker.start("run", "--config", "mapping.toml")

        def sent(metric: str) -> int:
            with sandbox.account.lock:
                return sum(event["metric"] == metric for event in sandbox.account.events)

        wait_for(lambda: sent("Placed Order") == 20)
        assert sent("Started Checkout") < 2_000
        assert worker.dead_letters() == []
        stop(process)


def test_outage_of_a_service_pauses_pulling(worker: Worker, sandbox: Sandbox) -> None:
    """No message that could arrive could be processed, so all stay in the queue."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=None))
    worker.publish(order(0))
    process = worker.start("run", env={"KLAVIYO_WORKER_RETRY_TIMEOUT": "0.1"})
    wait_for(lambda: events_named(worker, "pulling_paused"))
    worker.publish(order(1))
    sandbox.klaviyo.faults.clear()
    wait_for(lambda: len(settled(worker)) == 2)
    assert events_named(worker, "pulling_resumed")
    stop(process)
