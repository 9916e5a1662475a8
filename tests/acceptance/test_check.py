"""`klaviyo-worker check`: results, advice, exit codes, and the bulk probe."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.acceptance.conftest import json_lines
from worker.sandbox import Fault, Sandbox
from worker.sandbox.klaviyo.account import Account

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import CompletedProcess

    from tests.acceptance.conftest import Worker

BULK = "POST /api/event-bulk-create-jobs"
ALL_OK = {
    "configuration": "ok",
    "queue": "ok",
    "commercetools": "ok",
    "klaviyo": "ok",
    "subscriptions": "skipped",
    "bulk events": "ok",
}
PROBE = ("check", "--json", "--probe-bulk", "--probe-wait", "3")


@pytest.fixture
def account(request: pytest.FixtureRequest) -> Account:
    return Account(*getattr(request, "param", ("ignore",)))


@pytest.fixture
def sandbox(account: Account) -> Iterator[Sandbox]:
    with Sandbox(account=account) as running:
        yield running


def results(done: CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["check"]: line for line in lines}


def statuses(done: CompletedProcess[str]) -> dict[str, str]:
    return {name: result["status"] for name, result in results(done).items()}


def accepted_writes(sandbox: Sandbox) -> list[str]:
    """Return the paths of writes that Klaviyo accepted."""
    return [each.path for each in sandbox.klaviyo.requests if each.method != "GET" and each.status < 400]


def test_all_checks_succeed(worker: Worker, sandbox: Sandbox) -> None:
    """The output has one line per check, and nothing is written."""
    done = worker("check")
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["OK", "configuration"],
        ["OK", "queue"],
        ["OK", "commercetools"],
        ["OK", "klaviyo"],
        ["SKIP", "subscriptions"],
        ["OK", "bulk"],
    ]
    for scope in ("events:write", "profiles:write", "catalogs:write"):
        assert scope in done.stdout
    assert not accepted_writes(sandbox)
    assert statuses(worker("check", "--json")) == ALL_OK


def test_first_failure_determines_the_exit_code(worker: Worker) -> None:
    """All failures are reported."""
    done = worker("check", "--json", env={"QUEUE_URL": "embedded:///proc/nowhere/queue.db"})
    assert done.returncode == 3
    assert statuses(done) == ALL_OK | {"queue": "failed"}
    assert results(done)["queue"]["text"].startswith("QUEUE_URL: cannot open ")
    both = worker("check", env={"QUEUE_URL": "embedded:///proc/nowhere/queue.db", "KLAVIYO_AUTH_KEY": "pk_wrong"})
    assert both.returncode == 3
    failures = [line for line in both.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 2
    assert all(" → " in line for line in failures)


def test_wrong_settings_end_the_check(worker: Worker) -> None:
    """The exit code is 2, with a line per setting. No service is contacted."""
    done = worker("check", env={"CT_PROJECT_ID": "", "KLAVIYO_AUTH_KEY": "pk_s3cret "})
    assert done.returncode == 2
    assert done.stderr == ""
    assert "s3" not in done.stdout
    missing, malformed = done.stdout.splitlines()
    assert missing.startswith("FAIL    configuration  CT_PROJECT_ID is missing → set it (or CT_PROJECT_ID_FILE) to ")
    assert malformed.startswith("FAIL    configuration  KLAVIYO_AUTH_KEY has a blank or a line break at its ")
    done = worker("check", "--json", env={"QUEUE_URL": "kafka://topic"})
    assert done.returncode == 2
    assert results(done)["configuration"]["why"] == "QUEUE_URL is malformed"
    assert worker("check", "--probe-bulk", "--probe-wait", "0").returncode == 2


def test_refused_api_client_is_reported_once(worker: Worker) -> None:
    """The output does not contain the secret."""
    client = '{"clientId": "sandbox-client", "secret": "s3cret"}'
    done = worker("check", "--json", env={"CT_API_CLIENT": client})
    assert done.returncode == 4
    assert results(done)["commercetools"]["text"] == (
        "commercetools refuses a token (invalid_client): check CT_API_CLIENT, and that CT_AUTH_URL is in the region of "
        "the project"
    )
    assert "s3cret" not in done.stdout + done.stderr


def test_every_missing_scope_of_commercetools_is_named(worker: Worker, sandbox: Sandbox) -> None:
    """Scopes that are present are not named."""
    for path in ("payments", "inventory"):
        sandbox.commercetools.faults.add(Fault(403, times=None, match=f"GET /sandbox-shop/{path}"))
    done = worker("check", "--json")
    assert done.returncode == 4
    text = results(done)["commercetools"]["text"]
    assert text.endswith("and its scopes: view_payments, view_products")


def test_scope_for_workflow_states_is_needed_only_with_the_setting(
    worker: Worker, sandbox: Sandbox, tmp_path: Path
) -> None:
    """By default, no workflow state has an event."""
    sandbox.commercetools.faults.add(Fault(403, times=None, match="GET /sandbox-shop/states"))
    assert worker("check", "--json").returncode == 0
    mapping = tmp_path / "mapping.toml"
    mapping.write_text('[order]\ncancelled_workflow_states = ["voided"]\n')
    done = worker("check", "--json", env={"KLAVIYO_WORKER_CONFIG": str(mapping)})
    assert results(done)["commercetools"]["text"].endswith("and its scopes: view_states")


def test_every_missing_scope_of_klaviyo_is_named(worker: Worker, sandbox: Sandbox) -> None:
    """Scopes for reading and writing are named, although nothing is written."""
    for call in ("GET /api/catalog-items", "POST /api/events", "POST /api/profile-import"):
        sandbox.klaviyo.faults.add(Fault(403, times=None, match=call))
    done = worker("check", "--json")
    assert done.returncode == 5
    assert results(done)["klaviyo"]["text"].endswith("and its scopes: catalogs:read, events:write, profiles:write")


def test_discount_codes_are_optional(worker: Worker, sandbox: Sandbox) -> None:
    """Without the scope, orders are still processed, so the check reports it but does not fail."""
    sandbox.commercetools.faults.add(Fault(403, times=None, match="GET /sandbox-shop/discount-codes"))
    done = worker("check", "--json")
    assert done.returncode == 0
    assert "view_discount_codes" in results(done)["commercetools"]["text"]


@pytest.mark.parametrize(("ahead", "expected"), [(600.0, "s slow"), (-600.0, "s fast")])
def test_wrong_clock_is_a_failure(ahead: float, expected: str, worker: Worker, sandbox: Sandbox) -> None:
    """AWS, Google and TLS refuse requests of a machine with a wrong clock, with errors that name other causes."""
    sandbox.commercetools.clock_offset = sandbox.klaviyo.clock_offset = ahead
    done = worker("check")
    assert done.returncode == 2
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert re.fullmatch(
        rf"FAIL    clock          the clock of this machine is (59\d|60\d) {expected} → synchronize it", line
    )


def test_unknown_variable_is_a_warning(worker: Worker) -> None:
    """The warning names the closest setting. `run` logs it."""
    warning = "KLAVIYO_WORKER_LANE is not a setting: is KLAVIYO_WORKER_LANES meant?"
    done = worker("check", env={"KLAVIYO_WORKER_LANE": "5"})
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].endswith(f"queue embedded://, only messages of project sandbox-shop; {warning}")
    done = worker("run", "--once", env={"KLAVIYO_WORKER_LANE": "5"})
    assert [line["reason"] for line in json_lines(done.stderr) if line["event"] == "unknown_setting"] == [warning]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, "commercetools answered 401 InvalidToken for orders: check that CT_API_URL and CT_AUTH_URL are in the "),
        (
            404,
            "commercetools answered 404 ResourceNotFound for orders: check CT_PROJECT_ID, and that CT_API_URL is in ",
        ),
    ],
)
def test_project_of_another_region_is_named(status: int, expected: str, worker: Worker, sandbox: Sandbox) -> None:
    """Each region has its own tokens and projects."""
    sandbox.commercetools.faults.add(Fault(status, times=None, match="GET /sandbox-shop/"))
    done = worker("check", "--json")
    assert done.returncode == 4
    text = results(done)["commercetools"]["text"]
    assert re.sub(r"\d{3} \w* ?for", f"{status} {expected.split()[3]} for", text).startswith(expected)


@pytest.mark.parametrize(("service", "code"), [("commercetools", 4), ("klaviyo", 5)])
def test_unreachable_service_is_reported(service: str, code: int, worker: Worker, sandbox: Sandbox) -> None:
    """It is not reported as refused credentials."""
    server = getattr(sandbox, service)
    server.stop()
    done = worker(*PROBE, "--retry-timeout", "0")
    assert done.returncode == code
    assert "check the URL, the network" in results(done)[service]["text"]
    expected = {service} | ({"subscriptions"} if service == "commercetools" else set())
    assert {name for name, status in statuses(done).items() if status == "failed"} == expected


def test_refused_key_is_exit_code_5(worker: Worker, sandbox: Sandbox) -> None:
    """The probe does not start."""
    done = worker(*PROBE, env={"KLAVIYO_AUTH_KEY": "pk_wrong"})
    assert done.returncode == 5
    assert statuses(done) | {"bulk events": "ok"} == ALL_OK | {"klaviyo": "failed"}
    assert "bulk events" not in statuses(done)
    assert results(done)["klaviyo"]["text"].endswith("401 to GET /api/catalog-items: check KLAVIYO_AUTH_KEY")
    assert "pk_wrong" not in done.stdout + done.stderr
    assert not accepted_writes(sandbox)


def test_scopes_of_the_probe_are_checked_before_it_writes(worker: Worker, sandbox: Sandbox) -> None:
    """Without --probe-bulk they are not needed and not checked."""
    sandbox.klaviyo.faults.add(Fault(403, times=None, match="GET /api/events"))
    done = worker(*PROBE)
    assert done.returncode == 5
    assert results(done)["klaviyo"]["text"].endswith("and its scopes: events:read")
    assert not accepted_writes(sandbox)
    assert worker("check").returncode == 0


def test_scopes_for_import_jobs_are_optional(worker: Worker, sandbox: Sandbox) -> None:
    """Without these permissions, customers are sent individually, which the check reports."""
    sandbox.klaviyo.faults.add(Fault(403, times=None, match="GET /api/profile-bulk-import-jobs"))
    done = worker("check", "--json")
    assert done.returncode == 0
    text = results(done)["klaviyo"]["text"]
    assert text.endswith("without profiles:read, lists:read, lists:write, profiles are always sent individually")


def test_orders_need_the_scope_to_write_the_profiles_of_guests(worker: Worker, sandbox: Sandbox) -> None:
    """Without it, the messages of guests' orders would wait."""
    sandbox.klaviyo.faults.add(Fault(403, times=None, match="POST /api/profile-import"))
    no_customers = 'disabled_types = ["CustomerCreated", "ResourceCreated", "ResourceUpdated", "ResourceDeleted"]\n'
    for buyer, code in (("guests", 5), ("none", 0)):
        (worker.directory / "mapping.toml").write_text(f'{no_customers}[order]\nbuyer = "{buyer}"\n')
        assert worker("check", "--config", "mapping.toml").returncode == code


def test_erasure_needs_more_scopes(worker: Worker) -> None:
    """The setting requests the deletion of profiles."""
    (worker.directory / "mapping.toml").write_text("[customer]\nerasure = true\n")
    done = worker("check", "--json", "--config", "mapping.toml")
    assert "data-privacy:write" in results(done)["klaviyo"]["text"]


def test_consent_needs_more_scopes(worker: Worker, sandbox: Sandbox) -> None:
    """Without them, the messages of customers would wait."""
    (worker.directory / "mapping.toml").write_text('[consent]\nsms = "texts"\n')
    done = worker("check", "--json", "--config", "mapping.toml")
    assert done.returncode == 0
    assert "lists:write, subscriptions:write" in results(done)["klaviyo"]["text"]
    sandbox.klaviyo.faults.add(Fault(403, times=None, match="POST /api/profile-subscription-bulk-create-jobs"))
    done = worker("check", "--json", "--config", "mapping.toml")
    assert done.returncode == 5
    assert "subscriptions:write" in results(done)["klaviyo"]["text"]


@pytest.mark.parametrize(
    ("account", "repeats"),
    [
        (("ignore", 0.3), "ignored"),
        (("refuse", 0.3), "refused"),
        (("drop", 0.3), "dropped"),
        (("duplicate", 0.3), "recorded twice"),
    ],
    indirect=["account"],
)
def test_probe_stores_the_treatment_of_repeats_in_the_account(repeats: str, worker: Worker, account: Account) -> None:
    """Events become readable after some time. A second probe ignores the events of the first."""
    sentence = "events are sent in bulk: " if repeats == "ignored" else "events are sent individually: "
    assert results(worker("check", "--json"))["bulk events"]["text"].endswith("run klaviyo-worker check --probe-bulk")
    for _ in range(2):
        done = worker(*PROBE)
        assert done.returncode == 0, done.stdout
        found = results(done)["bulk events"]
        assert found["repeats"] == repeats
        assert found["repeats_in_one_call"] == ("undecided" if repeats == "refused" else "refused")
    properties = account.profiles[0]["attributes"]["properties"]
    assert properties["klaviyo_worker_bulk_repeats"] == repeats
    text = results(worker("check", "--json"))["bulk events"]["text"]
    assert text.startswith(sentence)
    assert properties["klaviyo_worker_bulk_probed_at"] in text


def test_probe_writes_only_documented_data(worker: Worker, account: Account) -> None:
    """`--help` documents one profile without an address and eight events of one metric, of which two are rejected."""
    assert worker(*PROBE).returncode == 0
    (profile,) = account.profiles
    assert profile["attributes"].keys() - {"created"} == {"external_id", "first_name", "last_name", "properties"}
    assert profile["attributes"]["properties"].keys() == {
        "About",
        "klaviyo_worker_bulk_repeats",
        "klaviyo_worker_bulk_probed_at",
    }
    assert [each["metric"] for each in account.events] == ["klaviyo-worker probe"] * 6
    text = " ".join(worker("check", "--help").stdout.split())
    for name in ("klaviyo-worker-probe", "klaviyo-worker probe", "events:read", "Delete profile"):
        assert name in text


@pytest.mark.parametrize("account", [("ignore", 3600.0)], indirect=True)
def test_unreadable_events_are_no_result(worker: Worker, account: Account) -> None:
    """The exit code is 1, and the account gets no verdict."""
    done = worker("check", "--json", "--probe-bulk", "--probe-wait", "1")
    assert done.returncode == 1
    found = results(done)["bulk events"]
    assert (found["status"], found["repeats"]) == ("failed", "undecided")
    assert account.profiles[0]["attributes"]["properties"].keys() == {"About"}


@pytest.mark.parametrize("mode", ["always", "never"])
def test_setting_that_overrules_the_verdict_is_reported(mode: str, worker: Worker) -> None:
    """The account is not asked."""
    done = worker("check", "--json", env={"KLAVIYO_WORKER_BULK_EVENTS": mode})
    assert results(done)["bulk events"]["text"].endswith(f": KLAVIYO_WORKER_BULK_EVENTS is {mode}")


def test_scope_to_read_profiles_is_optional(worker: Worker, sandbox: Sandbox) -> None:
    """Without it, events are sent individually, and profiles are not compared."""
    sandbox.klaviyo.faults.add(Fault(403, times=None, match="GET /api/profiles"))
    done = worker("check", "--json")
    assert done.returncode == 0
    assert "without profiles:read, phone numbers and names of guests are left out" in results(done)["klaviyo"]["text"]
    found = results(done)["bulk events"]
    assert found["status"] == "skipped"
    assert found["text"].endswith("with the scope profiles:read")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            Fault(403, times=None, match=BULK),
            "and its scopes: profiles:read, events:read, events:write, profiles:write",
        ),
        (Fault(400, times=None, match=BULK), "no result: probe again"),
        (Fault(match=BULK, action="lose_response"), "no result: probe again"),
        (Fault(503, times=None, match=BULK), "no result: probe again"),
    ],
    ids=["scope", "refused", "unknown fate", "down"],
)
def test_failed_probe_has_no_result(fault: Fault, text: str, worker: Worker, sandbox: Sandbox) -> None:
    """A rejection for another reason is not a rejected repeat."""
    sandbox.klaviyo.faults.add(fault)
    done = worker(*PROBE)
    assert done.returncode == 5
    found = results(done)["bulk events"]
    assert text in found["text"]
    assert "repeat" not in found
