"""The Terraform example: in step with the worker and its documentation, as nobody can apply it here."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1.types import DeadLetterPolicy, RetryPolicy, Subscription

from adapters.pubsub.queue import _warnings
from adapters.pubsub.settlement import LEASE_SECONDS
from tests.deploy.hcl import INFRASTRUCTURE, blocks, resources
from tests.deploy.pages import commands, flags, page
from tests.support.requirements import require_command
from worker.commands.subscriptions.spec import required_spec

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "\n".join(file.read_text(encoding="utf-8") for file in sorted(INFRASTRUCTURE.glob("*.tf")))
SUBSCRIPTIONS = resources("google_pubsub_subscription")
WORKER = SUBSCRIPTIONS["worker"]


def test_commercetools_is_asked_for_what_the_handlers_want() -> None:
    """Everything, and nothing else."""
    subscription = resources("commercetools_subscription")["worker"]
    assert {block["resource_type_id"]: block["types"] for block in subscription["message"]} == {
        resource: list(types) for resource, types in required_spec().messages.items()
    }
    assert [block["resource_type_ids"] for block in subscription["changes"]] == [list(required_spec().changes)]
    assert subscription["format"] == [{"type": "Platform"}]


def test_commercetools_comes_last() -> None:
    """Its test notification needs the right to publish, and whatever follows a subscription that keeps it."""
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


def test_policies_are_those_of_the_documentation() -> None:
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
    """Return what gcloud calls the arguments of a subscription."""
    assert body["expiration_policy"] == [{"ttl": ""}]
    days = int(body["message_retention_duration"].removesuffix("s")) // 86400
    found = {"--message-retention-duration": f"{days}d", "--expiration-period": "never"}
    found["--topic"] = _named(body["topic"])
    if "ack_deadline_seconds" in body:
        found["--ack-deadline"] = str(body["ack_deadline_seconds"])
    for policy in body.get("dead_letter_policy", []):
        found["--dead-letter-topic"] = _named(policy["dead_letter_topic"])
        found["--max-delivery-attempts"] = str(policy["max_delivery_attempts"])
    for policy in body.get("retry_policy", []):
        found |= {"--min-retry-delay": policy["minimum_backoff"], "--max-retry-delay": policy["maximum_backoff"]}
    return found


def _named(reference: str) -> str:
    """Return the name, by default, of the topic or subscription that a reference leads to."""
    kind, resource = reference.strip("${}").split(".")[:2]
    (default,) = (block["name"]["default"] for block in blocks("variable") if "name" in block)
    return str(resources(kind)[resource]["name"].replace("${var.name}", default))


def test_the_worker_has_nothing_to_warn_about() -> None:
    """What its own check looks at."""
    (buried,), (retried,) = WORKER["dead_letter_policy"], WORKER["retry_policy"]
    subscription = Subscription(
        name="klaviyo-worker",
        ack_deadline_seconds=WORKER["ack_deadline_seconds"],
        dead_letter_policy=DeadLetterPolicy(
            dead_letter_topic=buried["dead_letter_topic"], max_delivery_attempts=buried["max_delivery_attempts"]
        ),
        retry_policy=RetryPolicy(
            minimum_backoff=Duration(seconds=int(retried["minimum_backoff"].removesuffix("s"))),
            maximum_backoff=Duration(seconds=int(retried["maximum_backoff"].removesuffix("s"))),
        ),
    )
    assert list(_warnings(subscription, LEASE_SECONDS)) == []


def test_rights_are_those_of_the_documentation() -> None:
    """Each on one topic or subscription, and none on the project. Those that a variable turns on come on top."""
    documented = {
        (command.split()[2], command.split()[4], flags(command)["--role"], _who(flags(command)["--member"]))
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


def test_accounts_are_made_before_they_get_rights() -> None:
    """Google refuses a member that is not there. commercetools' account is its own."""
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
                found |= {(f"{kind}s", _named(body[kind]), role, _who(body["member"])) for role in roles}
    return found


def _who(member: str) -> str:
    """Return who is meant, in Terraform's words or in the shell's."""
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
    ids=["elsewhere", "gke"],
)
def test_the_worker_is_the_member_that_the_documentation_names(account: str, member: str, tmp_path: Path) -> None:
    """Terraform itself works it out, with what Google would tell in place of Google."""
    require_command("terraform")
    (pool,) = [command for command in commands("docs/kubernetes.md") if command.startswith("POOL=")]
    member = member.replace("$POOL", re.sub(r"\$\(.*\)", "123", pool.removeprefix("POOL=")))
    (expressions,) = re.findall(
        r"^locals \{.*?^\}", (INFRASTRUCTURE / "main.tf").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    told = {"data.google_project.this.number": "123", "google_service_account.worker": "local.accounts"}
    for name, value in told.items():
        expressions = expressions.replace(name, value)
    accounts = 'locals {\n  accounts = [{ member = "serviceAccount:klaviyo-worker@acme.iam.gserviceaccount.com" }]\n}\n'
    (tmp_path / "main.tf").write_text(accounts + expressions, encoding="utf-8")
    (tmp_path / "variables.tf").write_text((INFRASTRUCTURE / "variables.tf").read_text("utf-8"), encoding="utf-8")
    command = ["terraform", "console", "-var=project=acme", f"-var=kubernetes_service_account={account}"]
    done = subprocess.run(
        command, cwd=tmp_path, input="local.worker", capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == f'"{member}"'


def test_every_role_is_in_the_table_of_permissions() -> None:
    """One place names them all: those of Terraform, and those of the other pages, Azure's too."""
    pages = [f"docs/{name}.md" for name in ("pubsub", "servicebus", "serverless", "kubernetes")]
    shown = [flags(command) for name in pages for command in commands(name) if "role assignment create" in command]
    azure = {found["--role"] for found in shown}
    google = set(re.findall(r"roles/\w+\.[\w.]*\w", "".join([TEXT, *map(page, pages)])))
    assert len(azure) > 2
    assert {role for role in azure | google if f"`{role}`" not in page("docs/permissions.md")} == set()


def test_no_secret_comes_near_the_state() -> None:
    """State is plain text: whatever Terraform creates or is told is in it."""
    kinds = {kind for block in blocks("resource") for kind in block}
    assert not {kind for kind in kinds if re.search(r"secret|_key|api_client", kind)}
    providers = {name: body for block in blocks("provider") for name, body in block.items()}
    assert providers == {"google": {"project": "${var.project}"}, "commercetools": {}}
    assert not re.search(r"secret|klaviyo_auth|password", " ".join(_variables()), re.IGNORECASE)


def test_dead_letters_and_old_messages_raise_an_alert() -> None:
    """One condition each, on the subscription it is about."""
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
    """Those of the example too, and each says what it is for."""
    assert set(re.findall(r"var\.(\w+)", TEXT)) == set(_variables())
    assert all(body["description"] for body in _variables().values())
    example = (INFRASTRUCTURE / "terraform.tfvars.example").read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:# )?(\w+) +=", example, re.MULTILINE)) <= set(_variables())


def _variables() -> dict[str, Any]:
    return {name: body for block in blocks("variable") for name, body in block.items()}


def test_references_lead_somewhere() -> None:
    """To a resource or a data source that is declared."""
    declared = {(kind, name) for block in blocks("resource") + blocks("data") for kind in block for name in block[kind]}
    assert set(re.findall(r"\b((?:google|commercetools)_\w+)\.(\w+)", TEXT)) <= declared


def test_terraform_likes_the_format() -> None:
    """`terraform fmt` parses all of it too. Providers are not fetched."""
    require_command("terraform")
    command = ["terraform", "fmt", "-check", "-diff", str(INFRASTRUCTURE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
