"""The commercetools emulator: tokens, queries and documented limits."""

from __future__ import annotations

import gzip
from typing import Any
from urllib.parse import urlencode

import orjson
import pytest
import urllib3

from worker.sandbox import Sandbox
from worker.sandbox.commercetools.api import CLIENT_ID, CLIENT_SECRET, PROJECT
from worker.sandbox.commercetools.shop import uid

BASIC = f"{CLIENT_ID}:{CLIENT_SECRET}"
GRANT = {"grant_type": "client_credentials"}


class Caller:
    """A plain HTTP client for the commercetools emulator."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._url = sandbox.commercetools.url
        self._pool = urllib3.PoolManager(retries=False, timeout=60)

    def token(self, identity: str = BASIC, **form: str) -> tuple[int, Any]:
        headers = urllib3.make_headers(basic_auth=identity)
        headers["Content-Type"] = "application/x-www-form-urlencoded"
        response = self._pool.request(
            "POST", f"{self._url}/oauth/token", body=urlencode(form or GRANT), headers=headers
        )
        return response.status, response.json()

    def raw(self, path: str, token: str = "", **headers: str) -> urllib3.BaseHTTPResponse:
        token = token or self.token()[1]["access_token"]
        merged = {"Authorization": f"Bearer {token}", **headers}
        return self._pool.request("GET", self._url + path, headers=merged, decode_content=False)

    def get(self, collection: str, *parameters: tuple[str, str], token: str = "") -> tuple[int, Any]:
        response = self.raw(f"/{PROJECT}/{collection}?{urlencode(parameters)}", token)
        return response.status, orjson.loads(response.data)


@pytest.fixture
def call(sandbox: Sandbox) -> Caller:
    return Caller(sandbox)


def names(document: Any) -> set[str]:
    return {resource["id"] for resource in document["results"]}


def test_token_has_the_requested_scopes(call: Caller) -> None:
    """Without requested scopes it has all scopes of the client. Scopes that the client lacks are not granted."""
    status, full = call.token()
    assert (status, full["token_type"], full["expires_in"]) == (200, "Bearer", 172_800)
    assert f"view_products:{PROJECT}" in full["scope"].split()
    asked = f"view_orders:{PROJECT} manage_project:{PROJECT}"
    assert call.token(**GRANT, scope=asked)[1]["scope"] == f"view_orders:{PROJECT}"


@pytest.mark.parametrize(
    ("identity", "form", "status", "code"),
    [
        ("no:body", GRANT, 401, "invalid_client"),
        (BASIC, {"grant_type": "password"}, 400, "unsupported_grant_type"),
        (BASIC, GRANT | {"scope": "view_orders:other-shop"}, 400, "invalid_scope"),
    ],
)
def test_invalid_token_request_is_refused(
    identity: str, form: dict[str, str], status: int, code: str, call: Caller, sandbox: Sandbox
) -> None:
    """The error has commercetools' format."""
    response = call.token(identity, **form)
    assert (response[0], response[1]["statusCode"], response[1]["errors"][0]["code"]) == (status, status, code)
    assert sandbox.commercetools_api.tokens_issued == 0


def test_token_is_valid_until_revoked_or_expired(call: Caller, sandbox: Sandbox) -> None:
    """Invalid tokens and other schemes are refused with 401 invalid_token."""
    token = call.token()[1]["access_token"]
    assert call.get("orders", token=token)[0] == 200
    sandbox.commercetools_api.revoke_tokens()
    for bad in (token, "invented"):
        status, document = call.get("orders", token=bad)
        assert (status, document["errors"][0]["code"]) == (401, "invalid_token")
    assert call.raw(f"/{PROJECT}/orders", Authorization=f"Basic {call.token()[1]['access_token']}").status == 401
    with Sandbox(token_lifetime=0) as short:
        assert Caller(short).get("orders")[0] == 401


def test_resource_is_read_by_id(call: Caller) -> None:
    """The response for an unknown id, collection, project or path is 404."""
    grete = uid("customer:grete")
    assert call.get(f"customers/{grete}")[1]["email"] == "grete.hermannsdotter@mail.example"
    for path in (f"/{PROJECT}/customers/none", f"/{PROJECT}/nonsense", "/other-shop/orders", f"/{PROJECT}"):
        assert call.raw(path).status == 404


@pytest.mark.parametrize(
    ("collection", "where", "expected"),
    [
        ("customers", f'id in ("{uid("customer:grete")}","x")', {"customer:grete"}),
        ("orders", f'paymentInfo(payments(id in ("{uid("payment:card")}")))', {"order:three"}),
        ("categories", f'ancestors(id in ("{uid("category:women")}"))', {"category:pants", "category:jeans"}),
        (
            "product-projections",
            'masterVariant(sku in ("JEANS-32")) or variants(sku in ("JEANS-32"))',
            {"product:slim-jeans"},
        ),
        ("inventory", 'sku in ("JEANS-30") and supplyChannel is not defined', {"inventory-entry:jeans-30"}),
        ("discount-codes", 'code = "SUMMER10"', {"discount-code:summer"}),
    ],
)
def test_query_returns_matching_resources(collection: str, where: str, expected: set[str], call: Caller) -> None:
    """The cases cover every query of the worker."""
    status, document = call.get(collection, ("where", where))
    assert (status, names(document)) == (200, set(map(uid, expected)))


def test_several_predicates_must_all_match(call: Caller) -> None:
    """The parameter `where` can be repeated."""
    both = [("where", 'sku = "JEANS-30"'), ("where", "availableQuantity < 10")]
    assert names(call.get("inventory", *both)[1]) == {uid("inventory-entry:jeans-30-store")}


def test_pages_contain_every_resource_once(call: Caller, sandbox: Sandbox) -> None:
    """The pages use offsets or `id >`. The total is optional."""
    first = call.get("orders", ("sort", "id asc"), ("limit", "4"))[1]
    assert (first["limit"], first["offset"], first["count"], first["total"]) == (4, 0, 4, len(sandbox.shop.orders))
    second = call.get("orders", ("sort", "id asc"), ("limit", "500"), ("offset", "4"), ("withTotal", "false"))[1]
    assert "total" not in second
    assert [order["id"] for order in first["results"] + second["results"]] == sorted(sandbox.shop.orders)
    last = first["results"][-1]["id"]
    rest = call.get("orders", ("sort", "id asc"), ("limit", "500"), ("where", f'id > "{last}"'))[1]
    assert rest["results"] == second["results"]
    assert call.get("orders", ("sort", "id desc"), ("limit", "1"))[1]["results"][0]["id"] == max(sandbox.shop.orders)
    assert len(call.get("inventory")[1]["results"]) == min(20, len(sandbox.shop.inventory))


@pytest.mark.parametrize(
    "parameter",
    [
        ("limit", "501"),
        ("limit", "-1"),
        ("limit", "many"),
        ("offset", "10001"),
        ("sort", "id sideways"),
        ("where", "id ="),
        ("where", "(" * 1_000 + 'id = "x"' + ")" * 1_000),
    ],
)
def test_malformed_query_is_rejected(parameter: tuple[str, str], call: Caller) -> None:
    """The response is 400 InvalidInput."""
    status, document = call.get("orders", parameter)
    assert (status, document["errors"][0]["code"]) == (400, "InvalidInput")


def test_uri_has_at_most_8_kb(call: Caller) -> None:
    """This is the limit of the real load balancer."""
    path = f"/{PROJECT}/orders?x="
    assert call.raw(path + "y" * (8_192 - len(path))).status == 200
    assert call.raw(path + "y" * (8_193 - len(path))).status == 413


def test_long_responses_are_compressed_on_request(call: Caller) -> None:
    """Short ones are never compressed."""
    path = f"/{PROJECT}/orders/{uid('order:hundred')}"
    zipped, plain = call.raw(path, **{"Accept-Encoding": "gzip"}), call.raw(path)
    assert zipped.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped.data) == plain.data
    assert len(zipped.data) < len(plain.data) / 5
    assert "Content-Encoding" not in plain.headers
    assert "Content-Encoding" not in call.raw(f"/{PROJECT}/orders/none", **{"Accept-Encoding": "gzip"}).headers


def test_every_response_has_a_correlation_id(call: Caller) -> None:
    """It is the id of the request, or a new one."""
    path = f"/{PROJECT}/customers"
    assert call.raw(path, **{"X-Correlation-ID": "mine"}).headers["X-Correlation-ID"] == "mine"
    found = {call.raw(path).headers["X-Correlation-ID"] for _ in range(2)}
    assert len(found) == 2
