"""Bulk upserts of profiles over real sockets: results only for complete jobs, errors only for failed profiles."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.integration.conftest import klaviyo_for
from tests.support.sender import Sender
from worker import send
from worker.errors import KlaviyoMisconfigured, Rejected, Transient
from worker.model import Operation, OperationKind
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.send import jobs

if TYPE_CHECKING:
    from collections.abc import Iterator

JOBS, SINGLE = "/api/profile-bulk-import-jobs", "/api/profile-import"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as running:
        yield running


def upsert(number: int, **attributes: Any) -> Operation:
    who = {"email": f"{number}@example.com", "external_id": f"c{number}", "first_name": "Ada"} | attributes
    return Operation(OperationKind.UPSERT_PROFILE, f"c{number}", {"type": "profile", "attributes": who})


def upserts(number: int) -> list[Operation]:
    return [upsert(each) for each in range(number)]


def calls(sandbox: Sandbox) -> Counter[str]:
    return Counter(f"{each.method} {each.path}" for each in sandbox.klaviyo.requests)


def emails(sandbox: Sandbox) -> set[str]:
    return {profile["attributes"]["email"] for profile in sandbox.account.profiles}


def test_many_profiles_are_one_job(sandbox: Sandbox) -> None:
    """500 profiles cost two requests: one starts the job, one reads its status."""
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(500)) == [None] * 500
    assert emails(sandbox) == {f"{number}@example.com" for number in range(500)}
    assert calls(sandbox) == {f"POST {JOBS}": 1, f"GET {JOBS}": 1}


def test_few_profiles_are_sent_individually(sandbox: Sandbox) -> None:
    """A job takes longer than a few requests."""
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(10)) == [None] * 10
    assert calls(sandbox) == {f"POST {SINGLE}": 10}


def test_result_waits_until_the_job_is_complete() -> None:
    """An accepted job has not imported its profiles yet."""
    with Sandbox(account=Account(job_seconds=1.0)) as sandbox:
        assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
        assert len(sandbox.account.profiles) == 20


def test_invalid_profile_does_not_affect_the_others(sandbox: Sandbox) -> None:
    """A rejected job is sent again without the invalid profiles. A bad phone number is dropped."""
    batch = upserts(50)
    batch[7] = upsert(7, first_name=7)
    batch[30] = upsert(30, phone_number="123")
    results = Sender(klaviyo_for(sandbox), 4).send(batch)
    assert [number for number, result in enumerate(results) if result] == [7]
    assert isinstance(results[7], Rejected)
    assert emails(sandbox) == {f"{number}@example.com" for number in range(50) if number != 7}
    assert calls(sandbox)[f"POST {JOBS}"] == 3


def test_conflict_within_a_job_is_resolved_individually(sandbox: Sandbox) -> None:
    """A profile fails in the job if its identifiers belong to two profiles. The other profiles succeed."""
    for attributes in ({"email": "5@example.com"}, {"external_id": "c5"}):
        sandbox.account.create_profile({"type": "profile", "attributes": attributes})
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(50)) == [None] * 50
    (five,) = [p for p in sandbox.account.profiles if p["attributes"].get("email") == "5@example.com"]
    assert five["attributes"]["first_name"] == "Ada"
    assert calls(sandbox)[f"POST {SINGLE}"] >= 1
    assert calls(sandbox)[f"POST {JOBS}"] == 1


@pytest.mark.parametrize(
    "errors", [[], [{"attributes": {"detail": "?"}}], [{"attributes": {"original_payload": None}}]]
)
def test_failures_without_ids_send_all_profiles_individually(errors: list[Any], sandbox: Sandbox) -> None:
    """A profile that has possibly failed does not count as imported."""
    for attributes in ({"email": "5@example.com"}, {"external_id": "c5"}):
        sandbox.account.create_profile({"type": "profile", "attributes": attributes})
    body = orjson.dumps({"data": errors})
    sandbox.klaviyo.faults.add(Fault(match=f"GET {JOBS}/", status=200, body=body))
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
    assert calls(sandbox)[f"POST {SINGLE}"] >= 20


def test_errors_are_read_if_the_failed_count_is_unknown(sandbox: Sandbox) -> None:
    """Klaviyo can return null for failed_count."""
    for attributes in ({"email": "5@example.com"}, {"external_id": "c5"}):
        sandbox.account.create_profile({"type": "profile", "attributes": attributes})
    job = {"type": "profile-bulk-import-job", "id": "J", "attributes": {"status": "complete", "failed_count": None}}
    error = {"attributes": {"original_payload": {"attributes": {"external_id": "c5"}}}}
    sandbox.klaviyo.faults.add(
        Fault(match=f"POST {JOBS}", status=202, body=orjson.dumps({"data": job})),
        Fault(match=f"GET {JOBS}/J/import-errors", status=200, body=orjson.dumps({"data": [error]})),
        Fault(match=f"GET {JOBS}", status=200, body=orjson.dumps({"data": [job]})),
    )
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
    (five,) = [p for p in sandbox.account.profiles if p["attributes"].get("email") == "5@example.com"]
    assert five["attributes"]["first_name"] == "Ada"


def test_profiles_that_share_an_identifier_are_sent_individually(sandbox: Sandbox) -> None:
    """Klaviyo documents no order within a job."""
    batch = [*upserts(20), upsert(20, email="3@example.com")]
    Sender(klaviyo_for(sandbox), 4).send(batch)
    assert calls(sandbox)[f"POST {SINGLE}"] >= 2
    assert [request.path for request in sandbox.klaviyo.requests].count(JOBS) == 2


@pytest.mark.parametrize("match", [f"POST {JOBS}", f"GET {JOBS}"])
def test_outage_fails_all_profiles_and_the_retry_succeeds(match: str, sandbox: Sandbox) -> None:
    """The outage starts before the job is posted, or while it is polled."""
    sandbox.klaviyo.faults.add(Fault(match=match, times=None))
    sender = Sender(klaviyo_for(sandbox, retry_timeout=0.1), 4)
    assert all(isinstance(result, Transient) for result in sender.send(upserts(20)))
    sandbox.klaviyo.faults.clear()
    assert sender.send(upserts(20)) == [None] * 20
    assert len(sandbox.account.profiles) == 20


def test_outage_after_a_rejected_job_spares_the_accepted_half(sandbox: Sandbox) -> None:
    """The job is rejected without a pointer and halved. One half is accepted, and the other half fails in an outage."""
    sandbox.klaviyo.faults.add(
        Fault(match=f"POST {JOBS}", status=400), Fault(match=f"POST {JOBS}", contains=b'"c15"', times=None)
    )
    results = Sender(klaviyo_for(sandbox, retry_timeout=0.1), 4).send(upserts(20))
    assert [type(result) for result in results] == [type(None)] * 10 + [Transient] * 10


@pytest.mark.parametrize("status", ["cancelled", "processing"])
def test_unfinished_job_is_sent_individually(status: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is cancelled, or it is not complete when the timeout is over."""
    monkeypatch.setattr(jobs, "JOB_TIMEOUT", 0.5)
    job = {"type": "profile-bulk-import-job", "id": "J", "attributes": {"status": status}}
    accepted, listed = orjson.dumps({"data": job}), orjson.dumps({"data": [job]})
    sandbox.klaviyo.faults.add(
        Fault(match=f"POST {JOBS}", status=202, body=accepted),
        Fault(match=f"GET {JOBS}", status=200, body=listed, times=None),
    )
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
    assert len(sandbox.account.profiles) == 20
    assert calls(sandbox)[f"POST {SINGLE}"] == 20


def test_job_that_is_not_listed_is_read_by_its_id(sandbox: Sandbox) -> None:
    """An account can have more recent jobs than a page lists."""
    sandbox.klaviyo.faults.add(Fault(match=f"GET {JOBS}", status=200, body=b'{"data":[]}'))
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
    assert sum(each.startswith(f"GET {JOBS}/") for each in calls(sandbox).elements()) == 1


def test_unknown_job_is_sent_individually(sandbox: Sandbox) -> None:
    """The job may have expired, so no profile counts as imported."""
    sandbox.klaviyo.faults.add(
        Fault(match=f"GET {JOBS}/", status=404), Fault(match=f"GET {JOBS}", status=200, body=b'{"data":[]}')
    )
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
    assert calls(sandbox)[f"POST {SINGLE}"] == 20


@pytest.mark.parametrize("body", [b'{"data":{}}', b"{}", b"[]", b'{"data":[{"id":7}]}'])
def test_response_without_a_job_is_a_transient_error(body: bytes, sandbox: Sandbox) -> None:
    """A job without an id cannot be polled."""
    sandbox.klaviyo.faults.add(Fault(match=f"POST {JOBS}", status=202, body=body))
    assert all(isinstance(result, Transient) for result in Sender(klaviyo_for(sandbox), 4).send(upserts(20)))


@pytest.mark.parametrize("match", [f"POST {JOBS}", f"GET {JOBS}"])
def test_key_without_the_scopes_of_jobs_sends_individually(
    match: str, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """The missing scope is logged once, and the worker is not parked."""
    sandbox.klaviyo.faults.add(Fault(match=match, status=403, times=None))
    sender = Sender(klaviyo_for(sandbox), 4)
    for _ in range(2):
        assert sender.send(upserts(20)) == [None] * 20
    assert len(sandbox.account.profiles) == 20
    assert [record.message for record in caplog.records] == ["bulk_jobs_refused"]
    sandbox.klaviyo.faults.add(Fault(match=f"POST {SINGLE}", status=401, times=None))
    assert all(isinstance(result, KlaviyoMisconfigured) for result in sender.send(upserts(20)))


def test_lanes_share_their_polls() -> None:
    """The endpoint accepts 150 requests a minute for all jobs."""
    with Sandbox(account=Account(job_seconds=2.0)) as sandbox, ThreadPoolExecutor(4) as lanes:
        sender = Sender(klaviyo_for(sandbox), 4)
        batches = [[upsert(lane * 100 + number) for number in range(20)] for lane in range(4)]
        assert list(lanes.map(sender.send, batches)) == [[None] * 20] * 4
        assert calls(sandbox)[f"POST {JOBS}"] == 4
        asked = calls(sandbox)[f"GET {JOBS}"]
    with Sandbox(account=Account(job_seconds=2.0)) as sandbox:
        assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
        alone = calls(sandbox)[f"GET {JOBS}"]
    assert asked <= 2 * alone


def test_stopping_worker_does_not_wait_for_a_job() -> None:
    """Its messages are returned. A repeated import has no second effect."""
    with Sandbox(account=Account(job_seconds=60.0)) as sandbox:
        stopping = Event()
        sender = send.Sender(klaviyo_for(sandbox), 4, stopping, allows_bulk_events=bool, bulk_threshold=10)
        results: list[Any] = []
        lane = Thread(target=lambda: results.extend(sender.send(upserts(20))))
        lane.start()
        while not sandbox.klaviyo.requests:
            time.sleep(0.01)
        stopping.set()
        lane.join(60)
        assert [type(result.error) for result in results] == [Transient] * 20
