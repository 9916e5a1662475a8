"""Bulk writes of catalog entries over real sockets: creations, updates and deletions."""

from __future__ import annotations

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.integration.conftest import klaviyo_for
from tests.support.sender import Sender
from worker.errors import JobUnfinished, Rejected, Transient
from worker.model import Operation, OperationKind
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.send import jobs
from worker.transform.catalog import catalog_id

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMON = {"integration_type": "$custom", "catalog_type": "$default", "description": "", "url": "None"}


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


@pytest.fixture
def sender(sandbox: Sandbox) -> Sender:
    return Sender(klaviyo_for(sandbox), 4)


def category(number: int, kind: OperationKind = OperationKind.UPSERT_CATEGORY, name: str = "Shirts") -> Operation:
    attributes = {"external_id": f"c{number}", "name": name, "integration_type": "$custom", "catalog_type": "$default"}
    return Operation(kind, f"c{number}", {"type": "catalog-category", "attributes": attributes})


def item(number: int, title: Any = "Shirt") -> Operation:
    attributes = COMMON | {"external_id": f"p{number}", "title": title}
    related = {"categories": {"data": [{"type": "catalog-category", "id": catalog_id(f"c{number % 30}")}]}}
    resource = {"type": "catalog-item", "attributes": attributes, "relationships": related}
    return Operation(OperationKind.UPSERT_ITEM, f"p{number}", resource)


def variant(number: int, parent: int | None = None, stock: Any = 1, title: str = "M") -> Operation:
    sku = f"s{number}"
    attributes = COMMON | {"external_id": sku, "sku": sku, "title": title, "price": 1.0, "inventory_quantity": stock}
    of = {"item": {"data": {"type": "catalog-item", "id": catalog_id(f"p{number if parent is None else parent}")}}}
    return Operation(
        OperationKind.UPSERT_VARIANT, sku, {"type": "catalog-variant", "attributes": attributes, "relationships": of}
    )


def stock(number: int, quantity: int, *fallback: Operation) -> Operation:
    resource = {
        "type": "catalog-variant",
        "id": catalog_id(f"s{number}"),
        "attributes": {"inventory_quantity": quantity},
    }
    return Operation(OperationKind.UPDATE_INVENTORY, f"s{number}", resource, fallback=lambda: fallback)


def products(number: int, **more: Any) -> list[Operation]:
    needed = [category(each, OperationKind.ENSURE_CATEGORY) for each in range(30)]
    return [*map(variant, range(number)), *(item(each, **more) for each in range(number)), *needed]


def calls(sandbox: Sandbox) -> Counter[str]:
    found: Counter[str] = Counter()
    for request in sandbox.klaviyo.requests:
        parts = request.path.split("/")
        found[f"{request.method} {parts[2].removeprefix('catalog-')}{'/…' * (len(parts) > 3)}"] += 1
    return found


def test_whole_catalog_is_sent_in_jobs_of_a_hundred(sandbox: Sandbox, sender: Sender) -> None:
    """Each lookup, job and poll costs one request. The order is categories, items, variants."""
    assert sender.send(products(250)) == [None] * 530
    assert (len(sandbox.account.categories), len(sandbox.account.items), len(sandbox.account.variants)) == (
        30,
        250,
        250,
    )
    made = calls(sandbox)
    assert made["POST category-bulk-create-jobs"] == 1
    assert made["POST item-bulk-create-jobs"] == made["POST variant-bulk-create-jobs"] == 3
    assert made["GET item-bulk-create-jobs/…"] == 3
    assert made["GET items"] <= 4
    assert not {"POST items", "POST variants", "POST categories"} & made.keys()


def test_existing_entries_are_updated(sandbox: Sandbox, sender: Sender) -> None:
    """They are known from earlier writes, or the lookup finds them. An ensured category keeps its name."""
    sender.send(products(50))
    sandbox.klaviyo.requests.clear()
    Sender(klaviyo_for(sandbox), 4).send([*products(60, title="New"), *(category(n, name="Hats") for n in range(5))])
    assert {entry["attributes"]["title"] for entry in sandbox.account.items.values()} == {"New"}
    names = Counter(entry["attributes"]["name"] for entry in sandbox.account.categories.values())
    assert names == {"Hats": 5, "Shirts": 25}
    made = calls(sandbox)
    assert made["POST item-bulk-update-jobs"] == 1
    assert made["POST items"] == 0
    sandbox.klaviyo.requests.clear()
    sender.send(products(50, title="Newer"))
    assert "GET items" not in calls(sandbox)


def test_entry_created_after_the_lookup_is_updated(sandbox: Sandbox, sender: Sender) -> None:
    """Another worker can create an entry between the lookup and the job."""
    Sender(klaviyo_for(sandbox), 4).send(products(40))
    for path in ("items", "variants", "categories"):
        sandbox.klaviyo.faults.add(Fault(match=f"GET /api/catalog-{path}", status=200, body=b'{"data":[]}'))
    assert sender.send(products(40, title="New")) == [None] * 110
    assert {entry["attributes"]["title"] for entry in sandbox.account.items.values()} == {"New"}


def test_known_entry_that_was_deleted_is_created(sandbox: Sandbox, sender: Sender) -> None:
    """Another process can delete an entry that this process knows."""
    sender.send(products(40))
    for number in range(7):
        sandbox.account.delete_entry("catalog-item", catalog_id(f"p{number}"))
    assert sender.send(products(40, title="New")) == [None] * 110
    assert len(sandbox.account.items) == len(sandbox.account.variants) == 40


def test_invalid_entry_does_not_affect_the_others(sandbox: Sandbox, sender: Sender) -> None:
    """An entry that makes Klaviyo reject the job, or that fails in the job, gets its own result."""
    batch = products(50)
    batch[3] = variant(3, stock="many")
    batch[4] = variant(4, parent=999)
    batch[50 + 20] = item(20, title=20)
    results = sender.send(batch)
    bad = [number for number, result in enumerate(results) if isinstance(result, Rejected)]
    assert bad == [3, 4, 20, 70]  # 20: Klaviyo does not have its item
    assert len(sandbox.account.items) == 49
    assert len(sandbox.account.variants) == 47


def test_deletions_are_sent_in_jobs(sandbox: Sandbox, sender: Sender) -> None:
    """A deletion succeeds if the entry was never in Klaviyo."""
    sender.send(products(60))
    sandbox.klaviyo.requests.clear()
    keys = [f"p{number}" for number in range(70)]
    operations = [
        Operation(kind, key)
        for key in keys
        for kind in (OperationKind.DELETE_STALE_VARIANTS, OperationKind.DELETE_ITEM)
    ]
    operations += [Operation(OperationKind.DELETE_CATEGORY, f"c{number}") for number in range(30)]
    assert sender.send(operations) == [None] * 170
    assert (sandbox.account.categories, sandbox.account.items, sandbox.account.variants) == ({}, {}, {})
    made = calls(sandbox)
    assert made["POST item-bulk-delete-jobs"] == made["POST variant-bulk-delete-jobs"] == 1
    assert made["DELETE items/…"] == 10
    assert "DELETE variants/…" not in made
    sandbox.klaviyo.requests.clear()
    assert sender.send(products(60)) == [None] * 150
    assert not [call for call in calls(sandbox) if "bulk-update" in call]  # none of them is still known


def test_variants_that_moved_to_another_product_are_kept(sandbox: Sandbox, sender: Sender) -> None:
    """The variants of the old products are deleted before those of the new products are written."""
    sender.send(products(40))
    moved = [variant(number, parent=39 - number) for number in range(40)]
    stale = [
        Operation(OperationKind.DELETE_STALE_VARIANTS, f"p{number}", keep_skus=frozenset({f"s{39 - number}"}))
        for number in range(40)
    ]
    assert sender.send([*moved, *stale]) == [None] * 80
    assert {entry["item"] for entry in sandbox.account.variants.values()} == {catalog_id(f"p{n}") for n in range(40)}
    assert sandbox.account.variants["s0"]["item"] == catalog_id("p39")


def test_stock_is_sent_in_a_job_with_missing_products(sandbox: Sandbox, sender: Sender) -> None:
    """If the variant is missing, the whole product is written. If there is no product, nothing is written."""
    sender.send(products(50))
    sandbox.klaviyo.requests.clear()
    changes = [stock(number, 7) for number in range(50)]
    changes += [stock(50, 7, item(50), variant(50, stock=7)), stock(51, 7)]
    assert sender.send(changes) == [None] * 52
    assert {entry["attributes"]["inventory_quantity"] for entry in sandbox.account.variants.values()} == {7}
    assert len(sandbox.account.variants) == 51
    assert calls(sandbox)["POST variant-bulk-update-jobs"] == 1


def test_variant_and_its_stock_in_one_batch_are_one_entry(sandbox: Sandbox, sender: Sender) -> None:
    """A job names each entry once. The write of the variant includes the stock."""
    sender.send(products(20))
    both = [*(variant(n, stock=9, title="L") for n in range(20)), *(stock(n, 9) for n in range(20))]
    assert sender.send(both) == [None] * 40
    variants = [entry["attributes"] for entry in sandbox.account.variants.values()]
    assert {(each["inventory_quantity"], each["title"]) for each in variants} == {(9, "L")}
    assert calls(sandbox)["POST variant-bulk-update-jobs"] == 1


@pytest.mark.parametrize(
    "match",
    ["GET /api/catalog-items", "POST /api/catalog-item-bulk-create-jobs", "GET /api/catalog-item-bulk-create-jobs"],
)
def test_outage_fails_all_entries_and_the_retry_succeeds(match: str, sandbox: Sandbox) -> None:
    """The outage is in the lookup, the job or the poll."""
    sandbox.klaviyo.faults.add(Fault(match=match, times=None))
    sender = Sender(klaviyo_for(sandbox, retry_timeout=0.1), 4, job_timeout=1.0)
    results = sender.send([item(number) for number in range(20)])
    assert all(isinstance(result, Transient) for result in results)
    sandbox.klaviyo.faults.clear()
    assert sender.send(products(20)) == [None] * 70


def test_unfinished_job_does_not_affect_a_complete_one(sandbox: Sandbox) -> None:
    """The second job is polled at least once, even if the first one used up the timeout."""
    sandbox.klaviyo.faults.add(
        Fault(match="POST /api/catalog-category-bulk-create-jobs", status=202, body=b'{"data":{"id":"J"}}'),
        Fault(
            match="GET /api/catalog-category-bulk-create-jobs/J", status=200, body=b'{"data":{"id":"J"}}', times=None
        ),
    )
    sender = Sender(klaviyo_for(sandbox), 4, job_timeout=0.5)
    results = sender.send([category(number) for number in range(110)])
    assert [type(result) for result in results] == [JobUnfinished] * 100 + [type(None)] * 10
    assert len(sandbox.account.categories) == 10
    assert calls(sandbox)["POST categories"] == 0


@pytest.mark.parametrize(
    "shown",
    [
        {"status": "complete", "failed_count": 1, "errors": None},
        {"status": "complete", "failed_count": 1, "errors": [{"meta": {"external_id": catalog_id("c3")}}]},
    ],
)
def test_job_with_incomplete_errors_is_sent_individually(
    shown: dict[str, Any], sandbox: Sandbox, sender: Sender
) -> None:
    """If the errors do not name all failed entries, none counts as written."""
    path = "/api/catalog-category-bulk-create-jobs"
    job = {"type": "catalog-category-bulk-create-job", "id": "J", "attributes": shown}
    body = orjson.dumps({"data": job})
    sandbox.klaviyo.faults.add(
        Fault(match=f"POST {path}", status=202, body=body), Fault(match=f"GET {path}", status=200, body=body)
    )
    assert sender.send([category(number) for number in range(20)]) == [None] * 20
    assert len(sandbox.account.categories) == 20


def test_stopping_worker_starts_no_more_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker would not wait for such a job, which could overwrite newer data of another worker."""
    monkeypatch.setattr(jobs, "MAX_CONCURRENT_JOBS", 1)
    with Sandbox(account=Account(job_seconds=60.0)) as sandbox, ThreadPoolExecutor(1) as lane:
        stopping = Event()
        sender = Sender(klaviyo_for(sandbox), 4, stopping=stopping)
        sending = lane.submit(sender.send, [category(number) for number in range(300)])
        while not calls(sandbox)["GET category-bulk-create-jobs/…"]:
            time.sleep(0.01)
        stopping.set()
        errors = sending.result(60.0)
        assert [type(error) for error in errors] == [JobUnfinished] * 100 + [Transient] * 200
        assert calls(sandbox)["POST category-bulk-create-jobs"] == 1


def test_category_that_failed_is_not_known_to_exist(sandbox: Sandbox) -> None:
    """If the category counted as existing, its items would be rejected and dead-lettered."""
    sandbox.klaviyo.faults.add(Fault(match="POST /api/catalog-category-bulk-create-jobs", times=None))
    sender = Sender(klaviyo_for(sandbox, retry_timeout=0.1), 4)
    needed = [category(number, OperationKind.ENSURE_CATEGORY) for number in range(30)]
    assert all(isinstance(result, Transient) for result in sender.send(needed))
    sandbox.klaviyo.faults.clear()
    assert sender.send(products(40)) == [None] * 110
    assert len(sandbox.account.categories) == 30


def test_outage_while_variants_are_listed_fails_their_item_only(sandbox: Sandbox) -> None:
    """No variant is deleted without a list, and the other items succeed."""
    sender = Sender(klaviyo_for(sandbox, retry_timeout=0.1), 4)
    sender.send(products(20))
    sandbox.klaviyo.faults.add(Fault(match=re.escape(f"GET /api/catalog-items/{catalog_id('p3')}"), times=None))
    results = sender.send([Operation(OperationKind.DELETE_STALE_VARIANTS, f"p{number}") for number in range(20)])
    assert [number for number, result in enumerate(results) if result] == [3]
    assert isinstance(results[3], Transient)
    assert list(sandbox.account.variants) == ["s3"]


def test_rejected_lookup_sends_the_entries_individually(sandbox: Sandbox, sender: Sender) -> None:
    """If Klaviyo rejects the filter, no record is at fault."""
    sandbox.klaviyo.faults.add(Fault(match="GET /api/catalog-items", status=400))
    assert sender.send([item(number) for number in range(0, 600, 30)] + [category(0)]) == [None] * 21
    assert calls(sandbox)["POST items"] == 20


def test_few_entries_are_sent_individually(sandbox: Sandbox, sender: Sender) -> None:
    """A kind of operation is sent in a job only if there are more than the threshold."""
    sender.send([*(category(number) for number in range(11)), *(item(number) for number in range(10))])
    made = calls(sandbox)
    assert (made["POST category-bulk-create-jobs"], made["POST categories"]) == (1, 0)
    assert (made["POST item-bulk-create-jobs"], made["POST items"]) == (0, 10)
