"""The Terraform example, compared with the worker and its documentation. It is never applied."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1.types import DeadLetterPolicy, RetryPolicy, Subscription

from adapters.pubsub.policies import policy_warnings
from adapters.pubsub.settlement import LEASE_SECONDS
from tests.deploy.hcl import INFRASTRUCTURE, blocks, resources
from tests.deploy.pages import commands, flags, page
from tests.support.requirements import require_command
from worker.commands.subscriptions.spec import required_spec
from worker.mapping import MappingConfig

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "\n".join(file.read_text(encoding="utf-8") for file in sorted(INFRASTRUCTURE.glob("*.tf")))
SUBSCRIPTIONS = resources("google_pubsub_subscription")
WORKER = SUBSCRIPTIONS["worker"]


def test_subscription_requests_what_the_handlers_need() -> None:
    """It requests nothing else."""
    subscription = resources("commercetools_subscription")["worker"]
    required = required_spec(MappingConfig())
    assert {block["resource_type_id"]: block["types"] for block in subscription["message"]} == {
        resource: list(types) for resource, types in required.messages.items()
    }
    assert [block["resource_type_ids"] for block in subscription["changes"]] == [list(required.changes)]
    assert subscription["format"] == [{"type": "Platform"}]


def test_subscription_is_created_last() -> None:
    """Its test notification needs the permission to publish, and a subscription that keeps the message."""
    (destination,) = resources("commercetools_subscription")["worker"]["destination"]
    assert destination == {
        "type": "GoogleCloudPubSub",
        "project_id": "${var.project}",
        "topic": "${google_pubsub_topic.worker.name}",
    }
    after = resources("commercetools_subscription")["worker"]["depends_on"]
    needed = {"google_pubsub_subscription.worker", "google_pubsub_topic_iam_member.commercetools"}
    assert {name.strip("${}") for name in after} == needed
    assert WORKER["depends_on"] == ["${google_pubsub_subscription.dead}"]


def test_policies_match_the_documentation() -> None:
    """docs/pubsub.md has them as gcloud commands."""
    shown = {
        command.split()[4]: flags(command)
        for command in commands("docs/pubsub.md")
        if command.startswith("gcloud pubsub subscriptions create")
    }
    assert {name: _as_flags(body) for name, body in SUBSCRIPTIONS.items()} == {
        "worker": shown["klaviyo-worker"],
        "dead": shown["klaviyo-worker-dead"],
    }
    assert WORKER["enable_message_ordering"] is False


def _as_flags(body: dict[str, Any]) -> dict[str, str]:
    """Return the arguments of a subscription as flags of gcloud."""
    assert body["expiration_policy"] == [{"ttl": ""}]
    days = int(body["message_retention_duration"].removesuffix("s")) // 86400
    found = {"--message-retention-duration": f"{days}d", "--expiration-period": "never"}
    found["--topic"] = _default_name(body["topic"])
    if "ack_deadline_seconds" in body:
        found["--ack-deadline"] = str(body["ack_deadline_seconds"])
    for policy in body.get("dead_letter_policy", []):
        found["--dead-letter-topic"] = _default_name(policy["dead_letter_topic"])
        found["--max-delivery-attempts"] = str(policy["max_delivery_attempts"])
    for policy in body.get("retry_policy", []):
        found |= {"--min-retry-delay": policy["minimum_backoff"], "--max-retry-delay": policy["maximum_backoff"]}
    return found


def _default_name(reference: str) -> str:
    """Return the default name of the topic or subscription that a reference points to."""
    kind, resource = reference.strip("${}").split(".")[:2]
    (default,) = (block["name"]["default"] for block in blocks("variable") if "name" in block)
    return str(resources(kind)[resource]["name"].replace("${var.name}", default))


def test_check_reports_no_warnings() -> None:
    """The worker's own check accepts the policies."""
    (dead_letter_policy,), (retry_policy,) = WORKER["dead_letter_policy"], WORKER["retry_policy"]
    subscription = Subscription(
        name="klaviyo-worker",
        ack_deadline_seconds=WORKER["ack_deadline_seconds"],
        dead_letter_policy=DeadLetterPolicy(
            dead_letter_topic=dead_letter_policy["dead_letter_topic"],
            max_delivery_attempts=dead_letter_policy["max_delivery_attempts"],
        ),
        retry_policy=RetryPolicy(
            minimum_backoff=Duration(seconds=int(retry_policy["minimum_backoff"].removesuffix("s"))),
            maximum_backoff=Duration(seconds=int(retry_policy["maximum_backoff"].removesuffix("s"))),
        ),
    )
    assert list(policy_warnings(subscription, LEASE_SECONDS)) == []


def test_permissions_match_the_documentation() -> None:
    """Each is for one topic or subscription, none for the project; a variable can add two."""
    documented = {
        (command.split()[2], command.split()[4], flags(command)["--role"], _account_of(flags(command)["--member"]))
        for command in commands("docs/pubsub.md")
        if "add-iam-policy-binding" in command
    }
    assert _granted(optional=False) == documented
    assert _granted(optional=True) == {
        ("topics", "klaviyo-worker-dead", "roles/pubsub.publisher", "worker"),
        ("subscriptions", "klaviyo-worker-dead", "roles/pubsub.subscriber", "reader"),
    }
    kinds = {kind for block in blocks("resource") for kind in block}
    assert {kind for kind in kinds if "_iam_" in kind} == {
        "google_pubsub_topic_iam_member",
        "google_pubsub_subscription_iam_member",
    }


def test_accounts_are_created_before_they_get_permissions() -> None:
    """Google rejects a member that does not exist; commercetools owns its account."""
    shown = commands("docs/pubsub.md")
    (agent,) = [place for place, command in enumerate(shown) if "services identity create" in command]
    (worker,) = [place for place, command in enumerate(shown) if "service-accounts create klaviyo-worker" in command]
    granted = {"$PUBSUB": agent, "$WORKER": worker}
    for place, command in enumerate(shown):
        if "add-iam-policy-binding" in command:
            assert granted.get(flags(command)["--member"], -1) < place


def _granted(*, optional: bool) -> set[tuple[str, str, str, str]]:
    found = set()
    for kind in ("topic", "subscription"):
        for body in resources(f"google_pubsub_{kind}_iam_member").values():
            each = body.get("for_each", "")
            if ("var." in f"{each}{body.get('count', '')}") is optional:
                roles = re.findall(r"roles/[\w.]+", str(each)) or [body["role"]]
                found |= {(f"{kind}s", _default_name(body[kind]), role, _account_of(body["member"])) for role in roles}
    return found


def _account_of(member: str) -> str:
    """Return the account to which a Terraform expression or a shell variable evaluates."""
    names = {
        "$PUBSUB": "pubsub",
        "${local.pubsub}": "pubsub",
        "$WORKER": "worker",
        "${local.worker}": "worker",
        "${each.value}": "reader",
    }
    return names.get(member, member)


@pytest.mark.parametrize(
    ("account", "member"),
    [
        ("null", "serviceAccount:klaviyo-worker@acme.iam.gserviceaccount.com"),
        ('{namespace = "klaviyo", name = "klaviyo-worker"}', "$POOL/ns/klaviyo/sa/klaviyo-worker"),
    ],
    ids=["service account", "gke"],
)
def test_member_of_the_worker_matches_the_documentation(account: str, member: str, tmp_path: Path) -> None:
    """Terraform evaluates the expression, with fixed values in place of those from Google."""
    require_command("terraform")
    (pool,) = [command for command in commands("docs/kubernetes.md") if command.startswith("POOL=")]
    member = member.replace("$POOL", re.sub(r"\$\(.*\)", "123", pool.removeprefix("POOL=")))
    (expressions,) = re.findall(
        r"^locals \{.*?^\}", (INFRASTRUCTURE / "main.tf").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    values = {"data.google_project.this.number": "123", "google_service_account.worker": "local.accounts"}
    for name, value in values.items():
        expressions = expressions.replace(name, value)
    accounts = 'locals {\n  accounts = [{ member = "serviceAccount:klaviyo-worker@acme.iam.gserviceaccount.com" }]\n}\n'
    (tmp_path / "main.tf").write_text(accounts + expressions, encoding="utf-8")
    (tmp_path / "variables.tf").write_text((INFRASTRUCTURE / "variables.tf").read_text("utf-8"), encoding="utf-8")
    command = ["terraform", "console", "-var=project=acme", f"-var=kubernetes_service_account={account}"]
    done = subprocess.run(
        command, cwd=tmp_path, input="local.worker", capture_output=True, text=True, timeout=240, check=True
    )
    assert done.stdout.strip() == f'"{member}"'


def test_every_role_is_in_the_table_of_permissions() -> None:
    """The table has the roles of Terraform and of all pages."""
    pages = [f"docs/{name}.md" for name in ("pubsub", "servicebus", "serverless", "kubernetes")]
    shown = [flags(command) for name in pages for command in commands(name) if "role assignment create" in command]
    azure = {found["--role"] for found in shown}
    google = set(re.findall(r"roles/\w+\.[\w.]*\w", "".join([TEXT, *map(page, pages)])))
    assert len(azure) > 2
    assert {role for role in azure | google if f"`{role}`" not in page("docs/permissions.md")} == set()


def test_state_contains_no_secret() -> None:
    """The state is plain text with everything that Terraform creates or receives."""
    kinds = {kind for block in blocks("resource") for kind in block}
    assert not {kind for kind in kinds if re.search(r"secret|_key|api_client", kind)}
    providers = {name: body for block in blocks("provider") for name, body in block.items()}
    assert providers == {"google": {"project": "${var.project}"}, "commercetools": {}}
    assert not re.search(r"secret|klaviyo_auth|password", " ".join(_variables()), re.IGNORECASE)


def test_dead_letters_and_old_messages_have_an_alert() -> None:
    """Each has one condition, on its subscription."""
    policies = resources("google_monitoring_alert_policy")
    seen = {name: re.findall(r"google_pubsub_subscription\.(\w+)\.name|subscription/(\w+)", str(body["conditions"]))
            for name, body in policies.items()}  # fmt: skip
    assert seen == {
        "dead_letters": [("dead", ""), ("", "num_undelivered_messages")],
        "old_messages": [("worker", ""), ("", "oldest_unacked_message_age")],
    }
    found = {name: body["conditions"][0]["condition_threshold"][0] for name, body in policies.items()}
    assert {name: (body["comparison"], body["threshold_value"]) for name, body in found.items()} == {
        "dead_letters": ("COMPARISON_GT", 0),
        "old_messages": ("COMPARISON_GT", "${var.max_age}"),
    }


def test_variables_are_declared_and_used() -> None:
    """The same is true for those of the example; each has a description."""
    assert set(re.findall(r"var\.(\w+)", TEXT)) == set(_variables())
    assert all(body["description"] for body in _variables().values())
    example = (INFRASTRUCTURE / "terraform.tfvars.example").read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:# )?(\w+) +=", example, re.MULTILINE)) <= set(_variables())


def _variables() -> dict[str, Any]:
    return {name: body for block in blocks("variable") for name, body in block.items()}


def test_references_have_a_target() -> None:
    """The target is a declared resource or data source."""
    declared = {(kind, name) for block in blocks("resource") + blocks("data") for kind in block for name in block[kind]}
    assert set(re.findall(r"\b((?:google|commercetools)_\w+)\.(\w+)", TEXT)) <= declared


def test_terraform_accepts_the_format() -> None:
    """`terraform fmt` also parses all files; it downloads no providers."""
    require_command("terraform")
    command = ["terraform", "fmt", "-check", "-diff", str(INFRASTRUCTURE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (0, "")
