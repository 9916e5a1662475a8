"""`klaviyo-worker subscriptions`, and the subscription in `check`, over sockets to the sandbox."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from adapters import InertQueue, QueueWarning
from worker.cli import main
from worker.commands.check import checks
from worker.commands.subscriptions import client
from worker.sandbox import Fault, Sandbox
from worker.transform import HANDLERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

    from adapters import QueueAdapter, QueueOptions

TOPIC = "pubsub://my-project/klaviyo-worker"
QUEUE = "https://sqs.eu-central-1.amazonaws.com/123456789012/klaviyo-worker"
GRID = "eventgrid://my-shop.westeurope-1.eventgrid.azure.net"
PATH = "/sandbox-shop/subscriptions"
SECRET = "KLAVIYO_WORKER_DESTINATION_SECRET"


class Command:
    """`klaviyo-worker` with an API client that can manage subscriptions by default."""

    def __init__(self, sandbox: Sandbox, directory: Path) -> None:
        self.store = sandbox.commercetools_api.subscriptions
        self._environment = sandbox.environment | {"CT_SCOPE": "", "QUEUE_URL": f"embedded://{directory}/queue.db"}

    def __call__(self, *arguments: str, **environment: str) -> Result:
        unused = {f"{name}_FILE": None for name in (SECRET, "CT_API_CLIENT")}
        return CliRunner().invoke(main, arguments, env=unused | self._environment | environment)

    def apply(self, *arguments: str, to: str = TOPIC, **environment: str) -> Result:
        return self("subscriptions", "apply", "--destination", to, "--wait", "0", *arguments, **environment)

    def checked(self, *arguments: str, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """Return the exit code of `check`, and its results by name."""
        done = self("check", "--json", "--retry-timeout", "0", *arguments, **environment)
        results = [json.loads(line) for line in done.stdout.splitlines()]
        return done.exit_code, {result["check"]: result for result in results}


@pytest.fixture
def command(sandbox: Sandbox, tmp_path: Path) -> Command:
    return Command(sandbox, tmp_path)


def write_requests(sandbox: Sandbox) -> list[tuple[str, str, int]]:
    """Return the requests that change subscriptions."""
    return [
        (request.method, request.path.removeprefix(PATH), request.status)
        for request in sandbox.commercetools.requests
        if request.method != "GET" and request.path.startswith(PATH)
    ]


def test_second_apply_changes_nothing(command: Command, sandbox: Sandbox) -> None:
    """`plan` writes nothing, `apply` makes one request, and `check` succeeds afterwards."""
    assert command("subscriptions", "plan", "--destination", TOPIC).stdout.startswith("+ create subscription klaviyo-")
    assert not write_requests(sandbox)
    done = command.apply()
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "applied: version 1; Healthy: commercetools delivers notifications"
    again = command.apply()
    assert again.stdout.splitlines() == [
        "= subscription klaviyo-worker is up to date",
        "applied: version 1; Healthy: commercetools delivers notifications",
    ]
    assert write_requests(sandbox) == [("POST", "", 201)]
    code, found = command.checked()
    assert code == 0
    assert found["subscriptions"]["text"] == "klaviyo-worker is healthy and requests everything that the handlers need"


def test_change_is_one_update(command: Command, sandbox: Sandbox, tmp_path: Path) -> None:
    """Messages, changes and destination change together, and the key stays."""
    (tmp_path / "mapping.toml").write_text('disabled_types = ["OrderImported", "ResourceUpdated", "ProductDeleted"]')
    assert command.apply("--config", str(tmp_path / "mapping.toml")).exit_code == 0
    done = command.apply(to=QUEUE)
    assert "    + messages     order: OrderImported" in done.stdout.splitlines()
    (subscription,) = command.store.all()
    assert (subscription["key"], subscription["version"]) == ("klaviyo-worker", 2)
    assert subscription["destination"]["queueUrl"] == QUEUE
    assert write_requests(sandbox)[1:] == [("POST", f"/{subscription['id']}", 200)]


def test_json_output(command: Command) -> None:
    """The output is a line for the plan and a line for the result."""
    plan, applied = map(json.loads, command.apply("--json").stdout.splitlines())
    assert (plan["action"], plan["version"], plan["destination"]["wanted"]) == ("create", None, TOPIC)
    assert {entry["resourceTypeId"] for entry in plan["add"]["messages"]} == {
        resource for resource, kind in HANDLERS if not kind.startswith("Resource")
    }
    assert applied == {"id": command.store.all()[0]["id"], "version": 1, "status": "Healthy", "deleted": 0}


def test_conflict_leads_to_a_new_plan(command: Command, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    """Changes of another client are not overwritten."""
    command.apply()
    all_ = client.Subscriptions.all
    changes = [{"action": "setChanges", "changes": [{"resourceTypeId": "cart"}]}]
    others = iter([{"version": 1, "actions": changes}])

    def read(self: client.Subscriptions) -> list[dict[str, Any]]:
        seen = all_(self)
        for body in others:
            command.store.update("key=klaviyo-worker", body)
        return seen

    monkeypatch.setattr(client.Subscriptions, "all", read)
    assert command.apply(to=QUEUE).exit_code == 0
    assert [status for _, _, status in write_requests(sandbox)] == [201, 409, 200]
    (subscription,) = command.store.all()
    assert (subscription["version"], len(subscription["changes"])) == (3, 3)


def test_subscription_created_by_another_client(
    command: Command, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    """Commercetools answers 400 because the key is taken, and the worker plans again."""
    command.apply()
    all_ = client.Subscriptions.all
    nothing: Iterator[list[dict[str, Any]]] = iter([[]])
    monkeypatch.setattr(client.Subscriptions, "all", lambda self: next(nothing, all_(self)))
    assert command.apply().exit_code == 0
    assert [status for _, _, status in write_requests(sandbox)] == [201, 400]


def test_repeated_conflicts_are_an_error(command: Command, sandbox: Sandbox) -> None:
    """`apply` exits with 4 after five tries."""
    sandbox.commercetools.faults.add(Fault(409, times=None, match=f"POST {PATH}"))
    done = command.apply()
    assert done.exit_code == 4
    assert "answered 409" in done.stderr
    assert len(write_requests(sandbox)) == 5


def test_lost_response_leads_to_a_new_plan(command: Command, sandbox: Sandbox) -> None:
    """The subscription is read before a retry. Here the first request had succeeded."""
    sandbox.commercetools.faults.add(Fault(match=f"POST {PATH}", action="lose_response"))
    assert command.apply().exit_code == 0
    assert write_requests(sandbox) == [("POST", "", 201)]
    assert len(command.store.all()) == 1


def test_commercetools_cannot_deliver(command: Command) -> None:
    """Nothing is created. The commercetools error is shown without the secret."""
    command.store.unreachable.add("my-shop")
    done = command.apply(to=GRID, **{SECRET: "grid-s3cret"})
    assert done.exit_code == 4
    assert (
        "400 InvalidInput for subscriptions: A test message could not be delivered to this destination" in done.stderr
    )
    assert "s3cret" not in done.output
    assert "***" in done.stderr
    assert not command.store.all()


def test_commercetools_error_is_sanitized(command: Command, sandbox: Sandbox) -> None:
    """It becomes one printable line without any part of the secret."""
    secret = "grid-" + "s3cret" * 20
    body = json.dumps(
        {"statusCode": 400, "errors": [{"code": "No\n", "message": f"one\ntwo\x1b[2J {'x' * 450}{secret}"}]}
    ).encode()
    sandbox.commercetools.faults.add(Fault(400, match=f"POST {PATH}", body=body))
    done = command.apply(to=GRID, **{SECRET: secret})
    assert done.exit_code == 4
    assert "grid-" not in done.output
    assert done.stderr.rstrip("\n").isprintable()
    sandbox.commercetools.faults.add(Fault(400, match=f"GET {PATH}", body=body))
    assert "\nFAIL    subscriptions  commercetools answered 400 No" in command("check").stdout


def test_secret_from_a_file_is_sent_again_on_request(command: Command, tmp_path: Path) -> None:
    """A secret cannot be compared, so a new one requires an option, which the plan mentions."""
    file = tmp_path / "secret"
    file.write_text("first-s3cret\n")
    assert command.apply(to=GRID, **{f"{SECRET}_FILE": str(file)}).exit_code == 0
    file.write_text("second-s3cret\n")
    done = command.apply(to=GRID, **{f"{SECRET}_FILE": str(file)})
    assert "? the secret cannot be compared because commercetools hides it; --renew sends it again" in done.stdout
    assert command.store.destinations()[0]["accessKey"] == "first-s3cret"
    renewed = command.apply("--renew", "--json", to=GRID, **{f"{SECRET}_FILE": str(file)})
    assert command.store.destinations()[0]["accessKey"] == "second-s3cret"
    assert "s3cret" not in done.output + renewed.output


def test_stale_subscriptions_are_deleted_only_on_request(command: Command, sandbox: Sandbox) -> None:
    """The command asks for confirmation. Subscriptions with another destination stay."""
    command.apply("--key", "old")
    command.apply("--key", "elsewhere", to=QUEUE)
    shown = command.apply()
    assert "- stale: old sends to the same destination; --delete-stale deletes it" in shown.stdout.splitlines()
    assert len(command.store.all()) == 3
    declined = command.apply("--delete-stale")
    assert declined.exit_code == 1
    assert "Permanently delete 1 stale subscription?" in declined.stderr
    assert len(command.store.all()) == 3
    done = command.apply("--delete-stale", "--yes")
    assert (
        done.stdout.splitlines()[-1]
        == "applied: version 1, 1 stale deleted; Healthy: commercetools delivers notifications"
    )
    assert [entry["key"] for entry in command.store.all()] == ["elsewhere", "klaviyo-worker"]
    assert write_requests(sandbox)[-1][0] == "DELETE"


def test_stale_subscription_is_kept_while_the_new_one_is_unhealthy(command: Command) -> None:
    """Otherwise no notification would be delivered."""
    command.apply()
    command.apply("--key", "old")
    command.store.set_status("klaviyo-worker", "ManuallySuspended")
    done = command.apply("--delete-stale", "--yes", "--json")
    assert done.exit_code == 4
    assert json.loads(done.stdout.splitlines()[-1])["deleted"] == 0
    assert len(command.store.all()) == 2


def test_changed_stale_subscription_is_not_deleted(command: Command, sandbox: Sandbox) -> None:
    """Another client uses it. If it is already deleted, that is not an error."""
    command.apply("--key", "old")
    sandbox.commercetools.faults.add(Fault(409, match=f"DELETE {PATH}"))
    done = command.apply("--delete-stale", "--yes")
    assert done.exit_code == 4
    assert len(command.store.all()) == 2
    sandbox.commercetools.faults.add(Fault(404, match=f"DELETE {PATH}"))
    assert command.apply("--delete-stale", "--yes").exit_code == 0


@pytest.mark.parametrize(
    ("status", "todo"),
    [
        ("TemporaryError", "wait"),
        ("ManuallySuspended", "ask commercetools' support"),
        ("Resting\x1b", "look it up"),
    ],
)
def test_unhealthy_subscription_is_explained(command: Command, status: str, todo: str) -> None:
    """`apply` and `check` explain the status and exit with 4."""
    command.apply()
    command.store.set_status("klaviyo-worker", status)
    done = command.apply()
    assert done.exit_code == 4
    assert f"subscription klaviyo-worker is not healthy: {status[:6]}" in done.stderr
    assert todo in done.stderr
    assert "\x1b" not in done.output
    code, found = command.checked()
    assert (code, found["subscriptions"]["status"]) == (4, "failed")
    assert found["subscriptions"]["todo"].startswith(todo)
    assert all(line.isprintable() for line in command("check").stdout.splitlines())


def test_apply_waits_until_healthy(command: Command, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    """The health endpoint requires no token."""
    monkeypatch.setattr(client, "POLL_INTERVAL", 0.01)
    command.apply()
    for status in (503, 503, 400):
        sandbox.commercetools.faults.add(Fault(status, match=f"GET {PATH}/{command.store.all()[0]['id']}/health"))
    done = command("subscriptions", "apply", "--destination", TOPIC, "--wait", "60")
    assert done.exit_code == 0
    statuses = [request.status for request in sandbox.commercetools.requests if request.path.endswith("/health")]
    assert statuses[-4:] == [503, 503, 400, 200]


def test_missing_health_endpoint_is_accepted(command: Command) -> None:
    """An emulator of commercetools can lack it."""
    command.store.has_health = False
    done = command.apply()
    assert done.exit_code == 0
    assert done.stdout.endswith("applied: version 1; this commercetools does not report health\n")


def test_response_without_a_subscription_is_an_error(command: Command, sandbox: Sandbox) -> None:
    """The status alone does not mean success."""
    sandbox.commercetools.faults.add(Fault(200, times=None, match=f"POST {PATH}", body=b"{}"))
    done = command.apply()
    assert (done.exit_code, "commercetools returned a subscription without an id" in done.stderr) == (4, True)


@pytest.mark.parametrize("action", ["plan", "apply"])
def test_missing_scope_is_named(action: str, command: Command) -> None:
    """The command exits with 4 and changes nothing."""
    done = command("subscriptions", action, "--destination", TOPIC, CT_SCOPE="view_orders:sandbox-shop")
    assert done.exit_code == 4
    assert "403 insufficient_scope for subscriptions: use an API client with the scope manage_subscr" in done.stderr


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault(times=None, body=b"{}", status=200), "commercetools returned no results for subscriptions"),
        (Fault(times=None, body=b"<html>", status=200), "not commercetools' response: 200"),
        (Fault(times=None, status=401), "check CT_API_URL and CT_PROJECT_ID"),
        (Fault(times=None, status=404), "check CT_API_URL and CT_PROJECT_ID"),
        (Fault(times=None, status=302), "check CT_API_URL\n"),
        (Fault(times=None, status=400, body=b'{"errors": [17]}'), "not commercetools' response: 400"),
        (Fault(times=None, status=503), "503"),
    ],
)
def test_malformed_responses_change_nothing(fault: Fault, text: str, command: Command, sandbox: Sandbox) -> None:
    """They do not mean that there is no subscription."""
    sandbox.commercetools.faults.add(fault_for(fault))
    done = command.apply("--retry-timeout", "0")
    assert done.exit_code == 4
    assert text in done.stderr
    assert not write_requests(sandbox)


def fault_for(fault: Fault) -> Fault:
    return Fault(fault.status, fault.times, match=f"GET {PATH}", body=fault.body)


def test_invalid_request_is_exit_code_2(command: Command, tmp_path: Path) -> None:
    """The error is reported before any request to commercetools."""
    assert command("subscriptions", "plan").exit_code == 2
    assert command.apply(to="kafka://topic").exit_code == 2
    assert command.apply(to=GRID).exit_code == 2
    kinds = sorted({kind for _, kind in HANDLERS})
    (tmp_path / "none.toml").write_text(f"disabled_types = {json.dumps(kinds)}")
    done = command.apply("--config", str(tmp_path / "none.toml"))
    assert (done.exit_code, "disables every handler" in done.stderr) == (2, True)


def test_check_reports_missing_messages(command: Command, tmp_path: Path) -> None:
    """The subscription does not exist or does not cover the enabled handlers."""
    code, found = command.checked()
    assert code == 4
    assert found["subscriptions"]["text"] == (
        "there is no subscription klaviyo-worker: run klaviyo-worker subscriptions apply"
    )
    mapping = tmp_path / "mapping.toml"
    mapping.write_text('disabled_types = ["OrderImported", "ResourceUpdated", "ResourceCreated", "ResourceDeleted"]')
    command.apply("--config", str(mapping), "--key", "mine")
    code, found = command.checked("--subscription-key", "mine")
    assert code == 4
    assert found["subscriptions"]["todo"] == "run klaviyo-worker subscriptions apply --key mine"
    assert found["subscriptions"]["why"] == (
        "mine does not request order OrderImported, "
        "changes of customer, changes of category, changes of inventory-entry"
    )
    assert command.checked("--subscription-key", "mine", "--config", str(mapping))[0] == 0
    assert command.checked()[1]["subscriptions"]["why"] == "there is no subscription klaviyo-worker, only mine"


def test_check_without_the_scope_skips_the_subscription(command: Command) -> None:
    """The worker itself does not need the scope."""
    done = command("check", CT_SCOPE="view_orders:sandbox-shop")
    assert done.exit_code == 0
    assert (
        "SKIP    subscriptions  not checked: the scope manage_subscriptions is missing, which the worker itself does "
        "not need → run check with an API client that has it"
    ) in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("kinds", "reads", "writes"),
    [
        (
            ["OrderCreated"],
            {"orders", "customers", "categories", "product-projections", "discount-codes"},
            {"events:write", "profiles:write"},
        ),
        (["CustomerCreated"], {"customers"}, {"profiles:write"}),
        (["CategoryCreated"], {"categories"}, {"catalogs:write"}),
        (
            ["ProductPublished"],
            {"inventory", "categories", "product-projections", "standalone-prices"},
            {"catalogs:write"},
        ),
    ],
)
def test_check_tests_only_needed_scopes(
    kinds: list[str], reads: set[str], writes: set[str], command: Command, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Scopes for disabled handlers can be missing. A wrong Klaviyo key is detected in any case."""
    disabled = sorted({kind for _, kind in HANDLERS} - set(kinds))
    (tmp_path / "mapping.toml").write_text(f"disabled_types = {json.dumps(disabled)}")
    code, found = command.checked("--config", str(tmp_path / "mapping.toml"), CT_SCOPE="view_orders:sandbox-shop")
    assert code == 0
    assert f" 1 of {len(HANDLERS)} handlers enabled" in found["configuration"]["text"]
    asked = {request.path.split("/")[2] for request in sandbox.commercetools.requests} - {"token", "subscriptions"}
    assert asked == reads
    assert set(re.findall(r"\w+:write", found["klaviyo"]["text"])) - {"lists:write"} == writes
    assert command.checked("--config", str(tmp_path / "mapping.toml"), KLAVIYO_AUTH_KEY="pk_wrong")[0] == 5


def test_other_errors_do_not_blame_scopes(command: Command, sandbox: Sandbox, tmp_path: Path) -> None:
    """The advice for wrong credentials and for a wrong URL does not mention scopes."""
    disabled = sorted({kind for _, kind in HANDLERS} - {"CustomerCreated", "ProductPublished"})
    (tmp_path / "mapping.toml").write_text(f"disabled_types = {json.dumps(disabled)}")
    sandbox.klaviyo.faults.add(Fault(302, times=None, match="GET /api/catalog-items"))
    client = '{"clientId": "unknown", "secret": "s3cret"}'
    _, found = command.checked("--config", str(tmp_path / "mapping.toml"), CT_API_CLIENT=client)
    todo = "check CT_API_CLIENT, and that CT_AUTH_URL is in the region of the project"
    assert found["commercetools"]["todo"] == todo
    assert found["klaviyo"]["todo"] == "check KLAVIYO_API_URL"


class QueueWithoutPolicies:
    """A queue without policies."""

    def check(self) -> list[QueueWarning]:
        return [
            QueueWarning("q has no dead-letter policy", "gcloud set-dead: q-dead", is_missing_policy=True),
            QueueWarning("q has no retry policy", "gcloud set-retry", is_missing_policy=True),
            QueueWarning("q has a short lease", "gcloud set-lease"),
        ]

    def close(self) -> None: ...


def test_missing_policies_fail_the_check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` exits with 3 and prints the commands that set them. Other warnings alone do not fail."""

    def opened(url: str, options: QueueOptions) -> QueueAdapter:
        del url, options
        return QueueWithoutPolicies()  # type: ignore[return-value]

    monkeypatch.setattr(checks, "open_queue", opened)
    done = command("check", CT_SCOPE="view_orders:sandbox-shop")
    assert done.exit_code == 3
    assert done.stdout.splitlines()[1] == (
        "FAIL    queue          q has no dead-letter policy; q has no retry policy; q has a short lease "
        "→ gcloud set-dead: q-dead; gcloud set-retry; gcloud set-lease"
    )
    unreadable = QueueWarning("q cannot be read to learn its policies", "grant roles/pubsub.viewer")
    monkeypatch.setattr(QueueWithoutPolicies, "check", lambda _: [unreadable])
    code, found = command.checked(CT_SCOPE="view_orders:sandbox-shop")
    assert code == 0
    assert found["queue"]["text"] == (
        "can be consumed; q cannot be read to learn its policies: grant roles/pubsub.viewer"
    )


class QueueOfTopic(InertQueue):
    """A queue that receives from a topic of Pub/Sub."""

    def destination(self) -> str:
        return TOPIC


@pytest.mark.parametrize("to", [f"{TOPIC}-old", "pubsub://other-project/klaviyo-worker"])
def test_subscription_on_another_topic_is_named(to: str, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker would wait for messages that never arrive."""
    command.apply(to=to)
    monkeypatch.setattr(checks, "open_queue", lambda *_: QueueOfTopic())
    done = command("check")
    assert done.exit_code == 4
    assert (
        f"FAIL    subscriptions  klaviyo-worker publishes to {to}, but QUEUE_URL receives from {TOPIC} → correct "
        f"QUEUE_URL, or run klaviyo-worker subscriptions apply --destination {TOPIC}" in done.stdout.splitlines()
    )


@pytest.mark.parametrize("to", [TOPIC, "sns://arn:aws:sns:eu-central-1:123456789012:shop"])
def test_destination_that_can_lead_to_the_queue_is_accepted(
    to: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A topic of another service can forward to the queue."""
    command.apply(to=to)
    monkeypatch.setattr(checks, "open_queue", lambda *_: QueueOfTopic())
    code, found = command.checked()
    assert code == 0, found
    assert found["queue"]["receives_from"] == TOPIC
