"""Bulk upserts of profiles over real sockets: results only for complete jobs, errors only for failed profiles."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.integration.conftest import klaviyo_for
from tests.support.sender import Sender
from worker.errors import JobUnfinished, KlaviyoMisconfigured, Rejected, Transient
from worker.model import Operation, OperationKind
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.server import path_template

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

JOBS, SINGLE, READ = "/api/profile-bulk-import-jobs", "PATCH /api/profiles/{id}", "GET /api/profiles"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with sandbox_with_customers() as running:
        yield running


def sandbox_with_customers(job_seconds: float = 0.0, number: int = 60) -> Sandbox:
    """Return an emulator that has the profiles of customers c0, c1 ..., without their names."""
    account = Account(job_seconds=job_seconds)
    for each in range(number):
        add_profile(account, email=f"{each}@example.com", external_id=f"c{each}")
    return Sandbox(account=account)


def add_profile(account: Account, **attributes: str) -> None:
    account.create_profile({"type": "profile", "attributes": attributes})


def upsert(number: int, **attributes: Any) -> Operation:
    who = {"email": f"{number}@example.com", "external_id": f"c{number}", "first_name": "Ada"} | attributes
    return Operation(OperationKind.UPSERT_PROFILE, f"c{number}", {"type": "profile", "attributes": who})


def upserts(number: int) -> list[Operation]:
    return [upsert(each) for each in range(number)]


def calls(sandbox: Sandbox) -> Counter[str]:
    return Counter(
        f"{each.method} {path_template(each.path) if '/api/profiles/' in each.path else each.path}"
        for each in sandbox.klaviyo.requests
    )


def written(sandbox: Sandbox) -> set[str]:
    """Return the email addresses of the profiles that have been written."""
    found = (profile["attributes"] for profile in sandbox.account.profiles)
    return {attributes["email"] for attributes in found if attributes.get("first_name") == "Ada"}


def test_many_profiles_are_one_job() -> None:
    """500 profiles cost five reads and two requests: one starts the job, one reads its status."""
    with sandbox_with_customers(number=500) as sandbox:
        assert Sender(klaviyo_for(sandbox), 4).send(upserts(500)) == [None] * 500
        assert written(sandbox) == {f"{number}@example.com" for number in range(500)}
        assert calls(sandbox) == {READ: 5, f"POST {JOBS}": 1, f"GET {JOBS}": 1}


def test_few_profiles_are_sent_individually(sandbox: Sandbox) -> None:
    """A job takes longer than a few requests."""
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(10)) == [None] * 10
    assert calls(sandbox) == {READ: 1, SINGLE: 10}


def test_result_waits_until_the_job_is_complete() -> None:
    """An accepted job has not imported its profiles yet."""
    with sandbox_with_customers(1.0) as sandbox:
        assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
        assert len(written(sandbox)) == 20


def test_invalid_profile_does_not_affect_the_others(sandbox: Sandbox) -> None:
    """A rejected job is sent again without the invalid profiles. A bad phone number is dropped."""
    batch = upserts(50)
    batch[7] = upsert(7, first_name=7)
    batch[30] = upsert(30, phone_number="123")
    results = Sender(klaviyo_for(sandbox), 4).send(batch)
    assert [number for number, result in enumerate(results) if result] == [7]
    assert isinstance(results[7], Rejected)
    assert written(sandbox) == {f"{number}@example.com" for number in range(50) if number != 7}
    assert calls(sandbox)[f"POST {JOBS}"] == 3


def test_conflict_within_a_job_is_resolved_individually(sandbox: Sandbox) -> None:
    """A profile fails in the job if another profile has got its phone number in the meantime. The others succeed."""
    job_with_conflict(sandbox)
    assert Sender(klaviyo_for(sandbox), 4).send(batch_with_phone(50)) == [None] * 50
    assert "5@example.com" in written(sandbox)
    assert (calls(sandbox)[SINGLE], calls(sandbox)[f"POST {JOBS}"]) == (1, 1)


PHONE = "+4930901820"


def batch_with_phone(number: int) -> list[Operation]:
    return [upsert(each, **({"phone_number": PHONE} if each == 5 else {})) for each in range(number)]


def job_with_conflict(sandbox: Sandbox) -> None:
    """Let another writer have the phone number when the job starts, although no profile had it before."""
    add_profile(sandbox.account, email="other@example.com", phone_number=PHONE)
    hidden = iter([True])
    find = sandbox.account.find_profiles

    def find_profiles(name: str, value: str) -> list[Any]:
        return [] if name == "phone_number" and next(hidden, False) else find(name, value)

    sandbox.account.find_profiles = find_profiles  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "errors",
    [[], [{"id": "E", "attributes": {"detail": "?"}}], [{"id": "E", "attributes": {"original_payload": None}}]],
)
def test_failures_without_ids_send_all_profiles_individually(errors: list[Any], sandbox: Sandbox) -> None:
    """A profile that has possibly failed does not count as imported."""
    job_with_conflict(sandbox)
    body = orjson.dumps({"data": errors})
    sandbox.klaviyo.faults.add(Fault(match=f"GET {JOBS}/", status=200, body=body))
    assert Sender(klaviyo_for(sandbox), 4).send(batch_with_phone(20)) == [None] * 20
    assert len(written(sandbox)) == 20
    assert calls(sandbox)[SINGLE] == 1  # what the next reading shows to differ still


def test_errors_are_read_if_the_failed_count_is_unknown(sandbox: Sandbox) -> None:
    """Klaviyo can return null for failed_count."""
    job = {"type": "profile-bulk-import-job", "id": "J", "attributes": {"status": "complete", "failed_count": None}}
    error = {
        "type": "import-error",
        "id": "E",
        "attributes": {"original_payload": {"attributes": {"external_id": "c5"}}},
    }
    sandbox.klaviyo.faults.add(
        Fault(match=f"POST {JOBS}", status=202, body=orjson.dumps({"data": job})),
        Fault(match=f"GET {JOBS}/J/import-errors", status=200, body=orjson.dumps({"data": [error]})),
        Fault(match=f"GET {JOBS}", status=200, body=orjson.dumps({"data": [job]})),
    )
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
    assert written(sandbox) == {"5@example.com"}


@pytest.mark.parametrize("match", [f"POST {JOBS}", f"GET {JOBS}"])
def test_outage_fails_all_profiles_and_the_retry_succeeds(match: str, sandbox: Sandbox) -> None:
    """The outage starts before the job is posted, or while it is polled."""
    sandbox.klaviyo.faults.add(Fault(match=match, times=None))
    sender = Sender(klaviyo_for(sandbox, retry_timeout=0.1), 4, job_timeout=1.0)
    assert all(isinstance(result, Transient) for result in sender.send(upserts(20)))
    sandbox.klaviyo.faults.clear()
    assert sender.send(upserts(20)) == [None] * 20
    assert len(written(sandbox)) == 20


def test_outage_after_a_rejected_job_spares_the_accepted_half(sandbox: Sandbox) -> None:
    """The job is rejected without a pointer and halved. One half is accepted, and the other half fails in an outage."""
    sandbox.klaviyo.faults.add(
        Fault(match=f"POST {JOBS}", status=400), Fault(match=f"POST {JOBS}", contains=b'"c15"', times=None)
    )
    results = Sender(klaviyo_for(sandbox, retry_timeout=0.1), 4).send(upserts(20))
    assert [type(result) for result in results] == [type(None)] * 10 + [JobUnfinished] * 10


def job_fault(status: str) -> tuple[Fault, Fault]:
    """Return faults that accept a job, whose status never changes."""
    job = {"type": "profile-bulk-import-job", "id": "J", "attributes": {"status": status}}
    accepted, listed = orjson.dumps({"data": job}), orjson.dumps({"data": [job]})
    return (
        Fault(match=f"POST {JOBS}", status=202, body=accepted),
        Fault(match=f"GET {JOBS}", status=200, body=listed, times=None),
    )


def test_cancelled_job_is_sent_individually(sandbox: Sandbox) -> None:
    """It writes nothing more, and Klaviyo does not report what it has written."""
    sandbox.klaviyo.faults.add(*job_fault("cancelled"))
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
    assert len(written(sandbox)) == 20
    assert calls(sandbox)[SINGLE] == 20


def are_unfinished(results: Sequence[object], seconds: float) -> bool:
    return all(isinstance(result, JobUnfinished) and result.retry_after == seconds for result in results)


def test_nothing_is_written_beside_a_job_that_can_still_write(sandbox: Sandbox) -> None:
    """The job would overwrite a newer state. No worker may process the messages as long as the job can take."""
    sandbox.klaviyo.faults.add(*job_fault("processing"))
    sender = Sender(klaviyo_for(sandbox), 4, job_timeout=0.5)
    assert are_unfinished(sender.send(upserts(20)), 0.5)
    assert calls(sandbox)[SINGLE] == 0
    sandbox.klaviyo.faults.clear()
    assert sender.send(upserts(20)) == [None] * 20  # later; the next job could take as long
    assert (calls(sandbox)[f"POST {JOBS}"], calls(sandbox)[SINGLE]) == (1, 20)


def test_job_is_waited_for_while_its_status_cannot_be_read() -> None:
    """A failed poll says nothing about the job."""
    with sandbox_with_customers(1.0) as sandbox:
        sandbox.klaviyo.faults.add(Fault(match=f"GET {JOBS}", status=503, times=3))
        assert Sender(klaviyo_for(sandbox, retry_timeout=0.0), 4).send(upserts(20)) == [None] * 20
        assert calls(sandbox)[f"POST {JOBS}"] == 1


@pytest.mark.parametrize("action", ["lose_response", "reset", "respond"])
def test_start_whose_answer_is_lost_is_not_repeated(action: str, sandbox: Sandbox) -> None:
    """Klaviyo has possibly started the job. A second one would overwrite what is written in between."""
    sandbox.klaviyo.faults.add(Fault(match=f"POST {JOBS}", action=action, times=None))
    sender = Sender(klaviyo_for(sandbox, retry_timeout=5.0), 4, job_timeout=60.0)
    assert are_unfinished(sender.send(upserts(20)), 60.0)
    assert calls(sandbox) == {READ: 1, f"POST {JOBS}": 1}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(match=f"POST {JOBS}", status=429, times=None),
        *(Fault(match=f"POST {JOBS}", status=status, times=None, body=b"<title>Stop</title>") for status in (403, 413)),
        None,
    ],
)
def test_job_that_was_certainly_not_started_does_not_delay_its_messages(fault: Fault | None, sandbox: Sandbox) -> None:
    """Klaviyo throttled the request, a firewall in front of it refused the request, or it could not be reached."""
    klaviyo = klaviyo_for(sandbox, retry_timeout=0.0)
    if fault:
        sandbox.klaviyo.faults.add(replace(fault, headers={"Retry-After": "600"}))
    else:
        sandbox.klaviyo.stop()
    results = Sender(klaviyo, 4).send(upserts(20))
    assert all(isinstance(result, Transient) and not isinstance(result, JobUnfinished) for result in results)


def test_job_that_is_not_listed_is_read_by_its_id(sandbox: Sandbox) -> None:
    """An account can have more recent jobs than a page lists."""
    sandbox.klaviyo.faults.add(Fault(match=f"GET {JOBS}", status=200, body=b'{"data":[]}'))
    assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
    assert sum(each.startswith(f"GET {JOBS}/") for each in calls(sandbox).elements()) == 1


def test_job_that_klaviyo_does_not_know_can_still_write(sandbox: Sandbox) -> None:
    """Klaviyo accepted it."""
    sandbox.klaviyo.faults.add(
        Fault(match=f"GET {JOBS}/", status=404), Fault(match=f"GET {JOBS}", status=200, body=b'{"data":[]}')
    )
    assert are_unfinished(Sender(klaviyo_for(sandbox), 4).send(upserts(20)), 600.0)
    assert calls(sandbox)[SINGLE] == 0


@pytest.mark.parametrize("body", [b'{"data":{}}', b"{}", b"[]", b'{"data":[{"id":7}]}'])
def test_response_without_a_job_is_a_transient_error(body: bytes, sandbox: Sandbox) -> None:
    """A job without an id cannot be polled, and can still write."""
    sandbox.klaviyo.faults.add(Fault(match=f"POST {JOBS}", status=202, body=body))
    assert are_unfinished(Sender(klaviyo_for(sandbox), 4).send(upserts(20)), 600.0)


def test_key_without_the_scopes_of_jobs_sends_individually(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """The missing scope is logged once, and the worker is not parked."""
    sandbox.klaviyo.faults.add(Fault(match=f"POST {JOBS}", status=403, times=None))
    sender = Sender(klaviyo_for(sandbox), 4)
    for _ in range(2):
        assert sender.send(upserts(20)) == [None] * 20
    assert len(written(sandbox)) == 20
    assert [record.message for record in caplog.records] == ["endpoint_refused"]
    sandbox.klaviyo.faults.add(Fault(status=401, times=None))
    assert all(isinstance(result, KlaviyoMisconfigured) for result in sender.send(upserts(20)))


def test_key_that_may_start_but_not_read_jobs_starts_no_second_one(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """The first job can still write, so its messages wait. Later profiles are sent individually."""
    sandbox.klaviyo.faults.add(Fault(match=f"GET {JOBS}", status=403, times=None))
    sender = Sender(klaviyo_for(sandbox), 4)
    assert are_unfinished(sender.send(upserts(20)), 600.0)
    assert sender.send([upsert(each, first_name="Eve") for each in range(20)]) == [None] * 20
    assert (calls(sandbox)[f"POST {JOBS}"], calls(sandbox)[SINGLE]) == (1, 20)
    assert [record.message for record in caplog.records] == ["endpoint_refused"]


def test_lanes_share_their_polls() -> None:
    """The endpoint accepts 150 requests a minute for all jobs."""
    with sandbox_with_customers(2.0) as sandbox, ThreadPoolExecutor(4) as lanes:
        sender = Sender(klaviyo_for(sandbox), 4)
        batches = [[upsert(lane * 15 + number) for number in range(15)] for lane in range(4)]
        assert list(lanes.map(sender.send, batches)) == [[None] * 15] * 4
        assert calls(sandbox)[f"POST {JOBS}"] == 4
        asked = calls(sandbox)[f"GET {JOBS}"]
    with sandbox_with_customers(2.0) as sandbox:
        assert Sender(klaviyo_for(sandbox), 4).send(upserts(20)) == [None] * 20
        alone = calls(sandbox)[f"GET {JOBS}"]
    assert asked < 4 * alone


def send_and_stop(sandbox: Sandbox, stop_wait: float) -> list[Any]:
    """Send profiles, stop the worker when the job has started, and return the results."""
    stopping = Event()
    sender = Sender(klaviyo_for(sandbox), 4, stopping=stopping, stop_wait=stop_wait)
    with ThreadPoolExecutor(1) as lane:
        results = lane.submit(sender.send, upserts(20))
        while not calls(sandbox)[f"POST {JOBS}"]:
            time.sleep(0.01)
        stopping.set()
        return results.result(60.0)


def test_stopping_worker_waits_for_a_started_job() -> None:
    """The job would overwrite what the next worker writes."""
    with sandbox_with_customers(2.0) as sandbox:
        assert send_and_stop(sandbox, 50.0) == [None] * 20
        assert len(written(sandbox)) == 20


def test_stopping_worker_delays_the_messages_of_a_job_that_takes_too_long() -> None:
    """The grace period ends before the job."""
    with sandbox_with_customers(60.0) as sandbox:
        assert are_unfinished(send_and_stop(sandbox, 0.5), 600.0)
