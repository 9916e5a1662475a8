"""The Job in k8s/backfill: rendered, checked against schemas and rules, and the command in it run."""

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
from tests.integration.commands.test_backfill import signals_are_pytests  # noqa: F401 - a fixture
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


def test_every_object_fits_its_schema(objects: Objects) -> None:
    """Strictly; none has the Deployment's label, by which its Service, policy and disruption budget find pods."""
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


def test_the_pod_is_as_narrow_as_the_worker(objects: Objects) -> None:
    """The same user, image, bounds, variables and secrets; it may write to its volume alone."""
    deployment = by_kind(rendered(ROOT / "k8s" / "overlays" / "pubsub-keda"))["Deployment"]["spec"]["template"]["spec"]
    pod = pod_of(objects)
    (ours,), (theirs,) = pod["containers"], deployment["containers"]
    assert {name: ours[name] for name in ("image", "env", "resources", "securityContext")} == {
        name: theirs[name] for name in ("image", "env", "resources", "securityContext")
    }
    same = ("securityContext", "automountServiceAccountToken", "enableServiceLinks")
    assert [pod[name] for name in same] == [deployment[name] for name in same]
    assert ours["volumeMounts"][0] == theirs["volumeMounts"][0]
    assert pod["volumes"][0] == deployment["volumes"][0]
    assert (
        pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == objects["PersistentVolumeClaim"]["metadata"]["name"]
    )
    assert set(objects["ConfigMap"]["data"]) <= set(NAMES.values()) - SECRET_NAMES
    assert ours["envFrom"] == [{"configMapRef": {"name": objects["ConfigMap"]["metadata"]["name"]}}]
    assert pod["terminationGracePeriodSeconds"] > 25


def test_a_pod_has_a_successor_unless_somebody_must_look(objects: Objects) -> None:
    """Interruptions and crashes are gone on from; what would be the same again ends the Job."""
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


def test_the_documented_kustomization_is_whole(tmp_path: Path) -> None:
    """It gives everything that is a placeholder a value, and names of its own for a second Job."""
    (text,) = re.findall(r"<!-- rendered by [^>]*>\n```yaml\n(.*?)```", page("docs/backfill.md"), re.DOTALL)
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


def test_the_command_runs_as_the_manifest_says(objects: Objects, sandbox: Sandbox, tmp_path: Path) -> None:
    """Its checkpoint and its failures lie on the volume."""
    container = pod_of(objects)["containers"][0]
    mount = container["volumeMounts"][1]["mountPath"]
    arguments = [argument.replace(mount, str(tmp_path)) for argument in container["args"]]
    sandbox.shop.orders = {name: order for name, order in sandbox.shop.orders.items() if order.get("customerEmail")}
    done = CliRunner().invoke(main, arguments, env=objects["ConfigMap"]["data"] | sandbox.environment)
    assert done.exit_code == 0, done.stderr
    checkpoint = Path(container["args"][-1])
    kept = {checkpoint.name, checkpoint.with_suffix(".failures.jsonl").name}
    assert {path.name for path in tmp_path.iterdir()} == kept
