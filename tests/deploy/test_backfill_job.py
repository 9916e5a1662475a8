"""The Job in k8s/backfill: schemas, settings, and a run of its command."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from tests.deploy.manifests import by_kind, rendered, validate
from tests.deploy.pages import ROOT, page
from tests.deploy.test_kubernetes import NAMES, PLACEHOLDERS, SECRET_NAMES
from tests.integration.commands.test_backfill import keep_pytest_signal_handlers  # noqa: F401 - a fixture
from worker.cli import main
from worker.errors import ExitCode

if TYPE_CHECKING:
    from tests.deploy.manifests import Objects
    from worker.sandbox import Sandbox

FOLDER = ROOT / "k8s" / "backfill"


@pytest.fixture
def objects() -> Objects:
    return by_kind(rendered(FOLDER))


def pod_of(objects: Objects) -> dict[str, Any]:
    pod: dict[str, Any] = objects["Job"]["spec"]["template"]["spec"]
    return pod


def claim_of(objects: Objects) -> str:
    return str(objects["PersistentVolumeClaim"]["metadata"]["name"])


def test_objects_match_their_schemas(objects: Objects) -> None:
    """No object has the label by which the Deployment's Service and disruption budget select pods."""
    assert set(objects) == {"Job", "ConfigMap", "NetworkPolicy", "PersistentVolumeClaim"}
    labels = {"app.kubernetes.io/name": "klaviyo-worker-backfill"}
    for document in objects.values():
        validate(document)
        assert document["metadata"]["labels"] == labels
    assert objects["Job"]["spec"]["template"]["metadata"]["labels"] == labels
    policy = objects["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert "ingress" not in policy
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 443}


def test_pod_has_the_permissions_of_the_worker(objects: Objects) -> None:
    """User, image, resources, variables and secrets are the same; only its volume is writable."""
    deployment = by_kind(rendered(ROOT / "k8s" / "overlays" / "pubsub-keda"))["Deployment"]["spec"]["template"]["spec"]
    pod = pod_of(objects)
    (container,), (workers,) = pod["containers"], deployment["containers"]
    assert {name: container[name] for name in ("image", "env", "resources", "securityContext")} == {
        name: workers[name] for name in ("image", "env", "resources", "securityContext")
    }
    same = ("securityContext", "automountServiceAccountToken", "enableServiceLinks")
    assert [pod[name] for name in same] == [deployment[name] for name in same]
    assert container["volumeMounts"][0] == workers["volumeMounts"][0]
    assert pod["volumes"][0] == deployment["volumes"][0]
    assert (
        pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    )
    assert set(objects["ConfigMap"]["data"]) <= set(NAMES.values()) - SECRET_NAMES
    assert container["envFrom"] == [{"configMapRef": {"name": objects["ConfigMap"]["metadata"]["name"]}}]
    assert pod["terminationGracePeriodSeconds"] > 25


def test_pod_is_replaced_unless_a_retry_cannot_succeed(objects: Objects) -> None:
    """Interruptions and crashes continue; errors that would repeat end the Job."""
    spec = objects["Job"]["spec"]
    fail, ignore = spec["podFailurePolicy"]["rules"]
    assert pod_of(objects)["restartPolicy"] == "Never"  # the policy needs it
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"]["containerName"] == pod_of(objects)["containers"][0]["name"]
    assert set(fail["onExitCodes"]["values"]) == {
        ExitCode.UNEXPECTED,
        ExitCode.USAGE,
        ExitCode.COMMERCETOOLS,
        ExitCode.KLAVIYO,
    }
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")


def test_documented_kustomization_is_complete(tmp_path: Path) -> None:
    """It sets every placeholder, and a name suffix for a second Job."""
    (text,) = re.findall(
        r"<!-- rendered by tests/deploy/test_backfill_job.py -->\n```yaml\n(.*?)```",
        page("docs/backfill.md"),
        re.DOTALL,
    )
    shutil.copytree(ROOT / "k8s", tmp_path / "klaviyo-worker" / "k8s")
    (tmp_path / "customers").mkdir()
    (tmp_path / "customers" / "kustomization.yaml").write_text(text)
    manifests = rendered(tmp_path / "customers")
    assert not [placeholder for placeholder in PLACEHOLDERS if placeholder in manifests]
    objects = by_kind(manifests)
    for document in objects.values():
        validate(document)
        assert document["metadata"]["namespace"] == "klaviyo"
    assert objects["Job"]["metadata"]["name"] in page("docs/backfill.md")
    pod = pod_of(objects)
    assert pod["containers"][0]["args"][1] == "customers"
    assert (
        pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    )
    assert pod["volumes"][0]["secret"]["secretName"] == "klaviyo-worker"


def test_command_of_the_manifest_runs(objects: Objects, sandbox: Sandbox, tmp_path: Path) -> None:
    """The checkpoint and the failures file are on the volume."""
    container = pod_of(objects)["containers"][0]
    mount = container["volumeMounts"][1]["mountPath"]
    arguments = [argument.replace(mount, str(tmp_path)) for argument in container["args"]]
    sandbox.shop.orders = {name: order for name, order in sandbox.shop.orders.items() if order.get("customerEmail")}
    done = CliRunner().invoke(main, arguments, env=objects["ConfigMap"]["data"] | sandbox.environment)
    assert done.exit_code == 0, done.stderr
    checkpoint = Path(container["args"][-1])
    files = {checkpoint.name, checkpoint.with_suffix(".failures.jsonl").name}
    assert {path.name for path in tmp_path.iterdir()} == files
