"""The send stage: phases, conflicts, individual operations."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.sender import Sender
from worker import send
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
    metric = {"data": {"type": "metric", "attributes": {"name": "Placed Order"}}}
    profile = {"data": {"type": "profile", "attributes": {"email": "ada@mail.example"}}}
    attributes = {"unique_id": key, "metric": metric, "profile": profile}
    return Operation(OperationKind.CREATE_EVENT, key, {"type": "event", "attributes": attributes})


def entry(kind: OperationKind, key: str, **more: Any) -> Operation:
    if kind is OperationKind.CREATE_EVENT:
        return event(key)
    resource = {
        "type": "catalog-x",
        "attributes": {"external_id": key, "integration_type": "$custom", "catalog_type": "$default", "title": "T"},
        "relationships": {"item": {"data": {"type": "catalog-item", "id": catalog_id("p")}}},
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
    assert klaviyo.calls[1:] == [("POST /api/catalog-categories", {"data": new.resource})]


def listed(collection: str, *keys: str, **more: Any) -> tuple[str, Json]:
    """Return the request that reads catalog entries, and an answer with one entry per key."""
    query = {
        "catalog-items": "include=variants",
        "catalog-variants": "fields%5Bcatalog-variant%5D=inventory_quantity,inventory_policy",
        "catalog-categories": "fields%5Bcatalog-category%5D=name",
    }[collection]
    literals = ",".join(f"%22{catalog_id(key)}%22" for key in keys)
    entries = [{"id": catalog_id(key), "attributes": {}, "relationships": {"variants": {"data": []}}} for key in keys]
    return f"GET /api/{collection}?filter=any(ids,%5B{literals}%5D)&{query}", {"data": entries} | more


def test_phases_run_in_order(sender: Sender, klaviyo: Klaviyo) -> None:
    """Categories are written before items, items before variants, and deletions come last."""
    klaviyo.answer(*listed("catalog-items", "gone", "p"))
    sender.send(
        [
            Operation(OperationKind.DELETE_ITEM, "gone"),
            entry(OperationKind.UPSERT_VARIANT, "s"),
            entry(OperationKind.UPSERT_ITEM, "p"),
            entry(OperationKind.ENSURE_CATEGORY, "c"),
        ]
    )
    writes = [name for name in klaviyo.names if not name.startswith("GET")]
    assert writes == [
        "POST /api/catalog-categories",
        f"PATCH {ITEM}",
        "POST /api/catalog-variants",
        f"DELETE /api/catalog-items/{catalog_id('gone')}",
    ]


def test_entry_created_after_the_reading_is_updated_without_create_only_attributes(
    sender: Sender, klaviyo: Klaviyo
) -> None:
    """Klaviyo's answer counts more than what the reading showed."""
    klaviyo.answer("POST /api/catalog-items", CONFLICT)
    assert sender.send([entry(OperationKind.UPSERT_ITEM, "p")]) == [None]
    name, body = klaviyo.calls[-1]
    assert name == f"PATCH {ITEM}"
    assert body is not None
    assert body["data"]["attributes"] == {"title": "T"}


def test_update_of_a_variant_has_no_relationships(sender: Sender, klaviyo: Klaviyo) -> None:
    """Klaviyo accepts no relationships in the update of a variant."""
    included = [{"type": "catalog-variant", "id": catalog_id("s"), "attributes": {"title": "Old"}}]
    call, answer = listed("catalog-items", "p", included=included)
    answer["data"][0]["relationships"]["variants"]["data"] = [{"type": "catalog-variant", "id": catalog_id("s")}]
    klaviyo.answer(call, answer)
    assert sender.send([entry(OperationKind.UPSERT_VARIANT, "s")]) == [None]
    name, body = klaviyo.calls[1]
    assert name == f"PATCH {VARIANT}"
    assert body is not None
    assert "relationships" not in body["data"]


def test_entry_deleted_after_the_reading_is_created(sender: Sender, klaviyo: Klaviyo) -> None:
    """An entry that is deleted and created at the same time by others is read again later."""
    for last, expected in (({}, type(None)), (CONFLICT, Transient)):
        klaviyo.answer(*listed("catalog-items", "p"))
        klaviyo.answer(f"PATCH {ITEM}", NOT_FOUND)
        klaviyo.answer("POST /api/catalog-items", last)
        (error,) = sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
        assert isinstance(error, expected)


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
    assert klaviyo.names == [listed("catalog-categories", "c")[0], "POST /api/catalog-categories"]


def item_in(category: str) -> Operation:
    item = entry(OperationKind.UPSERT_ITEM, "p")
    data = [{"type": "catalog-category", "id": catalog_id(category)}]
    return replace(item, resource=(item.resource or {}) | {"relationships": {"categories": {"data": data}}})


@pytest.mark.parametrize("answer", [NOT_FOUND, Rejected("no such category", 400)])
def test_remembered_category_that_was_deleted_is_created(answer: Rejected, sender: Sender, klaviyo: Klaviyo) -> None:
    """A new product must not be dead-lettered because its category was deleted in Klaviyo."""
    category, item = entry(OperationKind.ENSURE_CATEGORY, "c"), item_in("c")
    assert sender.send([category]) == [None]
    klaviyo.answer("POST /api/catalog-items", answer)
    klaviyo.calls.clear()
    missing, error = sender.send([category, item])
    assert missing is None
    assert isinstance(error, Transient)
    assert sender.send([category, item]) == [None, None]
    writes = [name for name in klaviyo.names if not name.startswith("GET")]
    assert writes == ["POST /api/catalog-items", "POST /api/catalog-categories", "POST /api/catalog-items"]


def test_rejection_is_final_if_nothing_was_remembered(sender: Sender, klaviyo: Klaviyo) -> None:
    """The categories were read in the same batch, so the item is at fault."""
    rejection = Rejected("invalid", 400)
    klaviyo.answer("POST /api/catalog-items", rejection)
    assert sender.send([entry(OperationKind.ENSURE_CATEGORY, "c"), item_in("c")]) == [None, rejection]


def test_variant_of_an_item_that_was_just_deleted_is_a_transient_error(sender: Sender, klaviyo: Klaviyo) -> None:
    """The next attempt creates the item."""
    klaviyo.answer(*listed("catalog-items", "p"))
    klaviyo.answer("POST /api/catalog-variants", NOT_FOUND)
    (error,) = sender.send([entry(OperationKind.UPSERT_VARIANT, "s")])
    assert isinstance(error, Transient)


def test_entry_is_not_written_without_those_it_refers_to(sender: Sender, klaviyo: Klaviyo) -> None:
    """An item needs its categories, and a variant its item. They share the error."""
    error = Transient("503")
    klaviyo.answer("POST /api/catalog-categories", error)
    operations = [entry(OperationKind.ENSURE_CATEGORY, "c"), item_in("c"), entry(OperationKind.UPSERT_VARIANT, "s")]
    assert sender.send(operations) == [error] * 3
    assert [name for name in klaviyo.names if not name.startswith("GET")] == ["POST /api/catalog-categories"]


def test_category_that_could_not_be_created_is_not_known(sender: Sender, klaviyo: Klaviyo) -> None:
    """The next product with this category creates it."""
    klaviyo.answer("POST /api/catalog-categories", Transient("503"))
    (error,) = sender.send([entry(OperationKind.ENSURE_CATEGORY, "c")])
    assert isinstance(error, Transient)
    assert sender.send([entry(OperationKind.ENSURE_CATEGORY, "c")]) == [None]
    assert klaviyo.names.count("POST /api/catalog-categories") == 2


@pytest.mark.parametrize(
    ("kind", "path"),
    [(OperationKind.DELETE_ITEM, ITEM), (OperationKind.DELETE_CATEGORY, CATEGORY)],
    ids=["item", "category"],
)
def test_deletion_of_a_missing_entry_succeeds(kind: OperationKind, path: str, sender: Sender, klaviyo: Klaviyo) -> None:
    """A redelivered deletion has no second effect."""
    key = path[-1]
    klaviyo.answer(f"DELETE {path}", NOT_FOUND, Rejected("no", 400))
    klaviyo.answer(listed("catalog-items", "p")[0], *[listed("catalog-items", "p")[1]] * 2)
    assert sender.send([Operation(kind, key)]) == [None]
    (error,) = sender.send([Operation(kind, key)])
    assert isinstance(error, Rejected)


def test_item_that_klaviyo_does_not_have_needs_no_deletion(sender: Sender, klaviyo: Klaviyo) -> None:
    """The deletion of a product that was never synced costs one reading."""
    operations = [Operation(OperationKind.DELETE_STALE_VARIANTS, "p"), Operation(OperationKind.DELETE_ITEM, "p")]
    assert sender.send(operations) == [None, None]
    assert klaviyo.names == [listed("catalog-items", "p")[0]]


def test_sku_that_moves_to_another_product_is_moved(sender: Sender, klaviyo: Klaviyo) -> None:
    """Klaviyo refuses to create a variant that another item has. It is asked before the variant is deleted."""
    question = f"GET {ITEM}/variants?filter=any(ids,%5B%22{catalog_id('s')}%22%5D)"
    question += "&fields%5Bcatalog-variant%5D=inventory_quantity,inventory_policy"
    klaviyo.answer("POST /api/catalog-variants", CONFLICT)
    assert sender.send([entry(OperationKind.UPSERT_VARIANT, "s")]) == [None]
    calls = ["POST /api/catalog-variants", question, f"DELETE {VARIANT}", "POST /api/catalog-variants"]
    assert klaviyo.names[1:] == calls
    klaviyo.calls.clear()
    klaviyo.answer("POST /api/catalog-variants", CONFLICT, CONFLICT)
    (error,) = sender.send([entry(OperationKind.UPSERT_VARIANT, "s")])
    assert isinstance(error, Transient)


def test_stock_of_a_missing_variant_asks_for_its_product(sender: Sender, klaviyo: Klaviyo) -> None:
    """A stock change before the first sync of the product is not lost."""
    stock = Operation(OperationKind.UPDATE_INVENTORY, "s", {"attributes": {"inventory_quantity": 1}})
    for deleted_later in (False, True):
        if deleted_later:
            klaviyo.answer(*listed("catalog-variants", "s"))
            klaviyo.answer(f"PATCH {VARIANT}", NOT_FOUND)
        (result,) = send.Sender.send(sender, [stock])
        assert result.error is None
        assert result.follow_ups == {("sku", "s")}


def test_defect_affects_only_its_operation(sender: Sender, klaviyo: Klaviyo) -> None:
    """The other entries of the batch are written, one after the other."""
    related = {"categories": {"data": [{"type": "catalog-category"}]}}
    broken = Operation(OperationKind.UPSERT_ITEM, "q", {"type": "catalog-item", "relationships": related})
    error, item, other = sender.send([broken, entry(OperationKind.UPSERT_ITEM, "p"), event("e")])
    assert error is not None
    assert str(error).startswith("unexpected KeyError")
    assert (item, other) == (None, None)
    assert "POST /api/catalog-items" in klaviyo.names


def test_defect_of_an_erasure_affects_only_its_operation(sender: Sender, klaviyo: Klaviyo) -> None:
    """The other people of the batch are erased."""
    call = klaviyo.call

    def broken(method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        if "ada" in path:
            raise RuntimeError
        return call(method, path, body, idempotent=idempotent)

    klaviyo.call = broken  # type: ignore[method-assign]
    error, other = sender.send([Operation(OperationKind.DELETE_PROFILE, key) for key in ("ada", "bob")])
    assert str(error).startswith("unexpected RuntimeError")
    assert other is None


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
