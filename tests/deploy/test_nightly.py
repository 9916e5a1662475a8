"""The nightly backfill of the products: the CronJob of k8s/nightly, and the systemd timer."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from tests.deploy.manifests import by_kind, rendered, validate
from tests.deploy.pages import ROOT, page
from tests.deploy.test_systemd import Machine, analyze, analyzed, block
from tests.integration.commands.test_backfill import keep_pytest_signal_handlers  # noqa: F401 - a fixture
from tests.support.installed import COMMAND
from worker.cli import main

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploy.manifests import Objects
    from worker.sandbox import Sandbox

FOLDER, UNITS = ROOT / "k8s" / "nightly", ROOT / "systemd"
SERVICE, TIMER = UNITS / "klaviyo-worker-nightly.service", UNITS / "klaviyo-worker-nightly.timer"


@pytest.fixture
def objects() -> Objects:
    return by_kind(rendered(FOLDER))


def job_of(objects: Objects) -> dict[str, Any]:
    job: dict[str, Any] = objects["CronJob"]["spec"]["jobTemplate"]["spec"]
    return job


def test_objects_match_their_schemas(objects: Objects) -> None:
    """Two runs never overlap, and a missed night is made up for an hour."""
    assert set(objects) == {"CronJob", "ConfigMap", "NetworkPolicy"}
    labels = {"app.kubernetes.io/name": "klaviyo-worker-nightly"}
    for document in objects.values():
        validate(document)
        assert document["metadata"]["labels"] == labels
    assert job_of(objects)["template"]["metadata"]["labels"] == labels
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    spec = objects["CronJob"]["spec"]
    assert (spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == ("Forbid", 3600)
    assert re.fullmatch(r"\d+ \d+ \* \* \*", spec["schedule"])


def test_job_is_the_one_of_a_backfill_without_a_volume(objects: Objects) -> None:
    """Permissions, settings, exit codes and resources are the same."""
    job, backfill = job_of(objects), by_kind(rendered(ROOT / "k8s" / "backfill"))["Job"]["spec"]
    (container,), (other,) = job["template"]["spec"]["containers"], backfill["template"]["spec"]["containers"]
    same = ("image", "env", "resources", "securityContext")
    assert [container[name] for name in same] == [other[name] for name in same]
    assert container["volumeMounts"] == other["volumeMounts"][:1]
    pod, other_pod = job["template"]["spec"], backfill["template"]["spec"]
    different = ("containers", "volumes")
    assert {k: v for k, v in pod.items() if k not in different} == {
        k: v for k, v in other_pod.items() if k not in different
    }
    assert pod["volumes"] == other_pod["volumes"][:1]
    assert container["envFrom"] == [{"configMapRef": {"name": objects["ConfigMap"]["metadata"]["name"]}}]
    codes = [spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] for spec in (job, backfill)]
    assert codes[0] == codes[1]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]


def test_commands_send_the_products(objects: Objects, sandbox: Sandbox) -> None:
    """Kubernetes and systemd run the same command."""
    (container,) = job_of(objects)["template"]["spec"]["containers"]
    (command,) = re.findall(r"^ExecStart=\S+/klaviyo-worker (.*)$", SERVICE.read_text(encoding="utf-8"), re.MULTILINE)
    assert command.split() == container["args"]
    done = CliRunner().invoke(main, container["args"], env=objects["ConfigMap"]["data"] | sandbox.environment)
    assert done.exit_code == 0, done.stderr
    assert set(sandbox.account.items) == set(sandbox.shop.products)


def test_documented_kustomization_is_complete(tmp_path: Path) -> None:
    """It sets every placeholder."""
    (text,) = re.findall(
        r"<!-- rendered by tests/deploy/test_nightly.py -->\n```yaml\n(.*?)```", page("docs/backfill.md"), re.DOTALL
    )
    shutil.copytree(ROOT / "k8s", tmp_path / "klaviyo-worker" / "k8s")
    (tmp_path / "nightly").mkdir()
    (tmp_path / "nightly" / "kustomization.yaml").write_text(text)
    objects = by_kind(rendered(tmp_path / "nightly"))
    for document in objects.values():
        validate(document)
        assert document["metadata"]["namespace"] == "klaviyo"
    assert "my-shop" not in rendered(tmp_path / "nightly")


@analyzed
def test_systemd_accepts_the_units_without_warnings(tmp_path: Path) -> None:
    """Systemd only warns about unknown options."""
    text = SERVICE.read_text(encoding="utf-8")
    service = text.replace("/opt/klaviyo-worker/current/bin/klaviyo-worker", str(COMMAND))
    (tmp_path / SERVICE.name).write_text(service, encoding="utf-8")
    shutil.copy(TIMER, tmp_path)
    done = analyze("verify", "--man=no", str(tmp_path / SERVICE.name), str(tmp_path / TIMER.name))
    assert (done.returncode, [line for line in done.stderr.splitlines() if "nightly" in line]) == (0, [])


def test_service_has_the_secrets_and_the_restrictions_of_the_worker() -> None:
    """Nothing is written, so there is no directory for states."""
    kept = re.compile(r"^(?:LoadCredential|Environment(?:File)?|DynamicUser|UMask|[A-Z]\w*(?:=.*)?)=?.*$", re.MULTILINE)
    worker, nightly = (
        set(kept.findall(path.read_text(encoding="utf-8"))) for path in (UNITS / "klaviyo-worker.service", SERVICE)
    )
    of_the_queue = ("Type=", "NotifyAccess=", "Watchdog", "Restart=", "RestartSec=", "RestartPrevent", "LogRateLimit")
    left_out = (*of_the_queue, "StartLimit", "Description=", "ExecStart=", "User=", "StateDirectory", "WantedBy=")
    missing = worker - nightly
    assert not [line for line in missing if not line.startswith((*left_out, "Environment=PYTHONFAULTHANDLER"))]


def test_commands_of_the_page_enable_the_timer(tmp_path: Path) -> None:
    """They copy both units."""
    machine = Machine(tmp_path)
    machine.run(block("nightly"))
    installed = tmp_path / "etc/systemd/system"
    assert (installed / SERVICE.name).read_bytes() == SERVICE.read_bytes()
    assert (installed / TIMER.name).read_bytes() == TIMER.read_bytes()
    assert machine.calls.read_text(encoding="utf-8").splitlines()[-1].endswith(f"enable --now {TIMER.name}")


def test_timer_starts_the_service_every_night() -> None:
    """A timer starts the service with its own name."""
    (moment,) = re.findall(r"^OnCalendar=(.*)$", TIMER.read_text(encoding="utf-8"), re.MULTILINE)
    assert TIMER.stem == SERVICE.stem
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "calendar", moment], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
