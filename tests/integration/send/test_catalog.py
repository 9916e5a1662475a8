"""Bulk writes of catalog entries over real sockets: creations, updates and deletions."""

from __future__ import annotations

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any

import orjson
import pytest

from tests.integration.conftest import klaviyo_for
from tests.support.sender import Sender
from worker import send
from worker.errors import JobUnfinished, Rejected, Transient
from worker.model import Operation, OperationKind
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.send import jobs
from worker.transform.catalog import CATEGORY_IDS_HASH, catalog_id

COMMON = {"integration_type": "$custom", "catalog_type": "$default", "description": "", "url": "None"}


@pytest.fixture
def sender(sandbox: Sandbox) -> Sender:
    return Sender(klaviyo_for(sandbox), 4)


def category(number: int, kind: OperationKind = OperationKind.UPSERT_CATEGORY, name: str = "Shirts") -> Operation:
    attributes = {"external_id": f"c{number}", "name": name, "integration_type": "$custom", "catalog_type": "$default"}
    return Operation(kind, f"c{number}", {"type": "catalog-category", "attributes": attributes})


def item(number: int, title: Any = "Shirt") -> Operation:
    metadata = {CATEGORY_IDS_HASH: f"hash of c{number % 30}"}
    attributes = COMMON | {"external_id": f"p{number}", "title": title, "custom_metadata": metadata}
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


def stock(number: int, quantity: int) -> Operation:
    resource = {
        "type": "catalog-variant",
        "id": catalog_id(f"s{number}"),
        "attributes": {"inventory_quantity": quantity},
    }
    return Operation(OperationKind.UPDATE_INVENTORY, f"s{number}", resource)


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
    """Only what differs is written. An ensured category keeps its name."""
    sender.send(products(50))
    sandbox.klaviyo.requests.clear()
    Sender(klaviyo_for(sandbox), 4).send([*products(60, title="New"), *(category(n, name="Hats") for n in range(5))])
    assert {entry["attributes"]["title"] for entry in sandbox.account.items.values()} == {"New"}
    names = Counter(entry["attributes"]["name"] for entry in sandbox.account.categories.values())
    assert names == {"Hats": 5, "Shirts": 25}
    made = calls(sandbox)
    assert (made["POST item-bulk-update-jobs"], made["POST items"]) == (1, 10)
    assert (made["POST category-bulk-update-jobs"], made["PATCH categories/…"]) == (0, 5)
    assert not [name for name in made if "variant" in name and made[name] and "update" in name]


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
    assert [number for number, result in enumerate(results) if isinstance(result, Rejected)] == [3, 20, 70]
    assert [number for number, result in enumerate(results) if isinstance(result, Transient)] == [4]  # no such item yet
    assert len(sandbox.account.items) == 49
    assert len(sandbox.account.variants) == 47


def test_deletions_are_sent_in_jobs(sandbox: Sandbox, sender: Sender) -> None:
    """A deletion succeeds if the entry was never in Klaviyo."""
    sender.send(products(60))
    sandbox.klaviyo.requests.clear()
    keys = [f"p{number}" for number in range(70)]
    skus = frozenset(f"s{number}" for number in range(60))
    operations = [
        operation
        for key in keys
        for operation in (
            Operation(OperationKind.DELETE_STALE_VARIANTS, key, checked_skus=skus),
            Operation(OperationKind.DELETE_ITEM, key),
        )
    ]
    operations += [Operation(OperationKind.DELETE_CATEGORY, f"c{number}") for number in range(30)]
    assert sender.send(operations) == [None] * 170
    assert (sandbox.account.categories, sandbox.account.items, sandbox.account.variants) == ({}, {}, {})
    made = calls(sandbox)
    assert made["POST item-bulk-delete-jobs"] == made["POST variant-bulk-delete-jobs"] == 1
    assert not {"DELETE items/…", "DELETE variants/…"} & made.keys()
    sandbox.klaviyo.requests.clear()
    assert sender.send(products(60)) == [None] * 150
    assert not [call for call in calls(sandbox) if "bulk-update" in call]  # no category is still known


def test_product_is_not_written_before_its_stale_variants_are_asked_for(sandbox: Sandbox, sender: Sender) -> None:
    """All is written at once, later. Stock messages do not wait, and a category that has moved is not done."""
    sender.send([category(0), item(0), variant(0), variant(1, parent=0)])
    stale = Operation(OperationKind.DELETE_STALE_VARIANTS, "p0", keep_skus=frozenset({"s0", "s2"}))
    product = [item(0, title="New"), variant(0, title="New"), variant(2, parent=0), stale, stock(0, 7), stock(2, 7)]
    moved = replace(category(1), kind=OperationKind.MOVE_CATEGORY)
    results = send.Sender.send(sender, [*product, moved])
    assert [bool(result.error) for result in results] == [False] * 6 + [True]
    assert [result.follow_ups for result in results[2:6]] == [
        {("sku", "s2")},
        {("sku", "s1")},
        set(),
        {("sku", "s2")},
    ]
    shown = sandbox.account.variants["s0"]["attributes"]
    assert (shown["title"], shown["inventory_quantity"]) == ("M", 7)
    assert sandbox.account.items["p0"]["attributes"]["title"] == "Shirt"
    assert len(sandbox.account.variants) == 2


@pytest.mark.parametrize("number", [3, 40])
def test_variants_that_moved_to_another_product_are_moved(number: int, sandbox: Sandbox, sender: Sender) -> None:
    """Klaviyo cannot move a variant. It is deleted and created, whether or not its old product is in the batch."""
    sender.send(products(number))
    moved = [variant(each, parent=number - 1 - each) for each in range(number)]
    assert sender.send(moved) == [None] * number
    items = {entry["attributes"]["sku"]: entry["item"] for entry in sandbox.account.variants.values()}
    assert items == {f"s{each}": catalog_id(f"p{number - 1 - each}") for each in range(number)}


def test_variants_are_deleted_only_if_commercetools_was_asked_for_them(sandbox: Sandbox, sender: Sender) -> None:
    """A SKU that has moved to another product is not deleted. Its item cannot go before it."""
    sender.send([category(0), item(0), variant(0), variant(1, parent=0), variant(2, parent=0)])
    stale = Operation(OperationKind.DELETE_STALE_VARIANTS, "p0", keep_skus=frozenset({"s1"}))
    gone = Operation(OperationKind.DELETE_ITEM, "p0")
    (result, deletion) = send.Sender.send(sender, [stale, gone])
    assert result.follow_ups == {("sku", "s0"), ("sku", "s2")}
    assert (result.error, deletion.error, set(sandbox.account.variants)) == (None, None, {"s0", "s1", "s2"})
    (result,) = send.Sender.send(sender, [replace(stale, checked_skus=frozenset({"s0"}))])
    assert result.follow_ups == {("sku", "s2")}
    assert len(sandbox.account.variants) == 3
    assert sender.send([replace(stale, checked_skus=frozenset({"s0", "s2", "s9"}))]) == [None]
    assert set(sandbox.account.variants) == {"s1"}
    last = replace(stale, keep_skus=frozenset(), checked_skus=frozenset({"s1"}))
    assert sender.send([last, gone]) == [None, None]
    assert not sandbox.account.variants
    assert not sandbox.account.items


def test_stock_is_sent_in_a_job(sandbox: Sandbox, sender: Sender) -> None:
    """The variants that Klaviyo does not have are returned, because their products must be written."""
    sender.send(products(50))
    sandbox.klaviyo.requests.clear()
    results = send.Sender.send(sender, [stock(number, 7) for number in range(52)])
    assert [result.error for result in results] == [None] * 52
    assert {key for result in results for key in result.follow_ups} == {("sku", "s50"), ("sku", "s51")}
    assert {entry["attributes"]["inventory_quantity"] for entry in sandbox.account.variants.values()} == {7}
    assert calls(sandbox)["POST variant-bulk-update-jobs"] == 1
    sandbox.klaviyo.requests.clear()
    assert sender.send([stock(number, 7) for number in range(50)]) == [None] * 50
    assert calls(sandbox) == {"GET variants": 1}  # nothing differs


def test_variant_and_its_stock_in_one_batch_are_one_entry(sandbox: Sandbox, sender: Sender) -> None:
    """A job names each entry once. The write of the variant includes the stock."""
    sender.send(products(20))
    both = [*(variant(n, stock=9, title="L") for n in range(20)), *(stock(n, 9) for n in range(20))]
    assert Sender(klaviyo_for(sandbox), 4).send(both) == [None] * 40
    variants = [entry["attributes"] for entry in sandbox.account.variants.values()]
    assert {(each["inventory_quantity"], each["title"]) for each in variants} == {(9, "L")}
    assert calls(sandbox)["POST variant-bulk-update-jobs"] == 1


def test_variant_is_created_with_its_stock_and_updated_without_it(sandbox: Sandbox) -> None:
    """Stock messages write the stock of an existing variant. A late write of its product must not undo them."""
    first = Sender(klaviyo_for(sandbox), 4)
    first.send([category(0), item(0), variant(0, stock=5)])
    assert Sender(klaviyo_for(sandbox), 4).send([variant(0, stock=9, title="L")]) == [None]
    shown = sandbox.account.variants["s0"]["attributes"]
    assert (shown["title"], shown["inventory_quantity"]) == ("L", 5)
    # The process that created the variant corrects its own write, until a stock message has arrived.
    assert first.send([variant(0, stock=9, title="L")]) == [None]
    assert shown["inventory_quantity"] == 9
    first.send([stock(0, 3)])
    first.send([variant(0, stock=4, title="XL")])
    assert (shown["title"], shown["inventory_quantity"]) == ("XL", 3)


def test_untracked_stock_keeps_its_quantity(sandbox: Sandbox) -> None:
    """No message says that the stock of a variant is not tracked, so its product does."""
    Sender(klaviyo_for(sandbox), 4).send([category(0), item(0), variant(0, stock=5)])
    untracked = variant(0, stock=None)
    attributes = (untracked.resource or {})["attributes"]
    attributes["inventory_policy"] = 2
    sender = Sender(klaviyo_for(sandbox), 4)
    assert sender.send([untracked]) == [None]
    shown = sandbox.account.variants["s0"]["attributes"]
    assert (shown["inventory_quantity"], shown["inventory_policy"]) == (5, 2)
    # The reading was outdated: a stock message had been there before. The next reading shows its entry.
    tracked = variant(0, stock=7)
    (tracked.resource or {})["attributes"]["inventory_policy"] = 1
    assert sender.send([tracked]) == [None]
    assert (shown["inventory_quantity"], shown["inventory_policy"]) == (7, 1)


def test_missing_price_is_zero_only_in_the_creation_of_a_variant(sandbox: Sandbox, sender: Sender) -> None:
    """An item without a price has none. A variant keeps its price: 0 would start price-drop mails."""
    for created, expected in ((1.0, 1.0), (None, 0)):
        for price in (created, None):
            operations = [category(0), item(0), variant(0)]
            for operation in operations[1:]:
                (operation.resource or {})["attributes"]["price"] = price
            assert sender.send(operations) == [None] * 3
        assert sandbox.account.items["p0"]["attributes"]["price"] is None
        assert sandbox.account.variants["s0"]["attributes"]["price"] == expected
        sandbox.account.delete_entry("catalog-item", catalog_id("p0"))


@pytest.mark.parametrize("number", [2, 60])
def test_nothing_is_written_where_nothing_differs(number: int, sandbox: Sandbox, sender: Sender) -> None:
    """Klaviyo's lists do not show the categories of an item. Few items are asked for them, or the categories of many.

    Categories that have all items that they were asked for are not asked again.
    """
    sender.send(products(number))
    sandbox.klaviyo.requests.clear()
    assert sender.send(products(number)) == [None] * (2 * number + 30)
    assert {request.method for request in sandbox.klaviyo.requests} == {"GET"}
    assert calls(sandbox)["GET items"] == 1
    asked = Counter(request.path.rpartition("/")[2] for request in sandbox.klaviyo.requests)
    assert (asked["categories"], asked["items"]) == ((2, 0) if number == 2 else (0, 30))
    sandbox.klaviyo.requests.clear()
    assert sender.send(products(number)) == [None] * (2 * number + 30)
    assert len(sandbox.klaviyo.requests) == (3 if number == 2 else 1)


@pytest.mark.parametrize("number", [2, 60])
def test_item_without_a_hash_of_its_categories_is_asked_for_them(number: int, sandbox: Sandbox, sender: Sender) -> None:
    """It was not written by this worker. Nothing is written if its categories are right."""
    sender.send(products(number))
    for entry in sandbox.account.items.values():
        del entry["attributes"]["custom_metadata"][CATEGORY_IDS_HASH]
    sandbox.klaviyo.requests.clear()
    sender.send(products(number))
    assert {request.method for request in sandbox.klaviyo.requests} == {"GET"}
    sandbox.account.items["p1"]["categories"].append(catalog_id("c0"))
    sandbox.klaviyo.requests.clear()
    sender.send(products(number))
    assert calls(sandbox)["PATCH items/…"] == 1
    assert sandbox.account.items["p1"]["categories"] == [catalog_id("c1")]
    assert CATEGORY_IDS_HASH in sandbox.account.items["p1"]["attributes"]["custom_metadata"]


@pytest.mark.parametrize("number", [2, 60])
@pytest.mark.parametrize("exists", [True, False])
def test_items_return_to_a_category_that_another_client_deleted(
    number: int, exists: bool, sandbox: Sandbox, sender: Sender
) -> None:
    """Klaviyo takes all items out of it, and their attributes stay the same. `exists`: it was created again."""
    sender.send(products(number))
    sandbox.account.delete_entry("catalog-category", catalog_id("c1"))
    sender = Sender(klaviyo_for(sandbox), 4)
    if exists:
        sender.send([category(1)])
    assert sender.send(products(number)) == [None] * (2 * number + 30)
    assert {name: entry["categories"] for name, entry in sandbox.account.items.items()} == {
        f"p{each}": [catalog_id(f"c{each % 30}")] for each in range(number)
    }


def test_item_whose_categories_cannot_be_asked_is_asked_itself(sandbox: Sandbox, sender: Sender) -> None:
    """A category that is deleted in the meantime is no fault of its items."""
    sender.send(products(60))
    sandbox.klaviyo.faults.add(Fault(match="GET /api/catalog-categories/.*c1/items", status=404))
    sandbox.account.items["p1"]["categories"] = []
    sandbox.klaviyo.requests.clear()
    assert sender.send(products(60)) == [None] * 150
    assert sandbox.account.items["p1"]["categories"] == [catalog_id("c1")]
    made = calls(sandbox)
    assert made["PATCH items/…"] == 1
    assert made["GET items/…"] == 2, "p1 and p31, which are in c1"


def test_ensured_entries_are_created_but_not_changed(sandbox: Sandbox, sender: Sender) -> None:
    """A stock message creates a missing product, but cannot undo a newer one."""
    sender.send([category(0), item(0), variant(0)])
    late = [
        replace(item(0, title="Old"), kind=OperationKind.ENSURE_ITEM),
        replace(variant(0, title="Old"), kind=OperationKind.ENSURE_VARIANT),
        replace(variant(1, parent=0, title="Old"), kind=OperationKind.ENSURE_VARIANT),
        stock(0, 8),
    ]
    assert sender.send(late) == [None] * 4
    assert sandbox.account.items["p0"]["attributes"]["title"] == "Shirt"
    shown = sandbox.account.variants["s0"]["attributes"]
    assert (shown["title"], shown["inventory_quantity"]) == ("M", 8)
    assert sandbox.account.variants["s1"]["attributes"]["title"] == "Old"


@pytest.mark.parametrize("number", [1, 11])
def test_ensured_entries_that_were_just_created_are_not_changed(number: int, sandbox: Sandbox, sender: Sender) -> None:
    """Another process creates them between the reading and the write. Only the stock of the message is written."""
    names = range(0, 30 * number, 30)
    sender.send([category(0), *map(item, names), *map(variant, names)])
    sandbox.klaviyo.faults.add(Fault(match="GET /api/catalog-items$", status=200, body=b'{"data":[]}'))
    late = [
        *(replace(item(each, title="Old"), kind=OperationKind.ENSURE_ITEM) for each in names),
        *(replace(variant(each, title="Old"), kind=OperationKind.ENSURE_VARIANT) for each in names),
        stock(0, 8),
    ]
    assert sender.send(late) == [None] * len(late)
    shown = [entry["attributes"] for entry in sandbox.account.variants.values()]
    assert {each["title"] for each in shown} == {"M"}
    assert sorted(each["inventory_quantity"] for each in shown) == [1] * (number - 1) + [8]


def test_item_with_many_variants_is_listed(sandbox: Sandbox, sender: Sender) -> None:
    """Klaviyo documents no limit for included variants, so 100 of them are possibly not all."""
    sender.send([category(0), item(0), *(variant(each, parent=0) for each in range(120))])
    sandbox.klaviyo.requests.clear()
    everything = Operation(OperationKind.DELETE_STALE_VARIANTS, "p0")
    (result,) = send.Sender.send(sender, [everything])
    assert len(result.follow_ups) == 120
    assert calls(sandbox) == {"GET items": 1, "GET items/…": 2}


def test_incomplete_list_of_variants_moves_none(sandbox: Sandbox, sender: Sender) -> None:
    """A variant that exists, but is not among those of its item, is asked for before it is moved."""
    sender.send([category(0), item(0), variant(0)])
    shown = {"type": "catalog-item", "id": catalog_id("p0"), "relationships": {"variants": {"data": []}}}
    body = orjson.dumps({"data": [shown]})
    sandbox.klaviyo.faults.add(Fault(match="GET /api/catalog-items$", status=200, body=body))
    sandbox.klaviyo.requests.clear()
    assert sender.send([variant(0, title="L")]) == [None]
    assert sandbox.account.variants["s0"]["attributes"]["title"] == "L"
    assert calls(sandbox)["DELETE variants/…"] == 0


def test_category_that_has_moved_waits_for_its_products(sandbox: Sandbox, sender: Sender) -> None:
    """Its breadcrumb in Klaviyo shows that it has moved, so it is the last write, and only if all others succeed."""
    sender.send([category(0, name="Home > Cups")])
    moved = replace(category(0, name="Kitchen > Cups"), watches_move=True)
    (result,) = send.Sender.send(sender, [moved])
    assert result.follow_ups == {("category-products", "c0")}
    last = replace(moved, kind=OperationKind.MOVE_CATEGORY)
    failed, waiting = sender.send([item(0, title=1), last])
    assert isinstance(failed, Rejected)
    assert isinstance(waiting, Transient)
    assert sandbox.account.categories["c0"]["attributes"]["name"] == "Home > Cups"
    assert sender.send([category(0, OperationKind.ENSURE_CATEGORY), item(0), last]) == [None] * 3
    assert sandbox.account.categories["c0"]["attributes"]["name"] == "Kitchen > Cups"
    renamed = replace(category(0, name="Kitchen > Mugs"), watches_move=True)
    assert sender.send([renamed]) == [None]
    assert sandbox.account.categories["c0"]["attributes"]["name"] == "Kitchen > Mugs"


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
    sender = Sender(klaviyo_for(sandbox), 1, job_timeout=0.5)
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


def test_outage_while_an_item_is_listed_fails_this_item_only(sandbox: Sandbox) -> None:
    """No variant is deleted without a complete list, and the other items succeed."""
    sender = Sender(klaviyo_for(sandbox, retry_timeout=0.1), 4)
    sender.send([*products(20), *(variant(1_000 + each, parent=3) for each in range(100))])
    sandbox.klaviyo.faults.add(Fault(match=re.escape(f"GET /api/catalog-items/{catalog_id('p3')}"), times=None))
    checked = frozenset(sandbox.account.variants)
    stale = [Operation(OperationKind.DELETE_STALE_VARIANTS, f"p{n}", checked_skus=checked) for n in range(20)]
    results = sender.send(stale)
    assert [number for number, result in enumerate(results) if result] == [3]
    assert isinstance(results[3], Transient)
    assert len(sandbox.account.variants) == 101


@pytest.mark.parametrize("path", ["items", "variants", "categories"])
def test_rejected_filter_reads_the_entries_individually(path: str, sandbox: Sandbox, sender: Sender) -> None:
    """If Klaviyo rejects the filter, no record is at fault."""
    sandbox.klaviyo.faults.add(Fault(match=f"GET /api/catalog-{path}$", status=400, times=None))
    operations = [category(0), category(1), item(0), item(30), variant(0), variant(30), stock(0, 4), stock(1, 4)]
    for _ in range(2):
        assert sender.send(operations) == [None] * 8
    assert (len(sandbox.account.categories), len(sandbox.account.items), len(sandbox.account.variants)) == (2, 2, 2)


@pytest.mark.parametrize("number", [0, 100])
def test_item_that_is_deleted_while_it_is_read_is_created(number: int, sandbox: Sandbox, sender: Sender) -> None:
    """Its list of categories or of variants answers 404."""
    sender.send([category(0), item(0), *(variant(each, parent=0) for each in range(number))])
    sandbox.account.delete_entry("catalog-item", catalog_id("p0"))
    shown: dict[str, Any] = {"type": "catalog-item", "id": catalog_id("p0"), "attributes": {"title": "Shirt"}}
    shown["attributes"] |= {"description": "", "url": "None"}
    related = [{"type": "catalog-variant", "id": catalog_id(f"s{each}")} for each in range(number)]
    shown["relationships"] = {"variants": {"data": related}}
    sandbox.klaviyo.faults.add(
        Fault(match="GET /api/catalog-items$", status=200, body=orjson.dumps({"data": [shown]}), times=1)
    )
    assert sender.send([item(0)]) == [None]
    assert list(sandbox.account.items) == ["p0"]


def test_few_entries_are_sent_individually(sandbox: Sandbox, sender: Sender) -> None:
    """Writes of a kind are sent in a job only if there are more than the threshold."""
    sender.send([*(category(number) for number in range(11)), *(item(number) for number in range(10))])
    made = calls(sandbox)
    assert (made["POST category-bulk-create-jobs"], made["POST categories"]) == (1, 0)
    assert (made["POST item-bulk-create-jobs"], made["POST items"]) == (0, 10)
