"""The commercetools client: queries, retries, errors and tokens."""

from __future__ import annotations

import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.integration.conftest import commercetools_for
from tests.support.waiting import wait_for
from worker.commercetools.page_sizes import MAX_PAGE_SIZE
from worker.commercetools.queries import (
    CUSTOMERS,
    DESCENDANTS,
    INVENTORY_BY_SKU,
    LINE_PRODUCTS,
    ORDERS,
    ORDERS_BY_PAYMENT,
    PAYMENTS,
    PRODUCTS,
    PRODUCTS_BY_CATEGORY,
    PRODUCTS_BY_SKU,
)
from worker.errors import (
    CommercetoolsMisconfigured,
    EndpointRefused,
    Rejected,
    RequestBlocked,
    ResponseTooLarge,
    Transient,
)
from worker.sandbox import Fault, Sandbox
from worker.sandbox.commercetools.api import error_document
from worker.sandbox.commercetools.shop import uid
from worker.sandbox.http import ApiResponse

if TYPE_CHECKING:
    from worker.commercetools.queries import QueryResult
    from worker.sandbox.http import ApiRequest


def ids(found: QueryResult, value: str) -> list[str]:
    resources = found[value]
    assert isinstance(resources, list), resources
    return [resource["id"] for resource in resources]


def test_query_finds_resources_by_value(sandbox: Sandbox) -> None:
    """The values are ids, payments, ancestors or SKUs. A value without a resource has an empty result."""
    client = commercetools_for(sandbox)
    three, card, women = uid("order:three"), uid("payment:card"), uid("category:women")
    assert ids(client.find(ORDERS, [three, "nothing"]), three) == [three]
    assert ids(client.find(ORDERS, [three, "nothing"]), "nothing") == []
    assert ids(client.find(ORDERS_BY_PAYMENT, [card]), card) == [three]
    below = {uid("category:pants"), uid("category:jeans")}
    assert set(ids(client.find(DESCENDANTS, [women]), women)) == below
    found = client.find(PRODUCTS_BY_SKU, ["JEANS-32", "CAP & CO/1"])
    assert ids(found, "JEANS-32") == [uid("product:slim-jeans")]
    assert ids(found, "CAP & CO/1") == [uid("product:cap")]
    assert len(ids(client.find(INVENTORY_BY_SKU, ["JEANS-30"]), "JEANS-30")) == 2


def test_many_ids_are_split_into_few_requests(sandbox: Sandbox) -> None:
    """Both commercetools and the sandbox reject a URI of more than 8 KB."""
    values = [str(uuid.UUID(int=n)) for n in range(600)] + [uid("order:three")]
    found = commercetools_for(sandbox).find(ORDERS, values)
    assert set(found) == set(values)
    assert ids(found, uid("order:three")) == [uid("order:three")]
    requests = [request for request in sandbox.commercetools.requests if request.method == "GET"]
    assert len(requests) < 10
    assert {request.status for request in requests} == {200}


def test_all_pages_of_a_result_are_read(sandbox: Sandbox) -> None:
    """Pages are read by id, so that none is skipped or read twice."""
    template = next(iter(sandbox.shop.inventory.values()))
    for number in range(2 * MAX_PAGE_SIZE + 7):
        name = f"{number:05}"
        sandbox.shop.inventory[name] = template | {"id": name, "sku": "MANY"}
    found = ids(commercetools_for(sandbox).find(INVENTORY_BY_SKU, ["MANY"]), "MANY")
    assert found == [f"{number:05}" for number in range(2 * MAX_PAGE_SIZE + 7)]


def test_no_more_pages_are_read_than_needed(sandbox: Sandbox) -> None:
    """The move of a category with a whole catalog below it does not read the whole catalog."""
    template = sandbox.shop.products[uid("product:slim-jeans")] | {"categories": [{"typeId": "category", "id": "all"}]}
    names = [f"{number:05}" for number in range(PRODUCTS_BY_CATEGORY.max_resources + 200)]
    sandbox.shop.products |= {name: template | {"id": name} for name in names}
    found = ids(commercetools_for(sandbox).find(PRODUCTS_BY_CATEGORY, ["all"]), "all")
    assert PRODUCTS_BY_CATEGORY.max_resources <= len(found) < len(names)
    assert found == names[: len(found)]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 520, 522])
def test_transient_status_is_retried(status: int, sandbox: Sandbox) -> None:
    """A short outage uses up no delivery attempt."""
    sandbox.commercetools.faults.add(Fault(status=status, times=2, match="GET"))
    grete = uid("customer:grete")
    assert ids(commercetools_for(sandbox).find(CUSTOMERS, [grete]), grete) == [grete]


@pytest.mark.parametrize("action", ["reset", "truncate", "hang"])
def test_failed_connection_is_retried(action: str, sandbox: Sandbox) -> None:
    """A connection that is reset, truncated or silent ends within the timeout."""
    sandbox.commercetools.faults.add(Fault(action=action, times=1, match="GET", seconds=1.0))
    grete = uid("customer:grete")
    found = commercetools_for(sandbox, read_timeout=0.2).find(CUSTOMERS, [grete])
    assert ids(found, grete) == [grete]


def test_outage_is_transient(sandbox: Sandbox) -> None:
    """A 500 and a failed connection raise Transient, and the error text has no id."""
    client = commercetools_for(sandbox, retry_timeout=0.2)
    sandbox.commercetools.faults.add(Fault(status=500, times=None, match="GET"))
    assert isinstance(client.find(CUSTOMERS, ["x"])["x"], Transient)
    sandbox.commercetools.stop()
    error = client.find(CUSTOMERS, ["x"])["x"]
    assert isinstance(error, Transient)
    assert "x" not in str(error).split("/")[-1]


@pytest.mark.parametrize("body", [b"<html>maintenance</html>", b"{}", b'{"results": null}', b""])
def test_malformed_response_is_not_an_empty_result(body: bytes, sandbox: Sandbox) -> None:
    """A maintenance page must not delete products or ignore orders."""
    sandbox.commercetools.faults.add(Fault(status=200, times=None, match="GET", body=body))
    assert isinstance(commercetools_for(sandbox, retry_timeout=0.1).find(PRODUCTS, ["x"])["x"], Transient)


PAGES = [b"<html>maintenance</html>", b'{"message":"Forbidden"}', b'{"statusCode":200,"errors":[{}]}', b""]


@pytest.mark.parametrize("status", [201, 204, 302, 400, 401, 402, 403, 404, 406, 409, 413, 421, 431, 451])
def test_response_that_is_not_commercetools_is_transient(status: int, sandbox: Sandbox) -> None:
    """The error says what came, and opens the circuit like any outage."""
    for body in PAGES:
        content = b"" if status == 204 else body
        fault = Fault(status=status, times=None, match="GET", body=content, headers={"Content-Type": "text/html"})
        sandbox.commercetools.faults.clear()
        sandbox.commercetools.faults.add(fault)
        client = commercetools_for(sandbox, retry_timeout=0)
        came = f"{status} with {'text/html' if content else 'an empty body'} to GET 127.0.0.1"
        for _ in range(5):
            error = client.find(PRODUCTS, ["x"])["x"]
            assert isinstance(error, Transient)
            assert not isinstance(error, RequestBlocked)
            assert str(error).startswith(f"not commercetools' response: {came}")
        assert client.outage_reason()


def test_query_that_a_firewall_blocks_affects_only_its_value(sandbox: Sandbox) -> None:
    """A firewall takes an id for an attack. commercetools itself answers a query without it."""
    original = sandbox.commercetools_api.handle

    def block(request: ApiRequest) -> ApiResponse:
        if any("script" in where for where in request.query.get("where", [])):
            return ApiResponse(403, "<html>Forbidden by policy</html>")
        return original(request)

    sandbox.commercetools.handle = block
    customers = list(sandbox.shop.customers)
    client = commercetools_for(sandbox, retry_timeout=0)
    found = client.find(CUSTOMERS, [*customers, "<script>"])
    assert isinstance(found["<script>"], RequestBlocked)
    assert all(ids(found, customer) == [customer] for customer in customers)
    assert (client.outage_reason(), client.refused_endpoints()) == ("", {})


@pytest.mark.parametrize(
    ("status", "code"), [(400, "QueryTimedOut"), (409, "ConcurrentModification"), (409, "PendingOperation")]
)
def test_query_that_can_succeed_later_is_transient(status: int, code: str, sandbox: Sandbox) -> None:
    """A query that took too long is answered with 400."""
    body = orjson.dumps(error_document(status, code))
    sandbox.commercetools.faults.add(Fault(status=status, times=1, match="GET", body=body))
    assert commercetools_for(sandbox).find(CUSTOMERS, ["x"]) == {"x": []}
    sandbox.commercetools.faults.add(Fault(status=status, times=None, match="GET", body=body))
    assert isinstance(commercetools_for(sandbox, retry_timeout=0).find(CUSTOMERS, ["x"])["x"], Transient)


def test_large_answer_is_read_in_parts(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The orders of a batch can be large together. Their circuit stays closed, and nothing waits."""
    monkeypatch.setattr("worker.commercetools.client.MAX_QUERY_BYTES", 300_000)
    template = sandbox.shop.orders[uid("order:three")]
    names = [f"large-{number}" for number in range(16)]
    sandbox.shop.orders |= {name: template | {"id": name, "note": "x" * 100_000} for name in names}
    client = commercetools_for(sandbox)
    found = client.find(ORDERS, names)
    assert [ids(found, name) for name in names] == [[name] for name in names]
    assert client.outage_reason() == ""


def test_page_that_is_too_large_is_halved(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backfill reads pages without ids. Only a single record can be too large."""
    monkeypatch.setattr("worker.commercetools.client.MAX_QUERY_BYTES", 300_000)
    template = sandbox.shop.orders[uid("order:three")]
    names = [f"large-{number}" for number in range(8)]
    sandbox.shop.orders = {name: template | {"id": name, "note": "x" * 100_000} for name in names}
    client, found = commercetools_for(sandbox), list[str]()
    while page := client.page(ORDERS, after=found[-1] if found else ""):
        found += [order["id"] for order in page]
    assert found == names
    assert client.outage_reason() == ""
    sandbox.shop.orders["large-0"]["note"] = "x" * 400_000
    with pytest.raises(ResponseTooLarge):
        client.page(ORDERS)


@pytest.mark.parametrize(
    "limit", ["worker.commercetools.client.MAX_QUERY_BYTES", "worker.http.transport.MAX_BODY_BYTES"]
)
def test_resource_that_is_too_large_affects_no_other(
    limit: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is transient: commercetools has no such resource, so a proxy or a defect has answered."""
    monkeypatch.setattr(limit, 300_000)
    template = sandbox.shop.orders[uid("order:three")]
    sandbox.shop.orders |= {name: template | {"id": name} for name in "abc"}
    sandbox.shop.orders["b"]["note"] = "x" * 400_000
    client = commercetools_for(sandbox)
    for _ in range(6):
        found = client.find(ORDERS, ["a", "b", "c"])
        assert isinstance(found["b"], ResponseTooLarge)
        assert ids(found, "a") == ["a"]
        assert ids(found, "c") == ["c"]
    assert client.outage_reason() == ""


def test_pages_of_large_resources_are_small(sandbox: Sandbox) -> None:
    """Decoded, a page takes several times its bytes. Products are large, so already their first page is small."""
    template = sandbox.shop.products[uid("product:slim-jeans")]
    text = [{"name": "text", "value": "x" * 300_000}]
    names = [f"large-{number:02}" for number in range(50)]
    variant = template["masterVariant"] | {"attributes": text}
    sandbox.shop.products |= {name: template | {"id": name, "masterVariant": variant} for name in names}
    client = commercetools_for(sandbox)
    found = client.find(PRODUCTS, names)
    assert [ids(found, name) for name in names] == [[name] for name in names]
    asked = [request.query["where"][0].count("large-") for request in sandbox.commercetools.requests if request.query]
    assert asked == [20, 13, 13, 4]
    assert len(client.page(PRODUCTS)) == 13


def test_unused_fields_of_products_are_dropped(sandbox: Sandbox) -> None:
    """The attributes of the variants are most of a product. A line item needs even less of it."""
    name = uid("product:slim-jeans")
    client = commercetools_for(sandbox)
    product = client.find(PRODUCTS, [name])[name]
    assert isinstance(product, list)
    assert {*product[0]["masterVariant"], *product[0]["variants"][0]} == {"id", "sku", "prices", "images"}
    assert {"id", "version", "name", "slug", "categories", "published"} < set(product[0])
    (line_product,) = client.find(LINE_PRODUCTS, [name]).values()
    assert isinstance(line_product, list)
    assert set(line_product[0]) == {"id", "categories"}


def test_same_page_again_is_transient(sandbox: Sandbox) -> None:
    """A proxy that ignores the query would otherwise cause requests without end."""
    page = {"results": [{"id": f"{number:05}", "sku": "MANY"} for number in range(MAX_PAGE_SIZE)]}
    sandbox.commercetools.faults.add(Fault(status=200, times=None, match="GET", body=orjson.dumps(page)))
    error = commercetools_for(sandbox, retry_timeout=0).find(INVENTORY_BY_SKU, ["MANY"])["MANY"]
    assert isinstance(error, Transient)
    assert "the same page again" in str(error)


def test_half_a_surrogate_pair_affects_only_its_text(sandbox: Sandbox) -> None:
    """It makes strict decoders reject the whole page, with hundreds of other records."""
    customers = [{"id": "a", "firstName": "SPLIT"}, {"id": "b", "firstName": "\N{GRINNING FACE}\\uD800"}]
    body = orjson.dumps({"results": customers}).replace(b"SPLIT", rb"x\uD83D")
    sandbox.commercetools.faults.add(Fault(status=200, times=None, match="GET", body=body))
    found = commercetools_for(sandbox).find(CUSTOMERS, ["a", "b"])
    assert found["a"] == [{"id": "a", "firstName": "x\N{REPLACEMENT CHARACTER}"}]
    assert found["b"] == [customers[1]]


def test_long_retry_after_is_returned_with_the_error(sandbox: Sandbox) -> None:
    """The lane waits instead of the client."""
    sandbox.commercetools.faults.add(Fault(status=503, times=1, match="GET", headers={"Retry-After": "77"}))
    error = commercetools_for(sandbox).find(CUSTOMERS, ["x"])["x"]
    assert isinstance(error, Transient)
    assert error.retry_after == 77
    assert len(sandbox.commercetools.requests) == 2  # the token and one query


def test_invalid_value_fails_alone(sandbox: Sandbox) -> None:
    """One malformed id makes commercetools reject the whole query. The other values are still found."""
    sandbox.commercetools.faults.add(Fault(status=400, times=None, match="GET", contains=b""))
    sandbox.commercetools.faults.clear()
    customers = list(sandbox.shop.customers)
    original = sandbox.commercetools_api.handle

    def reject_bad(request: ApiRequest) -> ApiResponse:
        if any("BAD" in where for where in request.query.get("where", [])):
            return ApiResponse(400, error_document(400))
        return original(request)

    sandbox.commercetools.handle = reject_bad
    found = commercetools_for(sandbox).find(CUSTOMERS, [*customers, "BAD"])
    assert isinstance(found["BAD"], Rejected)
    assert all(ids(found, customer) == [customer] for customer in customers)


def test_revoked_token_is_replaced(sandbox: Sandbox) -> None:
    """A 401 before the expiry of the token is not a misconfiguration."""
    client = commercetools_for(sandbox)
    client.find(CUSTOMERS, ["x"])
    sandbox.commercetools_api.revoke_tokens()
    assert client.find(CUSTOMERS, ["x"]) == {"x": []}
    assert sandbox.commercetools_api.tokens_issued == 2


def test_threads_share_one_token(sandbox: Sandbox) -> None:
    """Sixteen threads need one token, and one more after it is revoked."""
    client = commercetools_for(sandbox)
    sandbox.commercetools.latency = 0.02
    for expected in (1, 2):
        with ThreadPoolExecutor(16) as threads:
            results = list(threads.map(lambda _: client.find(CUSTOMERS, ["x"]), range(64)))
        assert results == [{"x": []}] * 64
        assert sandbox.commercetools_api.tokens_issued == expected
        sandbox.commercetools_api.revoke_tokens()


class CountingLock:
    """A lock that counts the threads that have asked for it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.asked: list[int] = []  # thread ids

    def __enter__(self) -> None:
        self.asked.append(get_ident())
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_threads_share_the_failure_to_get_a_token(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the last of sixteen threads would wait for the timeouts of all. The next thread tries again."""
    client = commercetools_for(sandbox, retry_timeout=0)
    lock = CountingLock()
    monkeypatch.setattr(client._token, "_lock", lock)
    fetch = client._token._request
    fetches = 0

    def fail() -> dict[str, Any]:
        nonlocal fetches
        fetches += 1
        wait_for(lambda: len(lock.asked) == 16)
        raise Transient("no response")

    monkeypatch.setattr(client._token, "_request", fail)
    with ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda _: client.find(CUSTOMERS, ["x"])["x"], range(16)))
    assert (fetches, {str(result) for result in results}) == (1, {"no response"})
    monkeypatch.setattr(client._token, "_request", fetch)
    assert client._token.get()


def test_token_is_replaced_before_it_expires() -> None:
    """A short-lived token is replaced after half of its lifetime."""
    with Sandbox(token_lifetime=1) as sandbox:
        client = commercetools_for(sandbox)
        client.find(CUSTOMERS, ["x"])
        time.sleep(0.6)
        client.find(CUSTOMERS, ["x"])
        assert sandbox.commercetools_api.tokens_issued == 2
        assert {request.status for request in sandbox.commercetools.requests} == {200}


@pytest.mark.parametrize(
    "values",
    [
        {"ct_api_client": '{"clientId": "no", "secret": "s3cret"}'},
        {"ct_project_id": "another-project", "ct_scope": ""},
    ],
    ids=["credentials", "project"],
)
def test_refused_credentials_are_misconfigured(values: dict[str, str], sandbox: Sandbox) -> None:
    """The error text names the settings and contains no secret."""
    error = commercetools_for(sandbox, **values).find(PRODUCTS, ["x"])["x"]
    assert isinstance(error, CommercetoolsMisconfigured)
    assert "CT_API_CLIENT" in str(error) or "CT_PROJECT_ID" in str(error)
    assert "s3cret" not in str(error)


@pytest.mark.parametrize("fault", [Fault(status=503, times=1), Fault(action="reset", times=1)], ids=["503", "reset"])
def test_outage_of_the_authorization_server_is_retried(fault: Fault, sandbox: Sandbox) -> None:
    """It does not mean that the credentials are refused."""
    sandbox.commercetools.faults.add(fault)
    assert commercetools_for(sandbox).find(CUSTOMERS, ["x"]) == {"x": []}


@pytest.mark.parametrize("body", [b"[]", b"null", b'{"access_token": "t", "token_type": "bearer", "expires_in": "x"}'])
def test_malformed_token_is_retried(body: bytes, sandbox: Sandbox) -> None:
    """It is handled like any malformed response."""
    sandbox.commercetools.faults.add(Fault(status=200, match="POST", body=body))
    assert commercetools_for(sandbox).find(CUSTOMERS, ["x"]) == {"x": []}


def test_token_with_fewer_scopes_is_accepted(sandbox: Sandbox) -> None:
    """The granted scopes are those of CT_SCOPE that the API client has."""
    client = commercetools_for(sandbox, ct_scope="view_orders:sandbox-shop view_tax_categories:sandbox-shop")
    assert client.find(CUSTOMERS, ["x"]) == {"x": []}


def test_client_does_not_change_the_environment(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Lambda function or an importing program shares the environment with other code."""
    for name in [name for name in os.environ if name.startswith("OAUTHLIB_")]:
        monkeypatch.delenv(name)
    before = dict(os.environ)
    assert commercetools_for(sandbox, ct_scope="view_orders:sandbox-shop other").find(CUSTOMERS, ["x"]) == {"x": []}
    assert dict(os.environ) == before


PAYMENTS_REFUSED = Fault(status=403, times=None, match="GET /sandbox-shop/payments")


def test_missing_scope_concerns_only_its_resources(sandbox: Sandbox) -> None:
    """The error has the code `insufficient_scope`. Other queries and the worker continue."""
    sandbox.commercetools.faults.add(PAYMENTS_REFUSED)
    client = commercetools_for(sandbox)
    error = client.find(PAYMENTS, ["x"])["x"]
    assert isinstance(error, EndpointRefused)
    assert "insufficient_scope" in str(error)
    assert client.find(CUSTOMERS, ["x"]) == {"x": []}
    assert list(client.refused_endpoints()) == ["payments"]
    assert client.refusal_reason() == ""


def test_missing_scopes_for_everything_are_misconfigured(sandbox: Sandbox) -> None:
    """Queries that depend on no message are refused, too."""
    sandbox.commercetools.faults.add(replace(PAYMENTS_REFUSED, match="GET"))
    client = commercetools_for(sandbox)
    assert isinstance(client.find(PAYMENTS, ["x"])["x"], CommercetoolsMisconfigured)
    assert "insufficient_scope" in client.refusal_reason()


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 404])
@pytest.mark.parametrize("body", [*PAGES, b'{"error":"temporarily_unavailable"}'])
def test_page_of_the_authorization_server_is_no_refusal(status: int, body: bytes, sandbox: Sandbox) -> None:
    """Only OAuth's error document refuses the credentials. No redirect is followed."""
    headers = {"Location": f"{sandbox.klaviyo.url}/stolen"} if status == 302 else {}
    sandbox.commercetools.faults.add(Fault(status=status, times=1, match="POST", body=body, headers=headers))
    assert commercetools_for(sandbox).find(CUSTOMERS, ["x"]) == {"x": []}
    sandbox.commercetools_api.revoke_tokens()
    sandbox.commercetools.faults.add(Fault(status=status, times=None, match="POST", body=body, headers=headers))
    error = commercetools_for(sandbox, retry_timeout=0).find(CUSTOMERS, ["x"])["x"]
    assert isinstance(error, Transient)
    assert str(error).startswith(f"no token from commercetools: {status} with ")
    assert sandbox.klaviyo.requests == []


def test_endless_token_is_requested_once(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that is too large is halved. That does not help here, and each request would read up to the limit."""
    monkeypatch.setattr("worker.http.transport.MAX_BODY_BYTES", 100_000)
    sandbox.commercetools.faults.add(Fault(status=200, times=None, match="POST", body=b" " * 200_000))
    found = commercetools_for(sandbox, retry_timeout=0).find(CUSTOMERS, [f"c-{number}" for number in range(100)])
    assert {type(error) for error in found.values()} == {Transient}
    assert "more than 100,000 bytes" in str(found["c-0"])
    assert len(sandbox.commercetools.requests) == 1


@pytest.mark.parametrize(
    ("faults", "answers"),
    [
        ([], True),
        ([Fault(status=503, times=None, match="GET /ct-project/orders")], True),
        ([Fault(status=503, times=None)], False),
    ],
    ids=["works", "one endpoint fails", "fails"],
)
def test_commercetools_is_down_only_if_no_neutral_query_is_answered(
    faults: list[Fault], answers: bool, sandbox: Sandbox
) -> None:
    """Pulling pauses then."""
    project = sandbox.environment["CT_PROJECT_ID"]
    sandbox.commercetools.faults.add(
        *(replace(fault, match=fault.match.replace("ct-project", project)) for fault in faults)
    )
    assert commercetools_for(sandbox).answers() is answers
