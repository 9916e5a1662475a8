"""One bad operation must not affect the others of its batch: defects, unencodable texts, blocked records."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.integration.conftest import klaviyo_for
from tests.integration.send.test_catalog import category
from tests.integration.send.test_events import placed
from tests.integration.send.test_profiles import upsert
from tests.support.sender import Sender
from worker.errors import Disposition, RequestBlocked
from worker.sandbox import Fault, Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.model import Operation

TEXTS: dict[Callable[[int], Operation], str] = {placed: "City", upsert: "first_name", category: "name"}
PAGE = b"<!DOCTYPE html><title>Attention Required!</title>"


def stored(sandbox: Sandbox) -> int:
    """Count the events, imported profiles and categories in the account."""
    account = sandbox.account
    events = len(account.events)
    return events or len(account.profiles) + len(account.categories)


@pytest.mark.parametrize("number", [3, 30])
@pytest.mark.parametrize("make", TEXTS)
def test_text_that_json_cannot_contain_affects_only_its_operation(
    make: Callable[[int], Operation], number: int, sandbox: Sandbox
) -> None:
    """Half a surrogate pair cannot be encoded. The operation is returned to the queue, with the place of the defect."""
    operations = [make(each) for each in range(number)]
    assert operations[1].resource
    operations[1].resource["attributes"]["half"] = "\ud83d"
    results = Sender(klaviyo_for(sandbox), 4).send(operations)
    error = results.pop(1)
    assert error
    assert error.disposition is Disposition.NACK
    assert str(error).startswith("unexpected TypeError at client.py:")
    assert results == [None] * (number - 1)
    assert stored(sandbox) == number - 1


@pytest.mark.parametrize("number", [3, 30])
@pytest.mark.parametrize("make", TEXTS)
@pytest.mark.parametrize("status", [403, 413])
def test_record_that_a_firewall_blocks_affects_only_its_operation(
    status: int, make: Callable[[int], Operation], number: int, sandbox: Sandbox
) -> None:
    """Bulk calls and jobs are halved until only the blocked record is left."""
    operations = [make(each) for each in range(number)]
    assert operations[1].resource
    attributes = operations[1].resource["attributes"]
    attributes.get("properties", attributes)[TEXTS[make]] = "<script>"
    fault = Fault(status=status, times=None, contains=b"<script>", body=PAGE, headers={"Content-Type": "text/html"})
    sandbox.klaviyo.faults.add(fault)
    client = klaviyo_for(sandbox, retry_timeout=0)
    results = Sender(client, 4).send(operations)
    assert isinstance(results.pop(1), RequestBlocked)
    assert results == [None] * (number - 1)
    assert stored(sandbox) == number - 1
    assert client.outage_reason() == ""
