"""`klaviyo-worker check`: what is well, what is not, and what to do; and what the account makes of repeats."""

from __future__ import annotations

import json
from socket import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account

if TYPE_CHECKING:
    from collections.abc import Iterator
    from subprocess import CompletedProcess

    from tests.acceptance.conftest import Worker

BULK = "POST /api/event-bulk-create-jobs"
WELL = {"configuration": "ok", "queue": "ok", "commercetools": "ok", "klaviyo": "ok", "subscriptions": "skipped"}
PROBE = ("check", "--json", "--probe-bulk", "--probe-wait", "3")


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    return Account(*getattr(request, "param", ("ignore",)))


@pytest.fixture
def sandbox(account: Account) -> Iterator[Sandbox]:
    with Sandbox(account=account) as running:
        yield running


def findings(done: CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["check"]: line for line in lines}


def statuses(done: CompletedProcess[str]) -> dict[str, str]:
    return {name: finding["status"] for name, finding in findings(done).items()}


def written(sandbox: Sandbox) -> list[str]:
    """Return what Klaviyo took: an empty document it refuses."""
    return [each.path for each in sandbox.klaviyo.requests if each.method != "GET" and each.status < 400]


def test_all_is_well(worker: Worker, sandbox: Sandbox) -> None:
    """One line each; nothing is written."""
    done = worker("check")
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["OK", "configuration"],
        ["OK", "queue"],
        ["OK", "commercetools"],
        ["OK", "klaviyo"],
        ["SKIP", "subscriptions"],
    ]
    for scope in ("events:write", "profiles:write", "catalogs:write"):
        assert scope in done.stdout
    assert not written(sandbox)
    assert statuses(worker("check", "--json")) == WELL


def test_the_first_that_failed_gives_the_exit_code_and_all_are_told(worker: Worker) -> None:
    """A queue that cannot be opened is 3, whatever comes after it."""
    done = worker("check", "--json", env={"QUEUE_URL": "embedded:///proc/nowhere/queue.db"})
    assert done.returncode == 3
    assert statuses(done) == WELL | {"queue": "failed"}
    assert findings(done)["queue"]["text"].startswith("QUEUE_URL: cannot open ")
    both = worker("check", env={"QUEUE_URL": "embedded:///proc/nowhere/queue.db", "KLAVIYO_AUTH_KEY": "pk_wrong"})
    assert both.returncode == 3
    failures = [line for line in both.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 2
    assert all(" → " in line for line in failures)


def test_settings_come_first(worker: Worker) -> None:
    """What is wrong is exit code 2, as for every command, and a line each; nothing else is asked then."""
    done = worker("check", env={"CT_PROJECT_ID": "", "KLAVIYO_AUTH_KEY": "pk_s3 cret"})
    assert done.returncode == 2
    assert done.stderr == ""
    assert "s3" not in done.stdout
    missing, malformed = done.stdout.splitlines()
    assert missing.startswith("FAIL    configuration  CT_PROJECT_ID is missing → set it (or CT_PROJECT_ID_FILE) to ")
    assert malformed.startswith("FAIL    configuration  KLAVIYO_AUTH_KEY is malformed → expected ")
    done = worker("check", "--json", env={"QUEUE_URL": "kafka://topic"})
    assert done.returncode == 2
    assert findings(done)["configuration"]["why"] == "QUEUE_URL is malformed"
    assert worker("check", "--probe-bulk", "--probe-wait", "0").returncode == 2


def test_commercetools_refuses_the_client(worker: Worker) -> None:
    """Once, not once per resource; the secret is not repeated."""
    client = '{"clientId": "sandbox-client", "secret": "s3cret"}'
    done = worker("check", "--json", env={"CT_API_CLIENT": client})
    assert done.returncode == 4
    assert findings(done)["commercetools"]["text"] == (
        "commercetools refuses a token (invalid_client): check CT_API_CLIENT, CT_SCOPE and CT_AUTH_URL"
    )
    assert "s3cret" not in done.stdout + done.stderr


def test_every_missing_scope_of_commercetools_is_named(worker: Worker, sandbox: Sandbox) -> None:
    """And none that is there."""
    for path in ("payments", "inventory"):
        sandbox.commercetools.faults.add(Fault(403, times=None, match=f"GET /sandbox-shop/{path}"))
    done = worker("check", "--json")
    assert done.returncode == 4
    text = findings(done)["commercetools"]["text"]
    assert text.endswith("and its scopes: view_payments, view_products")


def test_every_missing_scope_of_klaviyo_is_named(worker: Worker, sandbox: Sandbox) -> None:
    """To read and to write, though nothing is written."""
    for call in ("GET /api/catalog-items", "POST /api/events", "POST /api/profile-import"):
        sandbox.klaviyo.faults.add(Fault(403, times=None, match=call))
    done = worker("check", "--json")
    assert done.returncode == 5
    assert findings(done)["klaviyo"]["text"].endswith("and its scopes: catalogs:read, events:write, profiles:write")


def test_discount_codes_are_optional(worker: Worker, sandbox: Sandbox) -> None:
    """Orders go through without that scope, so it fails nothing; but it is told."""
    sandbox.commercetools.faults.add(Fault(403, times=None, match="GET /sandbox-shop/discount-codes"))
    done = worker("check", "--json")
    assert done.returncode == 0
    assert "view_discount_codes" in findings(done)["commercetools"]["text"]


@pytest.mark.parametrize(("service", "code"), [("commercetools", 4), ("klaviyo", 5)])
def test_a_service_out_of_reach_is_told(service: str, code: int, worker: Worker, sandbox: Sandbox) -> None:
    """As what it is: not as refused credentials."""
    server = getattr(sandbox, service)
    server.stop()
    with socket() as held:  # or the port goes to the next test that asks for one
        held.bind(("127.0.0.1", urlsplit(server.url).port))
        done = worker(*PROBE, "--retry-timeout", "0")
    assert done.returncode == code
    assert "check the URL, the network" in findings(done)[service]["text"]
    expected = {service} | ({"subscriptions"} if service == "commercetools" else set())
    assert {name for name, status in statuses(done).items() if status == "failed"} == expected


def test_a_refused_key_is_exit_code_5(worker: Worker, sandbox: Sandbox) -> None:
    """And the probe is not even begun."""
    done = worker(*PROBE, env={"KLAVIYO_AUTH_KEY": "pk_wrong"})
    assert done.returncode == 5
    assert statuses(done) == WELL | {"klaviyo": "failed"}
    assert findings(done)["klaviyo"]["text"].endswith("401 to GET /api/catalog-items: check KLAVIYO_AUTH_KEY")
    assert "pk_wrong" not in done.stdout + done.stderr
    assert not written(sandbox)


def test_what_the_probe_must_read_is_checked_before_it_writes(worker: Worker, sandbox: Sandbox) -> None:
    """Without --probe-bulk the worker does not need it, so it is not asked for."""
    sandbox.klaviyo.faults.add(Fault(403, times=None, match="GET /api/events"))
    done = worker(*PROBE)
    assert done.returncode == 5
    assert findings(done)["klaviyo"]["text"].endswith("and its scopes: events:read")
    assert not written(sandbox)
    assert worker("check").returncode == 0


def test_what_import_jobs_need_is_no_must(worker: Worker, sandbox: Sandbox) -> None:
    """A key without the scopes sends customers one by one; its owner is told."""
    sandbox.klaviyo.faults.add(Fault(403, times=None, match="GET /api/profile-bulk-import-jobs"))
    done = worker("check", "--json")
    assert done.returncode == 0
    text = findings(done)["klaviyo"]["text"]
    assert text.endswith("without profiles:read, lists:read, lists:write, customers are always sent one by one")


def test_erasure_needs_more(worker: Worker) -> None:
    """customer.erasure requests the deletion of profiles."""
    (worker.directory / "mapping.toml").write_text("[customer]\nerasure = true\n")
    done = worker("check", "--json", "--config", "mapping.toml")
    assert "data-privacy:write" in findings(done)["klaviyo"]["text"]


@pytest.mark.parametrize(
    ("account", "repeat", "recommended"),
    [
        (("ignore", 0.3), "ignore", "always"),
        (("refuse", 0.3), "refuse", "auto"),
        (("drop", 0.3), "drop", "auto"),
        (("duplicate", 0.3), "duplicate", "auto"),
    ],
    indirect=["account"],
)
def test_the_probe_tells_what_becomes_of_repeats(
    repeat: str, recommended: str, worker: Worker, account: Account
) -> None:
    """Bulk calls show after a while; a second probe is not confused by the events of the first."""
    for _ in range(2):
        done = worker(*PROBE)
        assert done.returncode == 0, done.stdout
        found = findings(done)["bulk events"]
        assert (found["repeat"], found["recommended"]) == (repeat, recommended)
        assert f"KLAVIYO_WORKER_BULK_EVENTS={recommended}" in found["text"]


def test_the_probe_writes_what_it_says(worker: Worker, account: Account) -> None:
    """--help tells of one profile without an address, and three events of one metric."""
    assert worker(*PROBE).returncode == 0
    (profile,) = account.profiles
    assert profile["attributes"].keys() == {"external_id", "first_name", "last_name", "properties"}
    assert [each["metric"] for each in account.events] == ["klaviyo-worker probe"] * 3
    text = " ".join(worker("check", "--help").stdout.split())
    for name in ("klaviyo-worker-probe", "klaviyo-worker probe", "events:read", "Delete profile"):
        assert name in text


@pytest.mark.parametrize("account", [("ignore", 3600.0)], indirect=True)
def test_events_that_never_show_decide_nothing(worker: Worker) -> None:
    """Exit code 1, and the recommendation that is always safe."""
    done = worker("check", "--json", "--probe-bulk", "--probe-wait", "1")
    assert done.returncode == 1
    found = findings(done)["bulk events"]
    assert (found["status"], found["repeat"], found["recommended"]) == ("failed", "undecided", "auto")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault(403, times=None, match=BULK), "and its scopes: events:write"),
        (Fault(400, times=None, match=BULK), "no result: keep KLAVIYO_WORKER_BULK_EVENTS=auto and probe again"),
        (Fault(match=BULK, action="lose_response"), "no result: keep KLAVIYO_WORKER_BULK_EVENTS=auto and probe again"),
        (Fault(503, times=None, match=BULK), "no result: keep KLAVIYO_WORKER_BULK_EVENTS=auto and probe again"),
    ],
    ids=["scope", "refused", "unknown fate", "down"],
)
def test_a_probe_that_fails_claims_nothing(fault: Fault, text: str, worker: Worker, sandbox: Sandbox) -> None:
    """Least of all that a call was refused for a repeat it did not hold."""
    sandbox.klaviyo.faults.add(fault)
    done = worker(*PROBE)
    assert done.returncode == 5
    found = findings(done)["bulk events"]
    assert text in found["text"]
    assert "repeat" not in found
