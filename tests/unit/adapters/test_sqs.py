"""The SQS adapter without a queue: URLs, attributes, and the classification of errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
from botocore import exceptions as boto
from hypothesis import given
from hypothesis import strategies as st

from adapters import QueueURLError
from adapters.shared.redeliveries import ExpectedRedeliveries
from adapters.sqs import client as aws
from adapters.sqs.queue import parse_url
from adapters.sqs.sending import MAX_ATTRIBUTES, MAX_VALUE, message_attributes

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,75}(\.fifo)?", fullmatch=True)
REGIONS = st.sampled_from(["eu-central-1", "us-gov-west-1", "cn-north-1", "ap-southeast-10", "eusc-de-east-1"])
TEXTS = st.dictionaries(st.text("abc", min_size=1), st.text(st.characters()), max_size=15)
ALLOWED = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+")


@given(name=NAMES, region=st.just("") | REGIONS)
def test_url_has_queue_and_region(name: str, region: str) -> None:
    """Every name that SQS allows is accepted."""
    assert parse_url(f"sqs://{name}" + (f"?region={region}" if region else "")) == (name, region)


@given(name=NAMES, region=REGIONS)
def test_https_url_has_the_region(name: str, region: str) -> None:
    """The console and `aws sqs get-queue-url` show this form."""
    assert parse_url(f"https://sqs.{region}.amazonaws.com/123456789012/{name}") == (name, region)


@given(st.text() | st.text().map("sqs://{}".format) | st.text().map("https://sqs.eu-central-1.amazonaws.com/{}".format))
def test_invalid_url_is_rejected_and_not_quoted(url: str) -> None:
    """It can contain a secret. No text causes another error than QueueURLError."""
    try:
        name, _ = parse_url(url)
    except QueueURLError as error:
        assert str(error).startswith("QUEUE_URL is malformed: expected sqs://NAME")
    else:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo", name)


@given(added=TEXTS, original=TEXTS, max_bytes=st.integers(0, 5000))
def test_attributes_are_valid_for_sqs(added: dict[str, str], original: dict[str, str], max_bytes: int) -> None:
    """At most ten, not empty, without control characters, within the size; added ones first."""
    original = {name: value for name, value in original.items() if ALLOWED.fullmatch(value)}  # SQS delivered them
    yielded = list(message_attributes(added, original, max_bytes))
    values = {name: value["StringValue"] for name, value in yielded}
    assert len(values) == len(yielded) <= MAX_ATTRIBUTES
    assert all(ALLOWED.fullmatch(value) for value in values.values())
    assert sum(len(name) + len("String") + len(value.encode()) for name, value in values.items()) <= max_bytes
    assert all(name in added or values[name] == original[name] for name in values)
    expected = {name for name, value in added.items() if value}
    if max_bytes == 5000 and len(expected) <= MAX_ATTRIBUTES and sum(map(len, added.values())) < 1000:
        assert expected <= values.keys()


def test_only_added_values_are_truncated() -> None:
    """A reason can be long. An original value is sent unchanged or not at all."""
    values = dict(message_attributes({"reason": "é" * 2000}, {"original": "x" * 2000}, 10_000))
    assert values["reason"]["StringValue"] == "é" * (MAX_VALUE // 2)
    assert values["original"]["StringValue"] == "x" * 2000


def client_error(status: int, code: str) -> boto.ClientError:
    response: Any = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(response, "ReceiveMessage")


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (client_error(400, "AWS.SimpleQueueService.NonExistentQueue"), True),
        (client_error(403, "AccessDenied"), True),
        (client_error(403, "ExpiredToken"), True),
        (boto.NoCredentialsError(), True),
        (client_error(400, "ThrottlingException"), False),
        (client_error(403, "RequestThrottled"), False),
        (client_error(400, "OverLimit"), False),
        (client_error(429, "Strange"), False),
        (client_error(408, "Strange"), False),
        (client_error(400, "RequestTimeout"), False),
        (client_error(500, "InternalError"), False),
        (client_error(503, "ServiceUnavailable"), False),
        (boto.EndpointConnectionError(endpoint_url="http://x"), False),
        (ValueError("m"), False),
    ],
    ids=lambda value: aws.error_code(value) if isinstance(value, Exception) else "",
)
def test_error_that_an_operator_must_fix_is_a_refusal(error: Exception, refused: bool) -> None:
    """All other errors are transient."""
    assert aws.is_refusal(error) is refused


@pytest.mark.parametrize("code", ["AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"])
def test_both_codes_of_a_missing_queue_are_known(code: str) -> None:
    """The older code belongs to the compatibility with the query protocol."""
    assert aws.is_missing(client_error(400, code))


def test_received_message_is_no_longer_expected() -> None:
    """This holds for any message and any order."""
    expected = ExpectedRedeliveries()
    expected.add(["a", "b", "a"])
    assert len(expected) == 2
    expected.remove(["b", "c"])
    assert len(expected) == 1
