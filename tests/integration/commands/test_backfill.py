"""The backfill command over real sockets, against the sandbox."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from tests.support.verdicts import give_verdict
from worker.cli import main
from worker.commercetools.page_sizes import MAX_PAGE_SIZE
from worker.sandbox import Fault, Sandbox
from worker.sandbox.commercetools.shop import Shop, uid
from worker.sandbox.notifications import message

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

ANONYMOUS = uid("order:anonymous")
BULK = {"KLAVIYO_WORKER_LANES": "1", "KLAVIYO_WORKER_BULK_THRESHOLD": "0"}  # for any number of records


@pytest.fixture(autouse=True)
def keep_pytest_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("backfill", "run"):  # the commands shadow the modules of these names
        monkeypatch.setattr(import_module(f"worker.cli.{name}"), "on_signals", lambda _: None)


def backfill(sandbox: Sandbox, *arguments: str, **variables: str) -> Result:
    """Run the command at full rate; the sandbox has no rate limits."""
    environment = {"KLAVIYO_WORKER_RATE_LIMIT_SHARE": "1", **sandbox.environment, **variables}
    return CliRunner().invoke(main, ["backfill", *arguments], env=environment)


def events(sandbox: Sandbox) -> Counter[tuple[str, str]]:
    return Counter((event["metric"], event["unique_id"]) for event in sandbox.account.events)


def placed(order: dict[str, Any]) -> Counter[tuple[str, str]]:
    """Return the events of a new order."""
    lines = [*order["lineItems"], *order["customLineItems"]]
    return Counter([("Placed Order", order["id"]), *(("Ordered Product", line["id"]) for line in lines)])


def test_orders_become_the_events_that_the_worker_sends(sandbox: Sandbox, tmp_path: Path) -> None:
    """They have the same ids and past times, and are marked so that no flow starts."""
    orders = sandbox.shop.orders
    done, cancelled, shipped = uid("order:guest"), uid("order:yen"), uid("order:wrapped")
    orders[done] |= {"orderState": "Complete", "shipmentState": "Shipped"}
    orders[cancelled] |= {"orderState": "Cancelled", "lastModifiedAt": "2026-11-23T10:00:00.000Z"}
    orders[shipped] |= {"shipmentState": "Shipped"}
    result = backfill(sandbox, "orders", "--checkpoint", str(tmp_path / "orders.json"))
    expected = sum((placed(order) for order in orders.values() if order["id"] != ANONYMOUS), Counter[tuple[str, str]]())
    expected += Counter({("Fulfilled Order", done): 1, ("Fulfilled Order", shipped): 1})
    expected[("Cancelled Order", cancelled)] = 1
    refunds = uid("order:three"), uid("transaction:refund-2"), uid("order:paid-twice")  # one is pending
    expected += Counter(("Refunded Order", name) for name in refunds)
    assert events(sandbox) == expected
    assert all(event["backfill"] is True for event in sandbox.account.events)
    times = {event["metric"]: event["time"][:10] for event in sandbox.account.events if event["unique_id"] != done}
    assert times["Placed Order"] == "2026-11-20"
    assert times["Cancelled Order"] == "2026-11-23"
    assert times["Refunded Order"] == "2026-11-22"
    assert result.exit_code == 1  # the order without a customer
    assert "orders: 11 done: 10 sent, 0 ignored, 1 failed" in result.stderr
    assert f"--ids {tmp_path}/orders.failures.jsonl" in result.stderr
    (failure,) = map(json.loads, (tmp_path / "orders.failures.jsonl").read_text().splitlines())
    assert failure["resource_id"] == ANONYMOUS
    assert failure["reason"] in result.stderr


def test_orders_change_no_profile(sandbox: Sandbox) -> None:
    """Orders are read in no order of time. An old one must not show a former address or name."""
    shop, account = sandbox.shop, sandbox.account
    customer = {"id": "ada", "version": 9, "email": "ada.now@mail.example", "firstName": "Ada", "addresses": []}
    address = {"firstName": "Bob", "lastName": "Former", "city": "Hamburg", "country": "DE", "phone": "+49 40 428280"}
    old = {"version": 4, "createdAt": "2024-05-01T10:00:00.000Z", "billingAddress": address, "locale": "de-DE"}
    orders = [
        old | {"id": "of-ada", "customerId": "ada", "customerEmail": "ada.then@mail.example"},
        old | {"id": "of-a-guest", "customerEmail": "guest@mail.example"},
    ]
    shop.replace({"customers": [customer], "orders": orders})
    assert backfill(sandbox, "customers").exit_code == 0
    before = json.dumps([profile["attributes"] for profile in account.profiles])
    assert backfill(sandbox, "orders").exit_code == 0
    ada, guest = (profile["attributes"] for profile in account.profiles)
    assert json.dumps([ada]) == before
    written = {name: guest.get(name) for name in ("email", "first_name", "last_name", "location", "locale")}
    assert {name: value for name, value in written.items() if value} == {"email": "guest@mail.example"}


def test_inventory_corrects_the_stock_of_existing_variants(sandbox: Sandbox) -> None:
    """A product leaves the stock of existing variants as it is, so lost messages about stock need it."""
    assert backfill(sandbox, "products").exit_code == 0
    stock = sandbox.account.variants
    for variant in stock.values():
        variant["attributes"] |= {"inventory_quantity": 1, "inventory_policy": 0}
    assert backfill(sandbox, "products").exit_code == 0
    assert stock["MUG"]["attributes"]["inventory_quantity"] == 1
    result = backfill(sandbox, "inventory")
    assert result.exit_code == 0, result.stderr
    shown = {sku: variant["attributes"]["inventory_quantity"] for sku, variant in stock.items()}
    assert shown == {"JEANS-30": 12, "JEANS-32": 0, "SHIRT-M": 40, "CAP & CO/1": 7, "MUG": 8, "SOCKS": 1, "GIFT": 1}


def test_only_the_stores_of_the_mapping_are_sent(sandbox: Sandbox, tmp_path: Path) -> None:
    """A Klaviyo account of one region gets the history of its region."""
    customers = [{"id": key, "email": f"{key}@mail.example", "stores": [{"key": key}]} for key in ("de", "fr")]
    orders = [{"id": f"o-{key}", "customerEmail": "a@mail.example", "store": {"key": key}} for key in ("de", "fr")]
    sandbox.shop.replace({"customers": customers, "orders": orders})
    (tmp_path / "mapping.toml").write_text('stores = ["de"]')
    for kind in ("customers", "orders"):
        done = backfill(sandbox, kind, "--config", str(tmp_path / "mapping.toml"))
        assert (done.exit_code, "1 sent, 1 ignored" in done.stderr) == (0, True)
    assert [event["unique_id"] for event in sandbox.account.events] == ["o-de"]


def test_backfill_and_worker_do_not_duplicate_events(sandbox: Sandbox, tmp_path: Path) -> None:
    """The order of the two does not matter; the events of the worker are not marked."""
    order = sandbox.shop.orders[uid("order:three")]
    environment = sandbox.environment | {"QUEUE_URL": f"embedded://{tmp_path}/queue.db"}
    live = json.dumps(message("OrderCreated", "order", order["id"], order=order))
    for _ in range(2):
        assert CliRunner().invoke(main, ["publish", "-"], input=live, env=environment).exit_code == 0
        assert CliRunner().invoke(main, ["run", "--once"], env=environment).exit_code == 0
        assert backfill(sandbox, "orders", "--ids", order["id"]).exit_code == 0
    refunds = Counter(("Refunded Order", name) for name in (order["id"], uid("transaction:refund-2")))
    assert events(sandbox) == placed(order) + refunds
    marked = {event["metric"]: event["backfill"] for event in sandbox.account.events}
    assert marked == {"Placed Order": None, "Ordered Product": None, "Refunded Order": True}


def test_customers_products_and_categories_are_sent_in_bulk(sandbox: Sandbox) -> None:
    """Klaviyo has the same records as commercetools; only published products are sent."""
    nameless = sandbox.shop.customers.pop(uid("customer:nameless")) | {"email": ""}
    sandbox.shop.customers["nameless"] = nameless | {"id": "nameless"}
    for name in ("categories", "products", "customers"):
        result = backfill(sandbox, name, **BULK)
        assert result.exit_code == 0, result.stderr
    assert "customers: 5 done: 4 sent, 1 ignored, 0 failed" in result.stderr
    account, shop = sandbox.account, sandbox.shop
    assert {profile["attributes"]["external_id"] for profile in account.profiles} | {"nameless"} == set(shop.customers)
    assert set(account.items) == set(shop.products)
    assert set(account.categories) == set(shop.categories)
    posted = {request.path for request in sandbox.klaviyo.requests if request.method == "POST"}
    assert {"/api/profile-bulk-import-jobs", "/api/catalog-item-bulk-create-jobs"} <= posted


def test_full_last_page_is_followed_by_an_empty_one() -> None:
    """Each page costs one query and no record is read twice."""
    then = "2026-11-20T08:30:00.000Z"
    template = {"version": 1, "createdAt": then, "lastModifiedAt": then}
    customers: list[dict[str, Any]] = [
        template | {"id": f"c-{n:04}", "email": f"c{n}@mail.example"} for n in range(MAX_PAGE_SIZE)
    ]
    shop = Shop(customers={customer["id"]: customer for customer in customers})
    with Sandbox(shop=shop) as sandbox:
        result = backfill(sandbox, "customers")
        assert f"customers: {MAX_PAGE_SIZE} done: {MAX_PAGE_SIZE} sent" in result.stderr
        assert len(sandbox.account.profiles) == MAX_PAGE_SIZE
        listed = [request for request in sandbox.commercetools.requests if "in (" not in str(request.query)]
        pages = [request for request in listed if request.query.get("limit") == [str(MAX_PAGE_SIZE)]]
        assert len(pages) == 2  # the last is empty
        assert {(request.query["sort"][0], request.query["withTotal"][0]) for request in pages} == {("id asc", "false")}


def test_since_until_limit_and_ids_select_records(sandbox: Sandbox, tmp_path: Path) -> None:
    """All other records are left out."""
    grete = uid("customer:grete")
    sandbox.shop.customers[grete]["lastModifiedAt"] = "2026-11-25T12:00:00.000Z"
    result = backfill(sandbox, "customers", "--since", "2026-11-25", "--until", "2026-11-25T13:00:00+00:00")
    assert "customers: 1 done: 1 sent" in result.stderr
    assert [profile["attributes"]["external_id"] for profile in sandbox.account.profiles] == [grete]
    assert "customers: 0 done" in backfill(sandbox, "customers", "--until", "2026-11-20").stderr
    assert "customers: 2 done: 2 sent" in backfill(sandbox, "customers", "--limit", "2").stderr
    (tmp_path / "ids").write_text(f"{grete}\nnowhere\n")
    result = backfill(sandbox, "customers", "--ids", f"@{tmp_path}/ids")
    assert result.exit_code == 1
    assert "failed: 1 x commercetools has no such customer" in result.stderr


def test_next_run_continues_after_the_limit(sandbox: Sandbox, tmp_path: Path) -> None:
    """Each record is sent once, and the counts cover all runs."""
    arguments = ("customers", "--checkpoint", str(tmp_path / "c.json"), "--limit", "2")
    for done in (2, 4, 5, 5):
        assert f"customers: {done} done: {done} sent" in backfill(sandbox, *arguments).stderr
    imports = [
        request for request in sandbox.klaviyo.requests if (request.method, request.path) == ("POST", "/api/profiles")
    ]
    assert len(imports) == len(sandbox.shop.customers)


def test_dry_run_sends_and_writes_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    """It prints the requests in the format of `transform`."""
    result = backfill(sandbox, "orders", "--dry-run", "--checkpoint", str(tmp_path / "o.json"))
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["path"] for line in lines} == {"/api/events"}
    assert all(line["body"]["data"]["attributes"]["backfill"] is True for line in lines)
    assert not sandbox.klaviyo.requests
    assert list(tmp_path.iterdir()) == []
    assert "dry run of orders: 11 done" in result.stderr
    assert "The failures are in" not in result.stderr


def test_events_are_sent_in_bulk_if_the_account_ignores_repeats(sandbox: Sandbox) -> None:
    """A backfill repeats events, and one repeated event can cost a whole bulk call."""
    backfill(sandbox, "orders")
    bulk = "/api/event-bulk-create-jobs"
    assert bulk not in {request.path for request in sandbox.klaviyo.requests}
    with Sandbox() as other:
        give_verdict(other.account)
        backfill(other, "orders", **BULK)
        assert {request.path for request in other.klaviyo.requests} == {"/api/profiles", bulk}
        assert events(other) == events(sandbox)
        assert all(event["backfill"] is True for event in other.account.events)


def test_outage_fails_no_record(sandbox: Sandbox) -> None:
    """Records are held until commercetools and Klaviyo are available again."""
    sandbox.klaviyo.faults.add(Fault(status=503, times=6))
    sandbox.commercetools.faults.add(Fault(status=503, times=3, match="GET"))
    result = backfill(sandbox, "customers", KLAVIYO_WORKER_RETRY_TIMEOUT="0", KLAVIYO_WORKER_OUTAGE_HOLD="2")
    assert "customers: 5 done: 5 sent" in result.stderr, result.stderr
    assert result.exit_code == 0


def test_rejected_record_fails_alone(sandbox: Sandbox, tmp_path: Path) -> None:
    """The failures file has no personal data and is valid input for --ids."""
    email = sandbox.shop.customers[uid("customer:radia")]["email"]
    sandbox.klaviyo.faults.add(Fault(status=400, times=1, match="POST /api/profiles", contains=email.encode()))
    failures = tmp_path / "failures.jsonl"
    result = backfill(sandbox, "customers", "--failures-file", str(failures))
    assert result.exit_code == 1
    assert "customers: 5 done: 4 sent, 0 ignored, 1 failed" in result.stderr
    assert "failed: 1 x Klaviyo answered 400 to POST /api/profiles" in result.stderr
    texts = result.stderr + failures.read_text()
    assert not [text for text in sandbox.shop.personal_data() if text in texts]
    retried = backfill(sandbox, "customers", "--ids", str(failures))
    assert "customers: 1 done: 1 sent" in retried.stderr
    assert len(sandbox.account.profiles) == 5


@pytest.mark.parametrize(("variable", "code"), [("KLAVIYO_AUTH_KEY", 5), ("CT_API_CLIENT", 4)])
def test_rejected_credentials_end_the_backfill(variable: str, code: int, sandbox: Sandbox, tmp_path: Path) -> None:
    """The exit codes are those of `run`; no record fails, and the next run starts at the same record."""
    wrong = {"KLAVIYO_AUTH_KEY": "pk_wrong", "CT_API_CLIENT": '{"clientId": "a", "secret": "b"}'}[variable]
    arguments = ("customers", "--checkpoint", str(tmp_path / "c.json"))
    result = backfill(sandbox, *arguments, **{variable: wrong})
    assert result.exit_code == code
    assert "Error: " in result.stderr
    assert "customers: 5 done: 5 sent" in backfill(sandbox, *arguments).stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--since", "yesterday"), "--since: expected a date"),
        (("--until", "2026-13-01"), "--until: expected a date"),
        (("--since", "2026-01-02", "--until", "2026-01-01"), "--until: expected a time after --since"),
        (("--ids", "ada@example.com"), "--ids: expected commercetools ids"),
        (("--ids", ""), "--ids: expected commercetools ids"),
        (("--ids", "@nowhere"), "--ids: cannot read nowhere"),
        (
            ("--ids", ",".join(["a" * 36] * 7 + ["ada@example.com"])),
            "--ids: expected commercetools ids",
        ),  # too long for a file name
        (("--since", "0001-01-01T00:00+01:00"), "--since: expected a date"),
        (
            ("--failures-file", "/proc/nowhere/f"),
            "--checkpoint, --failures-file: cannot write /proc/nowhere/f: No such file",
        ),
        (
            ("--failures-file", "same", "--checkpoint", "./same"),
            "--failures-file: expected another file than --checkpoint",
        ),
        (("--ids", "a", "--since", "2026-01-01"), "--ids: cannot be combined with --since or --until: remove them"),
        (("--checkpoint", "/proc/nowhere/c.json"), "--checkpoint, --failures-file: cannot write /proc/nowhere/c.json"),
        (("--checkpoint", "/etc/hostname"), "--checkpoint: /etc/hostname is damaged"),
        (("--rate-limit-share", "2"), "KLAVIYO_WORKER_RATE_LIMIT_SHARE is malformed"),
    ],
)
def test_malformed_option_is_exit_code_2(
    arguments: tuple[str, ...], text: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    """One line names the option; QUEUE_URL is not read."""
    result = backfill(sandbox, "customers", "--failures-file", str(tmp_path / "f"), *arguments, QUEUE_URL="nonsense")
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith(f"Error: {text}")
    assert result.stderr.count("\n") == 1
    assert "example.com" not in result.stderr


def test_rejected_query_ends_the_backfill(sandbox: Sandbox) -> None:
    """The exit code is 1, both for the count and for a page."""
    counted = Fault(status=200, body=b'{"results": [], "total": 5}', match="GET")
    for answers in ((), (counted,)):
        sandbox.commercetools.faults.add(*answers, Fault(status=400, match="GET"))
        result = backfill(sandbox, "customers")
        assert result.exit_code == 1
        assert result.stderr == "Error: commercetools answered 400 InvalidInput for customers\n"


def test_full_disk_ends_the_backfill(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress that cannot be saved must not be reported."""
    saves: list[int] = []

    def save(*_: object) -> None:
        saves.append(1)
        if len(saves) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("worker.commands.backfill.checkpoint.Checkpoint.save", save)
    result = backfill(sandbox, "customers", "--checkpoint", str(tmp_path / "c.json"))
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: cannot write the checkpoint or the failures file: No space left on device\n")


def test_record_that_klaviyo_always_fails_ends_the_backfill(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some tries it is a failure. The checkpoint is behind it, and the other records are sent."""
    monkeypatch.setattr("worker.pipeline.FIRST_DELAY", 0.1)
    failing = min(sandbox.shop.customers)
    sandbox.klaviyo.faults.add(Fault(status=500, times=None, contains=failing.encode()))
    checkpoint = tmp_path / "customers.json"
    result = backfill(
        sandbox,
        "customers",
        "--checkpoint",
        str(checkpoint),
        KLAVIYO_WORKER_OUTAGE_HOLD="0.2",
        KLAVIYO_WORKER_RETRY_TIMEOUT="0.1",
    )
    assert result.exit_code == 1
    progress = json.loads(checkpoint.read_text())
    assert sum(progress["failed"].values()) == 1
    assert progress["last_id"] == max(sandbox.shop.customers)
    (failure,) = map(json.loads, (tmp_path / "customers.failures.jsonl").read_text().splitlines())
    assert failure["resource_id"] == failing
