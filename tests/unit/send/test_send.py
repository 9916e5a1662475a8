"""The send stage: phases, conflicts, individual operations."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.sender import Sender
from worker.errors import KlaviyoMisconfigured, Rejected, Transient
from worker.model import Json, Operation, OperationKind
from worker.send import request_for
from worker.transform.catalog import catalog_id

if TYPE_CHECKING:
    from worker.klaviyo.client import Body

NOT_FOUND = Rejected("missing", 404)
CONFLICT = Rejected("exists", 409)


class Klaviyo:
    """A fake with scripted responses per `METHOD path`, which it returns or raises in order; {} without one."""

    def __init__(self, **answers: Any) -> None:
        self.script: dict[str, deque[Any]] = defaultdict(deque)
        self.calls: list[tuple[str, Json | None]] = []
        self._lock = threading.Lock()

    def answer(self, call: str, *answers: Any) -> None:
        self.script[call].extend(answers)

    def requests_sent(self) -> int:
        return len(self.calls)

    def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        name = f"{method} {path}"
        with self._lock:
            assert body is None or isinstance(body, dict)
            self.calls.append((name, body))
            answer: Any = self.script[name].popleft() if self.script[name] else {}
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict)
        return answer

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def klaviyo() -> Klaviyo:
    return Klaviyo()


@pytest.fixture
def sender(klaviyo: Klaviyo) -> Sender:
    return Sender(klaviyo, max_requests=4)


def event(key: str) -> Operation:
    return Operation(OperationKind.CREATE_EVENT, key, {"type": "event", "attributes": {"unique_id": key}})


def entry(kind: OperationKind, key: str, **more: Any) -> Operation:
    resource = {
        "type": "catalog-x",
        "attributes": {"external_id": key, "integration_type": "$custom", "catalog_type": "$default", "title": "T"},
        "relationships": {"r": {}},
    }
    if kind is OperationKind.UPSERT_GUEST:
        resource = {"type": "profile", "attributes": {"email": key, "first_name": "N"}}
    return Operation(kind, key, resource, **more)


ITEM = f"/api/catalog-items/{catalog_id('p')}"
VARIANT = f"/api/catalog-variants/{catalog_id('s')}"
CATEGORY = f"/api/catalog-categories/{catalog_id('c')}"


def test_results_have_the_order_of_the_operations(sender: Sender, klaviyo: Klaviyo) -> None:
    """Each operation gets its own result, even if operations run concurrently."""
    klaviyo.answer("POST /api/events", *[{}] * 3)
    operations = [entry(OperationKind.UPSERT_ITEM, "p"), *(event(str(number)) for number in range(20))]
    error = Rejected("no", 400)
    klaviyo.answer("POST /api/catalog-items", error)
    assert sender.send(operations) == [error, *[None] * 20]


def test_operations_with_the_same_key_are_sent_once(sender: Sender, klaviyo: Klaviyo) -> None:
    """Only the last of several operations with the same key is sent."""
    old = Operation(OperationKind.UPSERT_CATEGORY, "c", {"type": "catalog-category", "attributes": {"name": "old"}})
    new = Operation(OperationKind.UPSERT_CATEGORY, "c", {"type": "catalog-category", "attributes": {"name": "new"}})
    assert sender.send([old, new]) == [None, None]
    assert klaviyo.calls == [("POST /api/catalog-categories", {"data": new.resource})]


def test_phases_run_in_order(sender: Sender, klaviyo: Klaviyo) -> None:
    """Categories are written before items, items before variants, and deletions come last."""
    sender.send(
        [
            Operation(OperationKind.DELETE_ITEM, "gone"),
            Operation(OperationKind.DELETE_STALE_VARIANTS, "p", keep_skus=frozenset({"s"})),
            entry(OperationKind.UPSERT_VARIANT, "s"),
            entry(OperationKind.UPSERT_ITEM, "p"),
            entry(OperationKind.ENSURE_CATEGORY, "c"),
        ]
    )
    assert [name.split("?")[0] for name in klaviyo.names] == [
        "POST /api/catalog-categories",
        "POST /api/catalog-items",
        f"GET {ITEM}/variants",
        "POST /api/catalog-variants",
        f"DELETE /api/catalog-items/{catalog_id('gone')}",
    ]


def test_existing_entry_is_updated_without_create_only_attributes(sender: Sender, klaviyo: Klaviyo) -> None:
    """A conflict on creation leads to an update."""
    klaviyo.answer("POST /api/catalog-items", CONFLICT)
    assert sender.send([entry(OperationKind.UPSERT_ITEM, "p")]) == [None]
    update = {"type": "catalog-x", "id": catalog_id("p"), "attributes": {"title": "T"}, "relationships": {"r": {}}}
    assert klaviyo.calls[1] == (f"PATCH {ITEM}", {"data": update})


def test_update_of_a_variant_has_no_relationships(sender: Sender, klaviyo: Klaviyo) -> None:
    """Klaviyo accepts no relationships in the update of a variant."""
    klaviyo.answer("POST /api/catalog-variants", CONFLICT)
    assert sender.send([entry(OperationKind.UPSERT_VARIANT, "s")]) == [None]
    name, body = klaviyo.calls[1]
    assert name == f"PATCH {VARIANT}"
    assert body is not None
    assert "relationships" not in body["data"]


def test_missing_price_is_0_only_in_a_new_variant(sender: Sender, klaviyo: Klaviyo) -> None:
    """Klaviyo requires numbers in a new variant. In an existing one, a price of 0 would start price-drop mails."""
    values = {"price": None, "inventory_quantity": None, "inventory_policy": 2}
    resource = {"type": "catalog-variant", "attributes": {"external_id": "s", **values}}
    klaviyo.answer("POST /api/catalog-variants", CONFLICT)
    assert sender.send([Operation(OperationKind.UPSERT_VARIANT, "s", resource)]) == [None]
    (_, created), (_, updated) = klaviyo.calls
    assert created is not None
    assert updated is not None
    assert created["data"]["attributes"] == {"external_id": "s", **values, "price": 0, "inventory_quantity": 0}
    assert updated["data"]["attributes"] == {"inventory_policy": 2}


def test_known_entry_costs_one_request(sender: Sender, klaviyo: Klaviyo) -> None:
    """An entry that this process has written is updated immediately. If it no longer exists, it is created again."""
    sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    assert klaviyo.names == ["POST /api/catalog-items", f"PATCH {ITEM}"]
    klaviyo.answer(f"PATCH {ITEM}", NOT_FOUND)
    assert sender.send([entry(OperationKind.UPSERT_ITEM, "p")]) == [None]
    assert klaviyo.names[2:] == [f"PATCH {ITEM}", "POST /api/catalog-items"]


def test_deleted_entry_is_no_longer_known(sender: Sender, klaviyo: Klaviyo) -> None:
    """A product that is published again after its deletion is created."""
    sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    sender.send([Operation(OperationKind.DELETE_ITEM, "p")])
    sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    assert klaviyo.names == ["POST /api/catalog-items", f"DELETE {ITEM}", "POST /api/catalog-items"]


def test_entry_deleted_between_two_requests_is_a_transient_error(sender: Sender, klaviyo: Klaviyo) -> None:
    """Another worker can delete an entry between the failed creation and the update."""
    klaviyo.answer("POST /api/catalog-items", CONFLICT)
    klaviyo.answer(f"PATCH {ITEM}", NOT_FOUND)
    (error,) = sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    assert isinstance(error, Transient)


def test_ensured_category_is_created_once_and_never_updated(sender: Sender, klaviyo: Klaviyo) -> None:
    """A product only needs the category to exist. The category's own messages set its name."""
    klaviyo.answer("POST /api/catalog-categories", CONFLICT)
    for _ in range(3):
        assert sender.send([entry(OperationKind.ENSURE_CATEGORY, "c")]) == [None]
    assert klaviyo.names == ["POST /api/catalog-categories"]


def related(kind: OperationKind, key: str, name: str, data: object) -> Operation:
    operation = entry(kind, key)
    return replace(operation, resource=(operation.resource or {}) | {"relationships": {name: {"data": data}}})


def test_remembered_category_that_was_deleted_is_created(sender: Sender, klaviyo: Klaviyo) -> None:
    """A new product must not be dead-lettered because its category was deleted in Klaviyo."""
    category = entry(OperationKind.ENSURE_CATEGORY, "c")
    item = related(OperationKind.UPSERT_ITEM, "p", "categories", [{"type": "catalog-category", "id": catalog_id("c")}])
    assert sender.send([category]) == [None]
    klaviyo.answer("POST /api/catalog-items", NOT_FOUND)
    klaviyo.calls.clear()
    missing, error = sender.send([category, item])
    assert missing is None
    assert isinstance(error, Transient)
    assert sender.send([category, item]) == [None, None]
    assert klaviyo.names == ["POST /api/catalog-items", "POST /api/catalog-categories", "POST /api/catalog-items"]


def test_variant_of_a_remembered_item_that_was_deleted_is_a_transient_error(sender: Sender, klaviyo: Klaviyo) -> None:
    """The next attempt creates the item. If the item was never written, the rejection of the variant is final."""
    item = entry(OperationKind.UPSERT_ITEM, "p")
    parent = {"type": "catalog-item", "id": catalog_id("p")}
    variant = related(OperationKind.UPSERT_VARIANT, "s", "item", parent)
    klaviyo.answer("POST /api/catalog-variants", NOT_FOUND, NOT_FOUND)
    assert sender.send([variant]) == [NOT_FOUND]
    assert sender.send([item]) == [None]
    (error,) = sender.send([variant])
    assert isinstance(error, Transient)


def test_category_that_could_not_be_created_is_not_known(sender: Sender, klaviyo: Klaviyo) -> None:
    """The next product with this category creates it."""
    klaviyo.answer("POST /api/catalog-categories", Transient("503"))
    (error,) = sender.send([entry(OperationKind.ENSURE_CATEGORY, "c")])
    assert isinstance(error, Transient)
    assert sender.send([entry(OperationKind.ENSURE_CATEGORY, "c")]) == [None]
    assert klaviyo.names == ["POST /api/catalog-categories"] * 2


@pytest.mark.parametrize(
    ("kind", "path"),
    [(OperationKind.DELETE_ITEM, ITEM), (OperationKind.DELETE_CATEGORY, CATEGORY)],
    ids=["item", "category"],
)
def test_deletion_of_a_missing_entry_succeeds(kind: OperationKind, path: str, sender: Sender, klaviyo: Klaviyo) -> None:
    """A redelivered deletion has no second effect."""
    key = path[-1]
    klaviyo.answer(f"DELETE {path}", NOT_FOUND, Rejected("no", 400))
    assert sender.send([Operation(kind, key)]) == [None]
    (error,) = sender.send([Operation(kind, key)])
    assert isinstance(error, Rejected)


def test_stale_variants_are_deleted_page_by_page(sender: Sender, klaviyo: Klaviyo) -> None:
    """Klaviyo lists at most 100 variants per page."""
    first = f"GET {ITEM}/variants?fields%5Bcatalog-variant%5D=id"
    following = f"/api/catalog-items/{catalog_id('p')}/variants?page%5Bcursor%5D=2"
    klaviyo.answer(
        first,
        {
            "data": [{"id": catalog_id("s")}, {"id": catalog_id("old 1")}],
            "links": {"next": f"https://a.klaviyo.com{following}"},
        },
    )
    klaviyo.answer(f"GET {following}", {"data": [{"id": catalog_id("old/2")}], "links": {"next": None}})
    assert sender.send([Operation(OperationKind.DELETE_STALE_VARIANTS, "p", keep_skus=frozenset({"s"}))]) == [None]
    deleted = [name for name in klaviyo.names if name.startswith("DELETE")]
    assert deleted == [
        "DELETE /api/catalog-variants/$custom:::$default:::old%201",
        "DELETE /api/catalog-variants/$custom:::$default:::old%2F2",
    ]


def test_sku_that_moves_to_another_product_is_kept(sender: Sender, klaviyo: Klaviyo) -> None:
    """In one batch, the variants of the old product are deleted before those of the new product are written."""
    variants = f"GET {ITEM}/variants?fields%5Bcatalog-variant%5D=id"
    klaviyo.answer(variants, {"data": [{"id": catalog_id("s")}]})
    sender.send([entry(OperationKind.UPSERT_VARIANT, "s"), Operation(OperationKind.DELETE_STALE_VARIANTS, "p")])
    assert klaviyo.names == [variants, f"DELETE {VARIANT}", "POST /api/catalog-variants"]


def test_missing_item_has_no_stale_variants(sender: Sender, klaviyo: Klaviyo) -> None:
    """The deletion of a product that was never synced succeeds."""
    klaviyo.answer(f"GET {ITEM}/variants?fields%5Bcatalog-variant%5D=id", NOT_FOUND)
    assert sender.send([Operation(OperationKind.DELETE_STALE_VARIANTS, "p")]) == [None]


def test_stock_of_a_missing_variant_writes_the_whole_product(sender: Sender, klaviyo: Klaviyo) -> None:
    """A stock change before the first sync of the product is not lost."""
    klaviyo.answer(f"PATCH {VARIANT}", NOT_FOUND, NOT_FOUND)
    whole = [entry(OperationKind.UPSERT_ITEM, "p"), entry(OperationKind.UPSERT_VARIANT, "s")]
    stock = Operation(OperationKind.UPDATE_INVENTORY, "s", {"type": "catalog-variant"}, fallback=lambda: whole)
    assert sender.send([stock]) == [None]
    assert klaviyo.names == [f"PATCH {VARIANT}", "POST /api/catalog-items", "POST /api/catalog-variants"]
    assert sender.send([Operation(OperationKind.UPDATE_INVENTORY, "s", {"type": "catalog-variant"})]) == [None]


@pytest.mark.parametrize("kind", OperationKind)
@pytest.mark.parametrize("error", [Transient("503"), KlaviyoMisconfigured("401")], ids=["transient", "misconfigured"])
def test_every_operation_reports_an_outage(kind: OperationKind, error: Exception, klaviyo: Klaviyo) -> None:
    """If Klaviyo does not respond, every kind of operation returns the error."""

    def unavailable(method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        raise error

    klaviyo.call = unavailable  # type: ignore[method-assign]
    assert Sender(klaviyo, max_requests=1).send([entry(kind, "k")]) == [error]


@pytest.mark.parametrize("kind", OperationKind)
def test_every_operation_has_a_request_to_show(kind: OperationKind) -> None:
    """`klaviyo-worker transform` can print every kind of operation."""
    request = request_for(entry(kind, "k"))
    assert request.path.startswith("/api/")
    assert request.method in {"GET", "POST", "PATCH", "DELETE"}


def test_events_do_not_wait_for_throttled_deletions() -> None:
    """Klaviyo accepts 60 deletions a minute. Events are sent in the meantime."""
    may_delete, deleting = threading.Event(), threading.Semaphore(0)

    class Slow(Klaviyo):
        def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
            if path.startswith("/api/profiles?"):
                deleting.release()
                assert may_delete.wait(60)
            return super().call(method, path, body, idempotent=idempotent)

    sender = Sender(Slow(), max_requests=2)
    with ThreadPoolExecutor(2) as lanes:
        erasures = lanes.submit(sender.send, [Operation(OperationKind.DELETE_PROFILE, str(each)) for each in range(4)])
        assert all(deleting.acquire(timeout=60) for _ in range(2))
        assert lanes.submit(sender.send, [event("a"), event("b")]).result(5.0) == [None, None]
        may_delete.set()
        assert erasures.result(5.0) == [None] * 4
