"""A response that is not Klaviyo's never counts as an effect, and never as proof that something does not exist."""

from __future__ import annotations

import pytest

from tests.integration.conftest import klaviyo_for
from tests.support.sender import Sender
from worker.errors import Disposition
from worker.model import Operation, OperationKind
from worker.sandbox import Fault, Sandbox
from worker.transform.catalog import catalog_id

PAGE = b"<!DOCTYPE html><title>404</title>"
BULK = 12  # more than the threshold
STOCK = {"type": "catalog-variant", "id": catalog_id("x0"), "attributes": {"inventory_quantity": 0}}


def assert_kept(sandbox: Sandbox, operations: list[Operation]) -> None:
    """Send operations. Their messages are held, or wait for a bulk job that has possibly started."""
    errors = Sender(klaviyo_for(sandbox, retry_timeout=0), 4).send(operations)
    assert {error and error.disposition for error in errors} <= {Disposition.HOLD, Disposition.WAIT}


@pytest.mark.parametrize("number", [1, BULK])
@pytest.mark.parametrize(
    "kind",
    [
        OperationKind.DELETE_ITEM,
        OperationKind.DELETE_CATEGORY,
        OperationKind.DELETE_VARIANT,
        OperationKind.DELETE_STALE_VARIANTS,
    ],
)
def test_page_with_404_does_not_prove_that_an_entry_is_gone(kind: OperationKind, number: int, sandbox: Sandbox) -> None:
    """A gateway answers. Klaviyo itself answers 404 for an entry that was deleted before."""
    operations = [Operation(kind, f"x{each}") for each in range(number)]
    assert Sender(klaviyo_for(sandbox), 4).send(operations) == [None] * number
    sandbox.klaviyo.faults.add(Fault(status=404, times=None, body=PAGE))
    assert_kept(sandbox, operations)


def test_page_with_404_does_not_prove_that_a_variant_is_missing(sandbox: Sandbox) -> None:
    """The stock of a variant that Klaviyo does not have is nothing to write. That of any other must arrive."""
    stock = Operation(OperationKind.UPDATE_INVENTORY, "x0", STOCK)
    assert Sender(klaviyo_for(sandbox), 4).send([stock]) == [None]
    for kind, attributes in (("item", {}), ("variant", {"sku": "x0", "inventory_quantity": 5, "price": 1.0})):
        required = {"external_id": "x0", "title": "T", "description": "", "url": "None"}
        related = {"item": {"data": {"type": "catalog-item", "id": catalog_id("x0")}}} if attributes else {}
        entry = {"attributes": required | attributes, "relationships": related}
        sandbox.account.create_entry(f"catalog-{kind}", entry)
    for method in ("GET", "PATCH"):
        sandbox.klaviyo.faults.add(Fault(status=404, times=None, match=f"{method} /api/catalog", body=PAGE))
        assert_kept(sandbox, [stock])
        sandbox.klaviyo.faults.clear()
    assert Sender(klaviyo_for(sandbox), 4).send([stock]) == [None]
    assert sandbox.account.variants["x0"]["attributes"]["inventory_quantity"] == 0


@pytest.mark.parametrize("body", [b"", b'{"message":"ok"}', b'{"data":null}', b"[]"])
def test_odd_success_does_not_prove_that_a_person_has_no_profile(body: bytes, sandbox: Sandbox) -> None:
    """The erasure is requested when Klaviyo answers."""
    sandbox.account.import_profile({"attributes": {"external_id": "c", "email": "c@example.com"}})
    headers = {"Content-Type": "application/json"}
    sandbox.klaviyo.faults.add(Fault(status=200, times=1, match="GET /api/profiles", body=body, headers=headers))
    erasure = [Operation(OperationKind.DELETE_PROFILE, "c")]
    assert_kept(sandbox, erasure)
    assert len(sandbox.account.profiles) == 1
    assert Sender(klaviyo_for(sandbox), 4).send(erasure) == [None]
    assert len(sandbox.account.deletion_requests) == 1
