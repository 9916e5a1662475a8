"""Bulk jobs: validated as a whole, processed entry by entry, polled by the client."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.unit.sandbox.conftest import Caller
from tests.unit.sandbox.test_klaviyo_rules import ITEM, VARIANT, of_item, pointer
from worker.sandbox import Sandbox
from worker.sandbox.klaviyo import jobs
from worker.sandbox.klaviyo.account import PREFIX, Account

PROFILES = "/api/profile-bulk-import-jobs"
PLURAL = {"item": "items", "variant": "variants", "category": "categories"}


def imports(*attributes: dict[str, Any]) -> dict[str, Any]:
    profiles = [{"type": "profile", "attributes": each} for each in attributes]
    return {"data": {"type": "profile-bulk-import-job", "attributes": {"profiles": {"data": profiles}}}}


def catalog(kind: str, verb: str, *entries: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return path and body of a catalog job."""
    data = [{"type": f"catalog-{kind}", **entry} for entry in entries]
    job = f"catalog-{kind}-bulk-{verb}-job"
    return f"/api/{job}s", {"data": {"type": job, "attributes": {PLURAL[kind]: {"data": data}}}}


def outcome(call: Caller, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Start a job, and return its attributes after it is complete."""
    status, accepted = call("POST", path, body)
    assert status == 202, accepted
    attributes = call("GET", f"{path}/{accepted['data']['id']}")[1]["data"]["attributes"]
    assert attributes["status"] == "complete"
    assert isinstance(attributes, dict)
    return attributes


def test_import_reports_conflicting_profiles(call: Caller, sandbox: Sandbox) -> None:
    """A conflict affects one profile, and its error contains the original payload."""
    call("POST", PROFILES, imports({"email": "ada@example.com"}, {"external_id": "x", "title": "Dr"}))
    both = {"email": "ada@example.com", "external_id": "x"}
    accepted = call("POST", PROFILES, imports(both, {"external_id": "x", "title": "Prof"}))[1]["data"]
    job = call("GET", f"{PROFILES}/{accepted['id']}")[1]["data"]["attributes"]
    assert (job["total_count"], job["completed_count"], job["failed_count"]) == (2, 1, 1)
    assert {"created_at", "started_at", "completed_at", "expires_at"} <= job.keys()
    (error,) = call("GET", f"{PROFILES}/{accepted['id']}/import-errors")[1]["data"]
    assert error["type"] == "import-error"
    assert error["attributes"]["code"] == "duplicate_profile"
    assert error["attributes"]["original_payload"]["attributes"] == both
    assert [profile["attributes"].get("title") for profile in sandbox.account.profiles] == [None, "Prof"]
    assert len(call("GET", PROFILES)[1]["data"]) == 2


@pytest.mark.parametrize(
    "bad", [{"email": "nonsense"}, {"first_name": "Ada"}, {"email": "a@b.co", "properties": {"x": "y" * 100_000}}]
)
def test_one_invalid_profile_rejects_the_import(bad: dict[str, Any], call: Caller, sandbox: Sandbox) -> None:
    """The pointer names the profile, and none is imported."""
    status, document = call("POST", PROFILES, imports({"email": "ada@example.com"}, bad))
    assert status == 400
    assert pointer(document).startswith("/data/attributes/profiles/data/1")
    assert sandbox.account.profiles == []


def test_import_has_1_to_10000_profiles(call: Caller) -> None:
    """Other numbers are rejected."""
    assert call("POST", PROFILES, imports(*({"external_id": str(n)} for n in range(10_001))))[0] == 400
    assert call("POST", PROFILES, imports())[0] == 400
    assert call("POST", PROFILES, imports(*({"external_id": str(n)} for n in range(10_000))))[0] == 202


def test_job_takes_the_configured_time() -> None:
    """It is queued, processing, then complete, and has its effect only at the end."""
    with Sandbox(account=Account(job_seconds=0.2)) as sandbox:
        call = Caller(sandbox)
        accepted = call("POST", PROFILES, imports({"email": "ada@example.com"}))[1]["data"]
        seen = [accepted["attributes"]["status"]]
        until = time.monotonic() + 5
        while seen[-1] != "complete" and time.monotonic() < until:
            time.sleep(0.01)
            status = call("GET", f"{PROFILES}/{accepted['id']}")[1]["data"]["attributes"]["status"]
            if status != seen[-1]:
                assert len(sandbox.account.profiles) == (status == "complete")
                seen.append(status)
        assert seen == ["queued", "processing", "complete"]
        query = f"{PROFILES}?filter=equals(status,%22complete%22)"
        assert [job["id"] for job in call("GET", query)[1]["data"]] == [accepted["id"]]


def test_catalog_jobs_create_update_and_delete(call: Caller, sandbox: Sandbox) -> None:
    """The nine jobs cover categories, items and variants."""
    category = {"attributes": {"external_id": "c", "name": "C"}}
    categories = {"relationships": {"categories": {"data": [{"type": "catalog-category", "id": PREFIX + "c"}]}}}
    created = [
        catalog("category", "create", category),
        catalog("item", "create", {"attributes": ITEM, **categories}),
        catalog("variant", "create", {"attributes": VARIANT, **of_item("p")}),
    ]
    updated = [
        catalog("category", "update", {"id": PREFIX + "c", "attributes": {"name": "New"}}),
        catalog("item", "update", {"id": PREFIX + "p", "attributes": {"title": "New"}}),
        catalog("variant", "update", {"id": PREFIX + "s", "attributes": {"price": 7}}),
    ]
    for path, body in created + updated:
        assert outcome(call, path, body)["completed_count"] == 1
    account = sandbox.account
    assert account.categories["c"]["attributes"]["name"] == "New"
    assert (account.items["p"]["attributes"]["title"], account.items["p"]["categories"]) == ("New", [PREFIX + "c"])
    assert (account.variants["s"]["attributes"]["price"], account.variants["s"]["item"]) == (7, PREFIX + "p")
    for kind, name in (("variant", "s"), ("item", "p"), ("category", "c")):
        assert outcome(call, *catalog(kind, "delete", {"id": PREFIX + name}))["failed_count"] == 0
    assert [account.items, account.variants, account.categories] == [{}, {}, {}]


def test_existing_or_missing_entries_fail_alone(call: Caller, sandbox: Sandbox) -> None:
    """The errors have Klaviyo's real form: no id, no code, no title."""
    outcome(call, *catalog("item", "create", {"attributes": ITEM}))
    again = outcome(call, *catalog("item", "create", {"attributes": ITEM}, {"attributes": ITEM | {"external_id": "q"}}))
    assert (again["completed_count"], again["failed_count"]) == (1, 1)
    (error,) = again["errors"]
    assert error["detail"] == "An item with the external id `p` already exists."
    assert (error["meta"], error.keys()) == ({"external_id": "p"}, {"detail", "meta", "source"})
    assert sandbox.account.items.keys() == {"p", "q"}
    (missing,) = outcome(call, *catalog("variant", "delete", {"id": PREFIX + "none"}))["errors"]
    assert missing["meta"] == {"external_id": "none"}
    orphan = outcome(call, *catalog("variant", "create", {"attributes": VARIANT, **of_item("none")}))
    assert orphan["failed_count"] == 1


@pytest.mark.parametrize(
    ("kind", "verb", "bad"),
    [
        ("item", "create", {"attributes": {"external_id": "q"}}),
        ("item", "update", {"attributes": {"title": "New"}}),
        ("variant", "update", {"id": PREFIX + "s", "attributes": {"external_id": "s"}}),
        ("category", "update", {"id": PREFIX + "c", "attributes": {"name": 5}}),
        ("category", "delete", {}),
        ("category", "delete", {"id": PREFIX + "c", "type": "catalog-item"}),
    ],
)
def test_one_invalid_entry_rejects_the_job(kind: str, verb: str, bad: dict[str, Any], call: Caller) -> None:
    """The pointer names the entry."""
    good = {"id": PREFIX + "x", "attributes": {"create": ITEM, "update": {}, "delete": {}}[verb]}
    path, body = catalog(kind, verb, good, bad)
    status, document = call("POST", path, body)
    assert status == 400
    assert pointer(document).startswith(f"/data/attributes/{PLURAL[kind]}/data/1")
    assert call("GET", path)[1]["data"] == []


def test_catalog_job_has_at_most_100_entries(call: Caller) -> None:
    """The body has at most 5 MB."""
    entries = [{"id": f"{PREFIX}{number}"} for number in range(101)]
    assert call("POST", *catalog("item", "delete", *entries))[0] == 400
    assert call("POST", *catalog("item", "delete", *entries[:100]))[0] == 202
    assert call("POST", "/api/catalog-item-bulk-delete-jobs", b'"' + b"x" * 5_000_000 + b'"')[0] == 413


def test_at_most_500_catalog_jobs_are_in_progress() -> None:
    """The next one is throttled."""
    with Sandbox(account=Account(job_seconds=60)) as sandbox:
        call = Caller(sandbox)
        statuses = [call("POST", *catalog("item", "delete", {"id": f"{PREFIX}x"}))[0] for _ in range(501)]
        assert (set(statuses[:500]), statuses[500]) == ({202}, 429)
        assert call("POST", PROFILES, imports({"email": "ada@example.com"}))[0] == 202
        listed = call("GET", "/api/catalog-item-bulk-delete-jobs")[1]
        assert (len(listed["data"]), bool(listed["links"]["next"])) == (100, True)


def test_completed_jobs_do_not_count(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only jobs in progress count towards the maximum."""
    monkeypatch.setattr(jobs, "MAX_JOBS", 1)
    path, body = catalog("item", "delete", {"id": f"{PREFIX}x"})
    assert [call("POST", path, body)[0] for _ in range(3)] == [202] * 3


@pytest.mark.parametrize(
    "path",
    [
        f"{PROFILES}/none",
        f"{PROFILES}/none/import-errors",
        "/api/catalog-item-bulk-create-jobs/none",
        "/api/catalog-coupon-bulk-create-jobs",
        "/api/catalog-item-bulk-create-jobs/none/import-errors",
    ],
)
def test_unknown_job_is_not_found(path: str, call: Caller) -> None:
    """An unknown kind of job is not found either."""
    assert call("GET", path)[0] == 404


def test_job_is_found_only_under_its_own_kind(call: Caller) -> None:
    """The path of another kind of job returns 404."""
    job = call("POST", PROFILES, imports({"email": "ada@example.com"}))[1]["data"]["id"]
    assert call("GET", f"/api/catalog-item-bulk-create-jobs/{job}")[0] == 404


def listed(call: Caller, path: str, query: str = "") -> list[str]:
    """Return the ids of a list of jobs, read page by page."""
    seen: list[str] = []
    target = f"{path}?{query}"
    while target:
        status, page = call("GET", target)
        assert status == 200, page
        seen += [job["id"] for job in page["data"]]
        _, api, rest = (page["links"]["next"] or "").partition("/api/")
        target = api + rest
    return seen


def test_imports_are_listed_in_pages_by_age(call: Caller) -> None:
    """The default order is oldest first."""
    made = [call("POST", PROFILES, imports({"external_id": str(n)}))[1]["data"]["id"] for n in range(5)]
    assert listed(call, PROFILES) == listed(call, PROFILES, "sort=created_at&page[size]=2") == made
    assert listed(call, PROFILES, "sort=-created_at&page[size]=2") == made[::-1]
    assert len(call("GET", f"{PROFILES}?page[size]=2")[1]["data"]) == 2


@pytest.mark.parametrize("quote", ['"', "'"])
def test_imports_are_listed_by_status(quote: str) -> None:
    """The filter has one or several statuses, in single or double quotes."""
    with Sandbox(account=Account(job_seconds=60)) as sandbox:
        call = Caller(sandbox)
        job = call("POST", PROFILES, imports({"external_id": "x"}))[1]["data"]["id"]
        complete, queued = f"{quote}complete{quote}", f"{quote}queued{quote}"
        assert listed(call, PROFILES, f"filter=any(status,[{complete},{queued}])") == [job]
        assert listed(call, PROFILES, f"filter=equals(status,{queued})") == [job]
        assert listed(call, PROFILES, f"filter=equals(status,{complete})") == []
        path, body = catalog("item", "delete", {"id": f"{PREFIX}x"})
        assert listed(call, path, f"filter=equals(status,{queued})") == []
        accepted = call("POST", path, body)[1]["data"]["id"]
        assert listed(call, path, f"filter=equals(status,{queued})") == [accepted]


@pytest.mark.parametrize(
    ("path", "query"),
    [
        (PROFILES, "sort=status"),
        (PROFILES, "page[size]=101"),
        (PROFILES, "filter=equals(id,'x')"),
        (PROFILES, "filter=equals(status,['complete'])"),
        (PROFILES, "colour=red"),
        ("/api/catalog-item-bulk-create-jobs", "sort=created_at"),
        ("/api/catalog-item-bulk-create-jobs", "page[size]=10"),
        ("/api/catalog-item-bulk-create-jobs", "filter=any(status,['complete'])"),
    ],
)
def test_list_accepts_only_documented_parameters(path: str, query: str, call: Caller) -> None:
    """Lists of catalog jobs have a fixed page size and no order."""
    assert call("GET", f"{path}?{query}")[0] == 400
    assert call("GET", f"{path}?fields[{path.rpartition('/')[2][:-1]}]=status")[0] == 200
