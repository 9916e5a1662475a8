"""The manifests in k8s/: schemas, settings, and a run of the container's command."""

from __future__ import annotations

import re
import shutil
import signal
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from adapters import scheme_of
from tests.acceptance.conftest import Worker, kill_remaining_processes, log_lines  # noqa: F401 - a fixture
from tests.acceptance.test_run import http_get
from tests.deploy.manifests import by_kind, container_of, environment_of, pod_of, rendered, validate
from tests.support.ports import free_port
from tests.support.waiting import wait_for
from worker.cli.options import SECRETS
from worker.sandbox.samples import sample_notifications
from worker.setting_sources import load
from worker.settings import Settings

if TYPE_CHECKING:
    from tests.deploy.manifests import Objects
    from worker.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
OVERLAYS = ("pubsub-hpa", "pubsub-keda", "servicebus-keda", "sqs-keda")
PLACEHOLDERS = ("my-project", "my-shop", "123456789012", "00000000-0000-0000-0000-000000000000")
WORKERS, MESSAGES = 4, 20_000  # docs/kubernetes.md derives both
NAMES = {name: str(info.validation_alias) for name, info in Settings.model_fields.items()}
SECRET_NAMES = {alias for name, alias in NAMES.items() if name in SECRETS}

# KEDA's documented parameters, required and optional. Left out: deprecated ones, and those that read the worker's
# variables, because KEDA does not detect their changes.
SCALERS = {
    "prometheus": (
        {"serverAddress", "query", "threshold"},
        {"activationThreshold", "customHeaders", "ignoreNullValues", "namespace", "queryParameters", "timeout"},
    ),
    "aws-sqs-queue": (
        {"awsRegion"},
        {"activationQueueLength", "awsEndpoint", "queueLength", "queueURL"} | {"scaleOnDelayed", "scaleOnInFlight"},
    ),
    "azure-servicebus": (
        {"namespace"},  # with an identity
        {"activationMessageCount", "cloud", "endpointSuffix", "messageCount", "operation", "queueName"}
        | {"subscriptionName", "topicName", "useRegex"},
    ),
}
# Egress besides DNS and HTTPS: identity services, Service Bus.
EGRESS = {
    "pubsub": {("169.254.169.254/32", 80), ("169.254.169.254/32", 8080)}
    | {("169.254.169.252/32", 987), ("169.254.169.252/32", 988)},
    "sqs": {("169.254.170.23/32", 80), ("fd00:ec2::23/128", 80)},
    "servicebus": {("", 5671)},
}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def objects(overlay: str) -> Objects:
    return by_kind(rendered(ROOT / "k8s" / "overlays" / overlay))


def test_objects_match_their_schemas(objects: Objects) -> None:
    """The check is strict: unknown fields are rejected."""
    for document in objects.values():
        validate(document)


def test_overlay_contains_all_parts(overlay: str, objects: Objects) -> None:
    """All have the same label; the user creates the Secret."""
    scaling = {"ScaledObject", "TriggerAuthentication"} if overlay.endswith("keda") else {"HorizontalPodAutoscaler"}
    parts = {"ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", "ServiceAccount"}
    assert set(objects) == parts | scaling
    for document in objects.values():
        assert document["metadata"]["name"].startswith("klaviyo-worker")
        assert document["metadata"]["labels"] == {"app.kubernetes.io/name": "klaviyo-worker"}
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(rule["labelSelector"]["matchLabels"] for rule in pod_of(objects)["topologySpreadConstraints"]),
    ):
        assert selector == {"app.kubernetes.io/name": "klaviyo-worker"}
        assert selector.items() <= labels.items()


def test_pod_has_minimal_permissions(objects: Objects) -> None:
    pod, container = pod_of(objects), container_of(objects)
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    assert objects["ServiceAccount"]["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)


def test_pod_has_a_memory_limit_and_probes(objects: Objects) -> None:
    """CPU is requested without a limit; the probes use the port that the worker serves."""
    container = container_of(objects)
    resources = container["resources"]
    assert set(resources["limits"]) == {"memory"}
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert "cpu" in resources["requests"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    assert {probe["port"] for probe in probes.values()} == {"metrics"}
    served = Settings.model_fields["http_port"].default
    assert container["ports"] == [{"name": "metrics", "containerPort": served}]
    assert "KLAVIYO_WORKER_HTTP_HOST" not in environment_of(objects)  # the image sets it
    assert objects["Service"]["spec"]["ports"] == [{"name": "metrics", "port": served, "targetPort": "metrics"}]


def test_rollout_has_no_gap_and_leaves_time_to_drain(objects: Objects) -> None:
    """The pod outlives the grace period and an unreachable queue; the autoscaler sets the replicas."""
    spec, pod = objects["Deployment"]["spec"], pod_of(objects)
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    assert "replicas" not in spec
    assert pod["terminationGracePeriodSeconds"] >= Settings.model_fields["shutdown_grace_period"].default + 60
    assert objects["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert {rule["whenUnsatisfiable"] for rule in pod["topologySpreadConstraints"]} == {"ScheduleAnyway"}
    assert container_of(objects)["image"] == f"klaviyo-worker:{version('klaviyo-worker')}"


def test_variables_are_settings(
    overlay: str, objects: Objects, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variable is a valid setting of the worker; secrets are only in files."""
    assert pod_of(objects)["enableServiceLinks"] is False  # their variables, like KLAVIYO_WORKER_PORT, are not settings
    variables = environment_of(objects)
    assert {name.removesuffix("_FILE") for name in variables} <= set(NAMES.values())
    assert not SECRET_NAMES & set(variables)
    for name, value in (variables | secrets_in(tmp_path, objects, sandbox)).items():
        monkeypatch.setenv(name, value)
    assert scheme_of(load(Settings, {}).queue_url) == overlay.partition("-")[0]


def secrets_in(directory: Path, objects: Objects, sandbox: Sandbox) -> dict[str, str]:
    """Write the Secret's files where the manifest mounts them, under `directory`; return their variables."""
    (mount,) = container_of(objects)["volumeMounts"]
    (volume,) = pod_of(objects)["volumes"]
    assert (volume["name"], volume["secret"]["secretName"]) == (mount["name"], "klaviyo-worker")
    assert volume["secret"]["defaultMode"] == 0o440
    assert mount["readOnly"] is True
    moved = {}
    for name, path in environment_of(objects).items():
        if name.endswith("_FILE"):
            key = Path(path).relative_to(mount["mountPath"]).name
            assert f"{key}_FILE" == name
            (directory / key).write_text(sandbox.environment[key] + "\n")
            moved[name] = str(directory / key)
    return moved


def test_scaler_and_worker_use_the_same_queue(objects: Objects) -> None:
    assert_one_queue(objects)


def assert_one_queue(objects: Objects) -> None:
    queue = urlsplit(objects["ConfigMap"]["data"]["QUEUE_URL"])
    name = queue.path.rpartition("/")[2]
    if "HorizontalPodAutoscaler" in objects:
        metric = objects["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["external"]["metric"]
        assert metric["name"] == "pubsub.googleapis.com|subscription|num_undelivered_messages"
        assert metric["selector"]["matchLabels"] == {
            "resource.labels.project_id": queue.netloc,
            "resource.labels.subscription_id": name,
        }
        return
    (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
    metadata = trigger["metadata"]
    if trigger["type"] == "prometheus":
        address = f"https://monitoring.googleapis.com/v1/projects/{queue.netloc}/location/global/prometheus"
        assert metadata["serverAddress"] == address
        assert f'subscription_id="{name}"' in metadata["query"]
        assert metadata["ignoreNullValues"] == "false"
    elif trigger["type"] == "aws-sqs-queue":
        assert metadata["queueURL"] == objects["ConfigMap"]["data"]["QUEUE_URL"]
        assert queue.netloc == f"sqs.{metadata['awsRegion']}.amazonaws.com"
    else:
        assert (f"{metadata['namespace']}.servicebus.windows.net", metadata["queueName"]) == (queue.netloc, name)


def test_scaling_is_slow_and_limited_by_the_account(objects: Objects) -> None:
    if "HorizontalPodAutoscaler" in objects:
        spec = objects["HorizontalPodAutoscaler"]["spec"]
        scaling, bounds = spec["behavior"], (spec["minReplicas"], spec["maxReplicas"])
        target = spec["metrics"][0]["external"]["target"]
        assert target == {"type": "AverageValue", "averageValue": str(MESSAGES)}
    else:
        spec = objects["ScaledObject"]["spec"]
        scaling = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        bounds = spec["minReplicaCount"], spec["maxReplicaCount"]
        metadata = spec["triggers"][0]["metadata"]
        assert str(MESSAGES) in {metadata.get(key) for key in ("threshold", "queueLength", "messageCount")}
    assert spec["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert bounds == (1, WORKERS)
    assert scaling["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert scaling["scaleUp"]["stabilizationWindowSeconds"] >= 60
    (policy,) = scaling["scaleUp"]["policies"]
    assert (policy["type"], policy["value"]) == ("Pods", 1)


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name.endswith("keda")])
def test_triggers_have_documented_parameters(name: str) -> None:
    """The schema does not check them; none is a secret, because KEDA has an identity."""
    objects = by_kind(rendered(ROOT / "k8s" / "overlays" / name))
    (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
    required, optional = SCALERS[trigger["type"]]
    assert required <= set(trigger["metadata"]) <= required | optional
    authentication = objects["TriggerAuthentication"]
    assert trigger["authenticationRef"] == {"name": authentication["metadata"]["name"]}
    provider = {"prometheus": "gcp", "aws-sqs-queue": "aws", "azure-servicebus": "azure-workload"}
    assert authentication["spec"] == {"podIdentity": {"provider": provider[trigger["type"]]}}


def test_pod_on_azure_requests_its_identity() -> None:
    """Without the label, Azure mounts no token."""
    objects = by_kind(rendered(ROOT / "k8s" / "overlays" / "servicebus-keda"))
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["azure.workload.identity/use"] == "true"
    assert list(objects["ServiceAccount"]["metadata"]["annotations"]) == ["azure.workload.identity/client-id"]


def test_network_policy_allows_only_scrapes_and_calls(overlay: str, objects: Objects) -> None:
    policy = objects["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    (ingress,) = policy["ingress"]
    assert ingress["ports"] == [{"port": "metrics", "protocol": "TCP"}]
    assert [list(peer) for peer in ingress["from"]] == [["namespaceSelector"]]
    egress = {
        (peer["ipBlock"]["cidr"] if peer else "", port["port"])
        for rule in policy["egress"]
        for peer in rule.get("to", [None])
        for port in rule["ports"]
    }
    assert egress == {("", 53), ("", 443)} | EGRESS[overlay.partition("-")[0]]


def examples() -> dict[str, str]:
    """Return the kustomizations in docs/kubernetes.md, by their overlay."""
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    texts = re.findall(r"<!-- rendered by [^>]*>\n```yaml\n(.*?)```", page, re.DOTALL)
    return {text.partition("overlays/")[2].split()[0]: text for text in texts}


@pytest.mark.parametrize("name", OVERLAYS)
def test_documented_kustomization_is_complete(name: str, tmp_path: Path) -> None:
    """It is next to the checkout and sets every placeholder."""
    shutil.copytree(ROOT / "k8s", tmp_path / "klaviyo-worker" / "k8s")
    (tmp_path / "deployment").mkdir()
    (tmp_path / "deployment" / "kustomization.yaml").write_text(examples()[name])
    manifests = rendered(tmp_path / "deployment")
    assert not [placeholder for placeholder in PLACEHOLDERS if placeholder in manifests]
    objects = by_kind(manifests)
    for document in objects.values():
        validate(document)
        assert document["metadata"]["namespace"] == "klaviyo"
    assert "/" in container_of(objects)["image"]
    assert_one_queue(objects)
    overlay = rendered(ROOT / "k8s" / "overlays" / name)
    assert any(placeholder in overlay for placeholder in PLACEHOLDERS)


def test_worker_runs_with_the_settings_of_the_manifest(sandbox: Sandbox, tmp_path: Path) -> None:
    """Only the queue and the services differ.

    The home, working and temporary directories stay empty, because the root file system can be read-only.
    """
    objects = by_kind(rendered(ROOT / "k8s" / "overlays" / "pubsub-keda"))
    container, port = container_of(objects), free_port()
    secrets, home = tmp_path / "secrets", tmp_path / "home"
    secrets.mkdir()
    home.mkdir()
    overrides = {name: value for name, value in sandbox.environment.items() if name not in SECRET_NAMES}
    overrides |= {"QUEUE_URL": f"embedded://{tmp_path}/queue.db", "KLAVIYO_WORKER_HTTP_PORT": str(port)}
    overrides |= {"HOME": str(home), "TMPDIR": str(home)}
    worker = Worker(environment_of(objects) | secrets_in(secrets, objects, sandbox) | overrides, home)
    worker.publish(sample_notifications(sandbox.shop)[0].body)
    assert "command" not in container  # that of the image: klaviyo-worker
    process = worker.start(*container["args"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        wait_for(lambda path=container[probe]["httpGet"]["path"]: http_get(port, path)[0] == 200)
    wait_for(lambda: log_lines(worker.log.read_text()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(pod_of(objects)["terminationGracePeriodSeconds"]) == 0
    assert [line["outcome"] for line in log_lines(worker.log.read_text())] == ["sent"]
    assert [path.name for path in home.iterdir()] == [worker.log.name]
