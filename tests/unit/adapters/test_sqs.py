"""What of the SQS adapter needs no queue: URLs, attributes, what errors mean."""

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
def test_a_url_names_queue_and_region(name: str, region: str) -> None:
    """Every name that SQS allows."""
    assert parse_url(f"sqs://{name}" + (f"?region={region}" if region else "")) == (name, region)


@given(name=NAMES, region=REGIONS)
def test_the_url_that_aws_shows_has_the_region_in_it(name: str, region: str) -> None:
    """As the console shows it, and as `aws sqs get-queue-url` prints it."""
    assert parse_url(f"https://sqs.{region}.amazonaws.com/123456789012/{name}") == (name, region)


@given(st.text() | st.text().map("sqs://{}".format) | st.text().map("https://sqs.eu-central-1.amazonaws.com/{}".format))
def test_what_is_no_such_url_is_refused_and_not_repeated(url: str) -> None:
    """It may hold a secret; nothing worse than QueueURLError comes of any text."""
    try:
        name, _ = parse_url(url)
    except QueueURLError as error:
        assert str(error).startswith("QUEUE_URL is malformed: expected sqs://NAME")
    else:
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo", name)


@given(ours=TEXTS, theirs=TEXTS, room=st.integers(0, 5000))
def test_attributes_are_what_sqs_takes(ours: dict[str, str], theirs: dict[str, str], room: int) -> None:
    """At most ten, not empty, without control characters, in the room there is; ours before theirs."""
    theirs = {name: value for name, value in theirs.items() if ALLOWED.fullmatch(value)}  # they came from SQS
    yielded = list(message_attributes(ours, theirs, room))
    told = {name: value["StringValue"] for name, value in yielded}
    assert len(told) == len(yielded) <= MAX_ATTRIBUTES
    assert all(ALLOWED.fullmatch(value) for value in told.values())
    assert sum(len(name) + len("String") + len(value.encode()) for name, value in told.items()) <= room
    assert all(name in ours or told[name] == theirs[name] for name in told)
    expected = {name for name, value in ours.items() if value}
    if room == 5000 and len(expected) <= MAX_ATTRIBUTES and sum(map(len, ours.values())) < 1000:
        assert expected <= told.keys()


def test_long_values_of_ours_are_cut_and_theirs_are_not() -> None:
    """A reason may be long; what is theirs is sent as it was or not at all."""
    told = dict(message_attributes({"reason": "é" * 2000}, {"theirs": "x" * 2000}, 10_000))
    assert told["reason"]["StringValue"] == "é" * (MAX_VALUE // 2)
    assert told["theirs"]["StringValue"] == "x" * 2000


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
def test_what_somebody_has_to_mend_is_a_refusal(error: Exception, refused: bool) -> None:
    """Everything else passes by itself."""
    assert aws.is_refusal(error) is refused


@pytest.mark.parametrize("code", ["AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"])
def test_both_names_of_a_missing_queue_are_known(code: str) -> None:
    """The older one comes with the query protocol's compatibility."""
    assert aws.is_missing(client_error(400, code))


def test_what_came_is_awaited_no_more() -> None:
    """Whoever sent it back, and in whatever order."""
    expected = ExpectedRedeliveries()
    expected.add(["a", "b", "a"])
    assert len(expected) == 2
    expected.remove(["b", "c"])
    assert len(expected) == 1
