"""Hostile bodies and ids. FUZZ_EXAMPLES sets the number of inputs of each test."""

from __future__ import annotations

import base64
import json
import os
import random
import re
from urllib.parse import parse_qs, quote, unquote, urlsplit

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.base import DeadLetter, Failure
from adapters.push.delivery import parse_request
from tests.conftest import FakeDelivery
from tests.golden.test_golden import CASES, HERE
from worker.commands.dlq.dead_letters import DeadLetterFilter, format_body, format_json_line, summarize
from worker.commercetools.client import _chunks, _where
from worker.commercetools.queries import ORDERS
from worker.errors import Ignored, Rejected
from worker.klaviyo.client import endpoint_of
from worker.parse import parse
from worker.send.catalog.reader import _filter
from worker.send.profile_directory import _literal
from worker.send.requests import entry_path
from worker.transform.catalog import catalog_id

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

NOTIFICATIONS = [(HERE / case / "notification.json").read_bytes() for case in CASES]
DEPTHS = (10, 200, 300, 1_000, 1_023, 1_024, 1_025, 5_000)
SIGNS = "\"\\)(,='%/?#&\n\r\0é{}:][+; .$"
ids = st.text(st.sampled_from(SIGNS) | st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)


def _wrap(body: bytes, kind: int) -> bytes:
    """Return a body in an envelope; bodies that are not JSON are put in as text."""
    text = body.decode("utf-8", "replace")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = text
    envelopes = [
        {"specversion": "1.0", "data": content},
        {"specversion": "1.0", "data": text},
        {"Type": "Notification", "Message": text, "SubscribeURL": "http://169.254.169.254/"},
        {"detail-type": "x", "detail": content},
        {"ReceiptHandle": "r", "Body": text},
        {"message": {"data": base64.b64encode(body).decode(), "messageId": [1]}},
    ]
    return orjson.dumps(envelopes[kind]) if kind < len(envelopes) else b"\xef\xbb\xbf" + body


def _damage(body: bytes, chance: random.Random) -> bytes:
    """Return a body with other bytes, without its end, or with deep nesting; or as it is."""
    kind = chance.random()
    if kind < 0.4:
        changed = bytearray(body)
        for _ in range(chance.randint(1, 5)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    if kind < 0.5:
        return body[: chance.randrange(len(body))]
    if kind < 0.6:
        depth = chance.choice(DEPTHS)
        return body.replace(b'"createdAt"', b'"deep":' + b"[" * depth + b"]" * depth + b',"createdAt"', 1)
    return body


@fuzz
@given(st.sampled_from(NOTIFICATIONS), st.lists(st.integers(0, 6), max_size=8), st.integers())
def test_every_body_has_an_outcome(body: bytes, wraps: list[int], seed: int) -> None:
    """A hostile publisher causes a dead letter with a reason, and never an exception. Every view of it is printable."""
    for kind in wraps:
        body = _wrap(body, kind)
    body = _damage(body, random.Random(seed))
    try:
        assert parse(body).resource_id.isprintable()
    except (Ignored, Rejected) as outcome:
        assert str(outcome).isprintable()
        assert len(str(outcome)) < 500
    pushed = parse_request(body, lambda _: None)
    assert len(pushed.id) <= 256
    dead_letter = DeadLetter(FakeDelivery(body), Failure("r", "s", "e"), None)
    assert format_json_line(summarize(dead_letter)).isprintable()
    assert all(line.isprintable() for line in format_body(body).splitlines())
    assert list(DeadLetterFilter(about="\udcff@", message_type="x").select([dead_letter])) == []


_LITERAL = r'"((?:[^"\\]|\\.)*)"'


@fuzz
@given(st.sets(ids, min_size=1, max_size=4))
def test_ids_stay_literals_in_a_predicate(values: set[str]) -> None:
    """Commercetools would otherwise return the resources of others."""
    found = []
    for chunk in _chunks(sorted(values), ORDERS):
        url = urlsplit("https://api.example/shop/orders?limit=5&where=" + quote(_where(ORDERS, chunk)))
        (where,) = parse_qs(url.query, keep_blank_values=True)["where"]
        assert re.fullmatch(rf"id in \({_LITERAL}(,{_LITERAL})*\)", where, re.DOTALL)
        assert not url.fragment
        found += [re.sub(r"\\(.)", r"\1", each, flags=re.DOTALL) for each in re.findall(_LITERAL, where, re.DOTALL)]
    assert found == sorted(values)


@fuzz
@given(ids)
def test_keys_stay_in_one_segment_of_a_path(key: str) -> None:
    """A sku cannot name another entry or endpoint, and metrics get no label of its own."""
    path = entry_path("catalog-items", key)
    url = urlsplit("https://a.klaviyo.com" + path)
    assert not url.query
    assert not url.fragment
    assert url.path == path
    segments = url.path.split("/")
    assert segments[:3] == ["", "api", "catalog-items"]
    assert unquote(segments[3]) == catalog_id(key)
    assert endpoint_of("PATCH", path).startswith("PATCH /api/catalog-items/{id}")


@fuzz
@given(st.lists(ids, min_size=1, max_size=4))
def test_keys_stay_literals_in_a_filter(keys: list[str]) -> None:
    """Klaviyo would otherwise return the entries of other products, which would be deleted."""
    query = parse_qs(urlsplit(f"https://x/?{_filter(keys)}&fields=id").query)
    assert query.keys() == {"filter", "fields"}
    assert json.loads("[" + query["filter"][0][len("any(ids,[") : -2] + "]") == list(map(catalog_id, keys))


@fuzz
@given(st.lists(ids, min_size=1, max_size=4))
def test_identifiers_stay_literals_in_a_filter(values: list[str]) -> None:
    """A shopper chooses their email. Klaviyo would otherwise return the profiles of others."""
    literals = ",".join(map(_literal, values))
    query = parse_qs(urlsplit(f"https://x/?filter=any(email,%5B{literals}%5D)&fields=id").query)
    assert query.keys() == {"filter", "fields"}
    assert json.loads("[" + query["filter"][0][len("any(email,[") : -2] + "]") == values
