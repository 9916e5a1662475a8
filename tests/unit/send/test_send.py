"""[Operation] -> what became of each."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
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
    """Answers by script: what stands under `METHOD path` is returned or raised, in order; else {}."""

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
    return Sender(klaviyo, concurrency=4)


def event(key: str) -> Operation:
    return Operation(OperationKind.CREATE_EVENT, key, {"type": "event", "attributes": {"unique_id": key}})


def entry(kind: OperationKind, key: str, **more: Any) -> Operation:
    resource = {
        "type": "catalog-x",
        "attributes": {"external_id": key, "integration_type": "$custom", "catalog_type": "$default", "title": "T"},
        "relationships": {"r": {}},
    }
    return Operation(kind, key, resource, **more)


ITEM = f"/api/catalog-items/{catalog_id('p')}"
VARIANT = f"/api/catalog-variants/{catalog_id('s')}"
CATEGORY = f"/api/catalog-categories/{catalog_id('c')}"


def test_results_come_in_the_order_of_the_operations(sender: Sender, klaviyo: Klaviyo) -> None:
    """Whatever is done side by side, each operation gets its own result."""
    klaviyo.answer("POST /api/events", *[{}] * 3)
    operations = [entry(OperationKind.UPSERT_ITEM, "p"), *(event(str(number)) for number in range(20))]
    error = Rejected("no", 400)
    klaviyo.answer("POST /api/catalog-items", error)
    assert sender.send(operations) == [error, *[None] * 20]


def test_one_key_in_a_batch_is_sent_once_with_its_last_state(sender: Sender, klaviyo: Klaviyo) -> None:
    """Ten updates of a customer in one batch are one call."""
    old = Operation(OperationKind.UPSERT_PROFILE, "c", {"type": "profile", "attributes": {"email": "old"}})
    new = Operation(OperationKind.UPSERT_PROFILE, "c", {"type": "profile", "attributes": {"email": "new"}})
    assert sender.send([old, new]) == [None, None]
    assert klaviyo.calls == [("POST /api/profile-import", {"data": new.resource})]


def test_what_others_need_comes_first(sender: Sender, klaviyo: Klaviyo) -> None:
    """Categories before items before variants before deletions."""
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


def test_an_entry_that_exists_is_updated_without_what_only_a_creation_takes(sender: Sender, klaviyo: Klaviyo) -> None:
    """Creating is no upsert in Klaviyo: a conflict becomes an update."""
    klaviyo.answer("POST /api/catalog-items", CONFLICT)
    assert sender.send([entry(OperationKind.UPSERT_ITEM, "p")]) == [None]
    update = {"type": "catalog-x", "id": catalog_id("p"), "attributes": {"title": "T"}, "relationships": {"r": {}}}
    assert klaviyo.calls[1] == (f"PATCH {ITEM}", {"data": update})


def test_a_variant_never_changes_its_item(sender: Sender, klaviyo: Klaviyo) -> None:
    """Klaviyo takes no relationships when a variant is updated."""
    klaviyo.answer("POST /api/catalog-variants", CONFLICT)
    assert sender.send([entry(OperationKind.UPSERT_VARIANT, "s")]) == [None]
    name, body = klaviyo.calls[1]
    assert name == f"PATCH {VARIANT}"
    assert body is not None
    assert "relationships" not in body["data"]


def test_a_known_entry_costs_one_call(sender: Sender, klaviyo: Klaviyo) -> None:
    """What this process has written is updated at once; when it is gone, created again."""
    sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    assert klaviyo.names == ["POST /api/catalog-items", f"PATCH {ITEM}"]
    klaviyo.answer(f"PATCH {ITEM}", NOT_FOUND)
    assert sender.send([entry(OperationKind.UPSERT_ITEM, "p")]) == [None]
    assert klaviyo.names[2:] == [f"PATCH {ITEM}", "POST /api/catalog-items"]


def test_a_deleted_entry_is_no_longer_known(sender: Sender, klaviyo: Klaviyo) -> None:
    """A product published again after it was unpublished is created."""
    sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    sender.send([Operation(OperationKind.DELETE_ITEM, "p")])
    sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    assert klaviyo.names == ["POST /api/catalog-items", f"DELETE {ITEM}", "POST /api/catalog-items"]


def test_an_entry_that_comes_and_goes_is_tried_again_later(sender: Sender, klaviyo: Klaviyo) -> None:
    """Another worker may delete between our two calls."""
    klaviyo.answer("POST /api/catalog-items", CONFLICT)
    klaviyo.answer(f"PATCH {ITEM}", NOT_FOUND)
    (error,) = sender.send([entry(OperationKind.UPSERT_ITEM, "p")])
    assert isinstance(error, Transient)


def test_a_category_a_product_needs_is_created_once_and_never_overwritten(sender: Sender, klaviyo: Klaviyo) -> None:
    """Its own messages keep its name; the product only needs it to exist."""
    klaviyo.answer("POST /api/catalog-categories", CONFLICT)
    for _ in range(3):
        assert sender.send([entry(OperationKind.ENSURE_CATEGORY, "c")]) == [None]
    assert klaviyo.names == ["POST /api/catalog-categories"]


@pytest.mark.parametrize(
    ("kind", "path"),
    [(OperationKind.DELETE_ITEM, ITEM), (OperationKind.DELETE_CATEGORY, CATEGORY)],
    ids=["item", "category"],
)
def test_deleting_what_is_gone_is_success(kind: OperationKind, path: str, sender: Sender, klaviyo: Klaviyo) -> None:
    """A redelivered deletion has no second effect."""
    key = path[-1]
    klaviyo.answer(f"DELETE {path}", NOT_FOUND, Rejected("no", 400))
    assert sender.send([Operation(kind, key)]) == [None]
    (error,) = sender.send([Operation(kind, key)])
    assert isinstance(error, Rejected)


def test_variants_commercetools_no_longer_has_are_deleted_page_by_page(sender: Sender, klaviyo: Klaviyo) -> None:
    """Klaviyo shows them a hundred at a time."""
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


def test_a_sku_that_moves_to_another_product_survives(sender: Sender, klaviyo: Klaviyo) -> None:
    """In one batch the old product's variants go before the new product's come."""
    variants = f"GET {ITEM}/variants?fields%5Bcatalog-variant%5D=id"
    klaviyo.answer(variants, {"data": [{"id": catalog_id("s")}]})
    sender.send([entry(OperationKind.UPSERT_VARIANT, "s"), Operation(OperationKind.DELETE_STALE_VARIANTS, "p")])
    assert klaviyo.names == [variants, f"DELETE {VARIANT}", "POST /api/catalog-variants"]


def test_an_item_klaviyo_never_had_has_no_variants(sender: Sender, klaviyo: Klaviyo) -> None:
    """Deleting a product that was never synced is nothing to do."""
    klaviyo.answer(f"GET {ITEM}/variants?fields%5Bcatalog-variant%5D=id", NOT_FOUND)
    assert sender.send([Operation(OperationKind.DELETE_STALE_VARIANTS, "p")]) == [None]


def test_a_variant_klaviyo_lacks_brings_its_whole_product(sender: Sender, klaviyo: Klaviyo) -> None:
    """Stock that changes before the product was ever sent is not skipped."""
    klaviyo.answer(f"PATCH {VARIANT}", NOT_FOUND, NOT_FOUND)
    whole = [entry(OperationKind.UPSERT_ITEM, "p"), entry(OperationKind.UPSERT_VARIANT, "s")]
    stock = Operation(OperationKind.UPDATE_INVENTORY, "s", {"type": "catalog-variant"}, fallback=lambda: whole)
    assert sender.send([stock]) == [None]
    assert klaviyo.names == [f"PATCH {VARIANT}", "POST /api/catalog-items", "POST /api/catalog-variants"]
    assert sender.send([Operation(OperationKind.UPDATE_INVENTORY, "s", {"type": "catalog-variant"})]) == [None]


PROFILE = Operation(
    OperationKind.UPSERT_PROFILE,
    "c",
    {"type": "profile", "attributes": {"email": "e", "phone_number": "p", "external_id": "x", "title": "t"}},
)


def _identifiers(call: tuple[str, Json | None]) -> tuple[str, set[str]]:
    name, body = call
    assert body is not None
    return name, body["data"]["attributes"].keys() & {"email", "phone_number", "external_id"}


def test_a_duplicate_profile_is_written_under_its_own_id(sender: Sender, klaviyo: Klaviyo) -> None:
    """A guest who registers ends in one profile."""
    klaviyo.answer("POST /api/profile-import", Rejected("duplicate", 409, duplicate_id="01A"))
    assert sender.send([PROFILE]) == [None]
    assert klaviyo.calls[1] == ("PATCH /api/profiles/01A", {"data": (PROFILE.resource or {}) | {"id": "01A"}})


def test_identifiers_of_several_profiles_give_up_the_weakest(sender: Sender, klaviyo: Klaviyo) -> None:
    """The update arrives at the profile of the email address, rather than in the dead letters."""
    duplicate = Rejected("duplicate", 409, duplicate_id="01A")
    klaviyo.answer("POST /api/profile-import", duplicate, CONFLICT)
    klaviyo.answer("PATCH /api/profiles/01A", duplicate)
    assert sender.send([PROFILE]) == [None]
    assert [_identifiers(call) for call in klaviyo.calls] == [
        ("POST /api/profile-import", {"email", "phone_number", "external_id"}),
        ("PATCH /api/profiles/01A", {"email", "phone_number", "external_id"}),
        ("POST /api/profile-import", {"email", "external_id"}),
        ("POST /api/profile-import", {"email"}),
    ]


@pytest.mark.parametrize("calls_before", [0, 1, 2])
def test_other_refusals_of_a_profile_are_final(calls_before: int, sender: Sender, klaviyo: Klaviyo) -> None:
    """Only a conflict is worked around."""
    refused = Rejected("bad", 400)
    klaviyo.answer("POST /api/profile-import", *([CONFLICT, CONFLICT] * calls_before)[:calls_before], refused)
    assert sender.send([PROFILE]) == [refused]


def test_erasure_finds_the_profile_and_requests_its_deletion(sender: Sender, klaviyo: Klaviyo) -> None:
    """The deletion endpoint takes no external_id; whoever is not there needs no deletion."""
    find = "GET /api/profiles?filter=equals%28external_id%2C%22c%22%29&fields%5Bprofile%5D=id"
    klaviyo.answer(find, {"data": [{"id": "01A"}]})
    assert sender.send([Operation(OperationKind.DELETE_PROFILE, "c")]) == [None]
    assert sender.send([Operation(OperationKind.DELETE_PROFILE, "c")]) == [None]
    assert klaviyo.names == [find, "POST /api/data-privacy-deletion-jobs", find]
    body = klaviyo.calls[1][1]
    assert body is not None
    assert body["data"]["attributes"]["profile"]["data"]["id"] == "01A"


def test_an_erasure_takes_in_all_pages_and_odd_answers(klaviyo: Klaviyo, sender: Sender) -> None:
    """What Klaviyo answers for one message is nothing to its neighbours."""
    first = "GET /api/profiles?filter=equals%28external_id%2C%22c%22%29&fields%5Bprofile%5D=id"
    following = "https://a.klaviyo.com/api/profiles?page=2"
    klaviyo.answer(first, {"data": [{"id": "01A"}], "links": {"next": following}}, {"data": None})
    klaviyo.answer("GET /api/profiles?page=2", {"data": [{"id": "01B"}]})
    assert sender.send([Operation(OperationKind.DELETE_PROFILE, "c")]) == [None]
    assert sender.send([Operation(OperationKind.DELETE_PROFILE, "c"), event("e")]) == [None, None]
    erased = [
        body["data"]["attributes"]["profile"]["data"]["id"]
        for name, body in klaviyo.calls
        if body and "privacy" in name
    ]
    assert erased == ["01A", "01B"]


@pytest.mark.parametrize("kind", [kind for kind in OperationKind if kind is not OperationKind.UPSERT_PROFILE])
@pytest.mark.parametrize("error", [Transient("503"), KlaviyoMisconfigured("401")], ids=["transient", "misconfigured"])
def test_no_operation_swallows_an_outage(kind: OperationKind, error: Exception, klaviyo: Klaviyo) -> None:
    """Whatever is asked for, an answer that never came is an error for its message."""

    def unavailable(method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
        raise error

    klaviyo.call = unavailable  # type: ignore[method-assign]
    assert Sender(klaviyo, concurrency=1).send([entry(kind, "k")]) == [error]


@pytest.mark.parametrize("kind", OperationKind)
def test_every_operation_has_a_request_to_show(kind: OperationKind) -> None:
    """`klaviyo-worker transform` can print any operation."""
    request = request_for(entry(kind, "k"))
    assert request.path.startswith("/api/")
    assert request.method in {"GET", "POST", "PATCH", "DELETE"}


def test_events_do_not_wait_for_what_the_limits_keep_waiting() -> None:
    """Klaviyo takes sixty deletions a minute; orders go on meanwhile."""
    may_delete, deleting = threading.Event(), threading.Semaphore(0)

    class Slow(Klaviyo):
        def call(self, method: str, path: str, body: Body = None, *, idempotent: bool = True) -> Json:
            if path.startswith("/api/profiles?"):
                deleting.release()
                assert may_delete.wait(5.0)
            return super().call(method, path, body, idempotent=idempotent)

    sender = Sender(Slow(), concurrency=2)
    with ThreadPoolExecutor(2) as lanes:
        erasures = lanes.submit(sender.send, [Operation(OperationKind.DELETE_PROFILE, str(each)) for each in range(4)])
        assert all(deleting.acquire(timeout=5.0) for _ in range(2))
        assert lanes.submit(sender.send, [event("a"), event("b")]).result(5.0) == [None, None]
        may_delete.set()
        assert erasures.result(5.0) == [None] * 4
