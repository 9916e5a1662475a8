"""A backfill that is killed or stopped and then continued, while the worker runs."""

from __future__ import annotations

import json
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.acceptance.conftest import Worker
from tests.acceptance.test_run import stop
from tests.integration.commands.test_backfill import backfill, keep_pytest_signal_handlers  # noqa: F401 - a fixture
from tests.support.waiting import wait_for
from worker.sandbox import Sandbox
from worker.sandbox.commercetools.sample_shop import sample_shop
from worker.sandbox.commercetools.shop import Shop
from worker.sandbox.notifications import change, message

if TYPE_CHECKING:
    from pathlib import Path

NUMBER = 60
ONE_BY_ONE = {"KLAVIYO_WORKER_RATE_LIMIT_SHARE": "1", "KLAVIYO_WORKER_BULK_THRESHOLD": "100000"}


def shop() -> Shop:
    """Return a shop with NUMBER shipped orders of three lines, and a customer per order."""
    template = sample_shop()
    (order,) = (order for order in template.orders.values() if len(order["lineItems"]) == 3)
    buyer = template.customers[order["customerId"]]
    made = Shop(categories=template.categories, products=template.products)
    for number in range(NUMBER):
        lines = [line | {"id": f"line-{number}-{index}"} for index, line in enumerate(order["lineItems"])]
        customer = buyer | {"id": f"customer-{number}", "email": f"c{number}@mail.example"}
        customer |= {"customerNumber": f"C-{number}", "addresses": []}  # events do not contain the number
        made.customers[customer["id"]] = customer
        made.orders[f"order-{number}"] = {name: value for name, value in order.items() if name != "paymentInfo"} | {
            "id": f"order-{number}",
            "customerId": customer["id"],
            "customerEmail": customer["email"],
            "lineItems": lines,
            "shipmentState": "Shipped",
        }
    return made


def checkpoint(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {"last_id": ""}


def test_continued_backfill_beside_the_worker_loses_and_duplicates_nothing(tmp_path: Path) -> None:
    """Orders and customers are each killed with kill -9 after the first checkpoint."""
    with Sandbox(shop=shop()) as sandbox:
        worker = Worker(sandbox.environment | ONE_BY_ONE | {"QUEUE_URL": f"embedded://{tmp_path}/queue.db"}, tmp_path)
        sandbox.klaviyo.latency = 0.2
        orders = sandbox.shop.orders.values()
        live = worker.start("run", "--http-port", "0")
        for name in ("orders", "customers"):
            path = tmp_path / f"{name}.json"
            killed = worker.start(
                "backfill", name, "--checkpoint", str(path), "--max-batch", "5", "--max-requests", "4"
            )
            for order in list(orders)[::7]:
                worker.publish(
                    message("OrderCreated", "order", order["id"], order=order),
                    message("OrderShipmentStateChanged", "order", order["id"], shipmentState="Shipped"),
                    change("ResourceUpdated", "customer", order["customerId"]),
                )
            wait_for(lambda path=path: checkpoint(path)["last_id"])
            killed.kill()
            killed.wait()
            assert 0 < checkpoint(path)["sent"] < NUMBER, name
            done = backfill(sandbox, name, "--checkpoint", str(path))
            assert done.exit_code == 0, done.stderr
            assert f"{name}: {NUMBER} done: {NUMBER} sent, 0 ignored, 0 failed" in done.stderr
        stop(live)
        found = Counter((event["metric"], event["unique_id"]) for event in sandbox.account.events)
        expected = Counter((metric, order["id"]) for order in orders for metric in ("Placed Order", "Fulfilled Order"))
        expected += Counter(("Ordered Product", line["id"]) for order in orders for line in order["lineItems"])
        assert found == expected
        numbers = Counter(p["attributes"]["properties"].get("customerNumber") for p in sandbox.account.profiles)
        assert numbers == Counter(customer["customerNumber"] for customer in sandbox.shop.customers.values())


def test_sigterm_finishes_the_records_in_flight(tmp_path: Path) -> None:
    """The exit code is 7; the next run sends the rest and nothing twice."""
    with Sandbox(shop=shop()) as sandbox:
        worker = Worker(sandbox.environment | ONE_BY_ONE, tmp_path)
        sandbox.klaviyo.latency = 0.2
        arguments = ("backfill", "customers", "--checkpoint", str(tmp_path / "c.json"), "--max-batch", "2")
        process = worker.start(*arguments)
        wait_for(lambda: sandbox.account.profiles)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 7
        assert "interrupted: run the same command to continue" in worker.log.read_text()
        assert 0 < len(sandbox.account.profiles) < NUMBER
        sandbox.klaviyo.latency = 0.0
        assert backfill(sandbox, *arguments[1:]).exit_code == 0
        imports = [r for r in sandbox.klaviyo.requests if (r.method, r.path) == ("POST", "/api/profiles")]
        assert len(sandbox.account.profiles) == NUMBER
        assert len(imports) < NUMBER + 20
