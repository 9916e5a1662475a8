"""The scope of a refusal: one record, one endpoint, or a whole service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.conftest import Worker, log_lines
from tests.acceptance.test_run import stop, updated
from tests.support.waiting import wait_for
from worker.sandbox import Fault
from worker.sandbox.commercetools.shop import uid
from worker.sandbox.http import ApiResponse
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from worker.sandbox import Sandbox
    from worker.sandbox.http import ApiRequest

PAGE = b"<!DOCTYPE html><title>Just a moment...</title>"
SETTINGS = ("--park-retry-interval", "0.2", "--retry-timeout", "0.1", "--http-port", "0")


def placed(sandbox: Sandbox, number: int, product: str = "") -> dict[str, Any]:
    """Return a message for a new order."""
    order = sandbox.shop.orders[uid("order:three")] | {"id": f"order-{number}"}
    if product:
        order["lineItems"] = [order["lineItems"][0] | {"productId": product}]
    return message("OrderCreated", "order", order["id"], order=order)


def orders_done(worker: Worker) -> int:
    lines = log_lines(worker.log.read_text())
    return sum(line["resource_id"].startswith("order-") and line["outcome"] == "sent" for line in lines)


def test_missing_scope_stops_only_the_messages_that_need_it(worker: Worker, sandbox: Sandbox) -> None:
    """The API client cannot read payments. Orders are sent, and the refund follows when the scope is added."""
    sandbox.commercetools.faults.add(Fault(status=403, times=None, match="GET /sandbox-shop/payments"))
    refund = message("PaymentTransactionAdded", "payment", uid("payment:card"), transaction={})
    worker.publish(refund)
    process = worker.start("run", *SETTINGS)
    wait_for(lambda: "endpoint_refused" in worker.log.read_text())
    worker.publish(*[placed(sandbox, number) for number in range(20)])
    wait_for(lambda: orders_done(worker) == 20)
    assert '"parked"' not in worker.log.read_text()
    sandbox.commercetools.faults.clear()
    wait_for(lambda: len(log_lines(worker.log.read_text())) == 21)
    stop(process)
    assert worker.dead_letters() == []


def test_firewall_before_commercetools_blocks_only_one_message(worker: Worker, sandbox: Sandbox) -> None:
    """It takes the id of a product for an attack. After five tries, the message is a dead letter."""
    handle = sandbox.commercetools.handle

    def block(request: ApiRequest) -> ApiResponse:
        return ApiResponse(403, "<html>Forbidden") if "script" in str(request.query) else handle(request)

    sandbox.commercetools.handle = block
    worker.publish(placed(sandbox, 99, "<script>"), *[placed(sandbox, number) for number in range(20)])
    process = worker.start("run", *SETTINGS, "--outage-hold", "30")
    wait_for(lambda: orders_done(worker) == 20 and worker.dead_letters())
    stop(process)
    (dead,) = worker.dead_letters()
    assert "order-99" in str(dead)
    assert "403 with" in str(dead)
    assert "5 times in a row" in str(dead)
    assert '"outage"' not in worker.log.read_text()


def test_firewall_before_klaviyo_delays_no_other_order(worker: Worker, sandbox: Sandbox) -> None:
    """It refuses a first name with a page. Orders that arrive while the message is held are sent: no outage begins."""
    sandbox.klaviyo.faults.add(Fault(status=403, times=None, contains=b"<script", body=PAGE))
    blocked = placed(sandbox, 99)
    blocked["order"]["billingAddress"] = {"firstName": "<script>alert(1)</script>", "country": "DE"}
    worker.publish(blocked, *[placed(sandbox, number) for number in range(10)])
    process = worker.start("run", *SETTINGS, "--outage-hold", "30")
    wait_for(lambda: orders_done(worker) == 10 and sandbox.klaviyo.faults.triggered)
    worker.publish(*[placed(sandbox, number) for number in range(10, 15)])
    wait_for(lambda: orders_done(worker) == 15)
    wait_for(worker.dead_letters)
    stop(process)
    (dead,) = worker.dead_letters()
    assert dead["resource_id"] == "order-99"
    assert "5 times in a row" in dead["reason"]
    log = worker.log.read_text()
    assert '"outage"' not in log
    assert '"pulling_paused"' not in log


@pytest.mark.parametrize("status", [200, 403])
def test_page_of_the_authorization_server_does_not_end_the_worker(
    status: int, worker: Worker, sandbox: Sandbox
) -> None:
    """It is no refusal of the credentials."""
    sandbox.commercetools.faults.add(Fault(status=status, times=1, match="POST /oauth/token", body=PAGE))
    worker.publish(updated(next(iter(sandbox.shop.customers))))
    assert worker("run", "--once").returncode == 0
    assert len(sandbox.account.profiles) == 1
