"""The commercetools stand-in: tokens, queries, and the limits of the real one."""

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
    """Speaks plain HTTP to the commercetools stand-in."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._url = sandbox.commercetools.url
        self._pool = urllib3.PoolManager(retries=False, timeout=5)

    def token(self, identity: str = BASIC, **form: str) -> tuple[int, Any]:
        headers = urllib3.make_headers(basic_auth=identity)
        headers["Content-Type"] = "application/x-www-form-urlencoded"
        answer = self._pool.request("POST", f"{self._url}/oauth/token", body=urlencode(form or GRANT), headers=headers)
        return answer.status, answer.json()

    def raw(self, path: str, token: str = "", **headers: str) -> urllib3.BaseHTTPResponse:
        token = token or self.token()[1]["access_token"]
        merged = {"Authorization": f"Bearer {token}", **headers}
        return self._pool.request("GET", self._url + path, headers=merged, decode_content=False)

    def get(self, collection: str, *parameters: tuple[str, str], token: str = "") -> tuple[int, Any]:
        answer = self.raw(f"/{PROJECT}/{collection}?{urlencode(parameters)}", token)
        return answer.status, orjson.loads(answer.data)


@pytest.fixture
def call(sandbox: Sandbox) -> Caller:
    return Caller(sandbox)


def names(document: Any) -> set[str]:
    return {resource["id"] for resource in document["results"]}


def test_a_token_is_granted_for_what_was_asked(call: Caller) -> None:
    """All the client has when nothing was asked; less when it has less."""
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
def test_a_bad_token_request_is_refused(
    identity: str, form: dict[str, str], status: int, code: str, call: Caller, sandbox: Sandbox
) -> None:
    """In the form of commercetools' errors."""
    answer = call.token(identity, **form)
    assert (answer[0], answer[1]["statusCode"], answer[1]["errors"][0]["code"]) == (status, status, code)
    assert sandbox.commercetools_api.tokens_issued == 0


def test_a_token_counts_until_it_is_revoked_or_expires(call: Caller, sandbox: Sandbox) -> None:
    """401 invalid_token then, as for one never issued or another scheme."""
    token = call.token()[1]["access_token"]
    assert call.get("orders", token=token)[0] == 200
    sandbox.commercetools_api.revoke_tokens()
    for bad in (token, "invented"):
        status, document = call.get("orders", token=bad)
        assert (status, document["errors"][0]["code"]) == (401, "invalid_token")
    assert call.raw(f"/{PROJECT}/orders", Authorization=f"Basic {call.token()[1]['access_token']}").status == 401
    with Sandbox(token_lifetime=0) as short:
        assert Caller(short).get("orders")[0] == 401


def test_a_resource_is_read_by_id(call: Caller) -> None:
    """404 for what is not there: the id, the collection, the project, the method."""
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
def test_a_query_finds_what_its_predicate_names(collection: str, where: str, expected: set[str], call: Caller) -> None:
    """Every query the worker needs."""
    status, document = call.get(collection, ("where", where))
    assert (status, names(document)) == (200, set(map(uid, expected)))


def test_several_predicates_must_all_hold(call: Caller) -> None:
    """`where` may be repeated."""
    both = [("where", 'sku = "JEANS-30"'), ("where", "availableQuantity < 10")]
    assert names(call.get("inventory", *both)[1]) == {uid("inventory-entry:jeans-30-store")}


def test_a_scan_in_pages_sees_everything_once(call: Caller, sandbox: Sandbox) -> None:
    """By offset, and by `id >`; the total only when it is wanted."""
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
def test_a_malformed_query_is_invalid_input(parameter: tuple[str, str], call: Caller) -> None:
    """400, never a guess."""
    status, document = call.get("orders", parameter)
    assert (status, document["errors"][0]["code"]) == (400, "InvalidInput")


def test_an_uri_has_8_kb(call: Caller) -> None:
    """As the load balancer of the real service has it."""
    path = f"/{PROJECT}/orders?x="
    assert call.raw(path + "y" * (8_192 - len(path))).status == 200
    assert call.raw(path + "y" * (8_193 - len(path))).status == 413


def test_long_answers_are_compressed_on_request_only(call: Caller) -> None:
    """And short ones never."""
    path = f"/{PROJECT}/orders/{uid('order:hundred')}"
    zipped, plain = call.raw(path, **{"Accept-Encoding": "gzip"}), call.raw(path)
    assert zipped.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped.data) == plain.data
    assert len(zipped.data) < len(plain.data) / 5
    assert "Content-Encoding" not in plain.headers
    assert "Content-Encoding" not in call.raw(f"/{PROJECT}/orders/none", **{"Accept-Encoding": "gzip"}).headers


def test_every_answer_has_a_correlation_id(call: Caller) -> None:
    """The caller's own, or one of its own."""
    path = f"/{PROJECT}/customers"
    assert call.raw(path, **{"X-Correlation-ID": "mine"}).headers["X-Correlation-ID"] == "mine"
    found = {call.raw(path).headers["X-Correlation-ID"] for _ in range(2)}
    assert len(found) == 2
