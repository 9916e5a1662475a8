"""The manifests in k8s/: rendered, checked against schemas and rules, and the container in them started."""

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
from tests.acceptance.test_run import http_get, wait_for
from tests.deploy.manifests import by_kind, container_of, environment_of, pod_of, rendered, validate
from tests.support.pubsub_emulator import free_port
from worker.cli.options import SECRETS
from worker.sandbox.notifications import sample_notifications
from worker.settings import Settings, load

if TYPE_CHECKING:
    from tests.deploy.manifests import Objects
    from worker.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
OVERLAYS = ("pubsub-hpa", "pubsub-keda", "servicebus-keda", "sqs-keda")
PLACEHOLDERS = ("my-project", "my-shop", "123456789012", "00000000-0000-0000-0000-000000000000")
WORKERS, MESSAGES = 4, 20_000  # docs/kubernetes.md derives both
NAMES = {name: str(info.validation_alias) for name, info in Settings.model_fields.items()}
SECRET_NAMES = {alias for name, alias in NAMES.items() if name in SECRETS}

# What KEDA's documentation names, required and optional; what it deprecates is left out, and what it reads from the
# worker's variables: of those it does not notice a change.
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
# Where a pod may go besides DNS and HTTPS: to who gives it its identity, or to Service Bus.
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


def test_every_object_fits_its_schema(objects: Objects) -> None:
    """Strictly: a field that Kubernetes or KEDA does not know is refused."""
    for document in objects.values():
        validate(document)


def test_what_is_deployed(overlay: str, objects: Objects) -> None:
    """All parts, under one label, and no Secret: that is the user's."""
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


def test_the_pod_has_no_rights_it_does_not_need(objects: Objects) -> None:
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


def test_the_pod_is_bounded_and_probed(objects: Objects) -> None:
    """Memory is bounded, CPU asked for and not bounded; the probes ask the port that the worker serves."""
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


def test_a_roll_out_leaves_no_gap_and_time_to_finish(objects: Objects) -> None:
    """The pod outlives its worker's grace period and a queue that does not answer; the autoscaler owns replicas."""
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
    """Every variable is one that the worker reads, and well-formed; secrets come as files, and from nowhere else."""
    assert pod_of(objects)["enableServiceLinks"] is False  # KLAVIYO_WORKER_PORT and the like are no settings
    variables = environment_of(objects)
    assert {name.removesuffix("_FILE") for name in variables} <= set(NAMES.values())
    assert not SECRET_NAMES & set(variables)
    for name, value in (variables | secrets_in(tmp_path, objects, sandbox)).items():
        monkeypatch.setenv(name, value)
    assert scheme_of(load(Settings, {}).queue_url) == overlay.partition("-")[0]


def secrets_in(directory: Path, objects: Objects, sandbox: Sandbox) -> dict[str, str]:
    """Write the Secret's files where the manifest mounts them, under `directory`; return the variables that say so."""
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


def test_the_scaler_counts_the_queue_that_the_worker_reads(objects: Objects) -> None:
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


def test_pods_are_added_slowly_and_not_beyond_what_an_account_bears(objects: Objects) -> None:
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
def test_triggers_have_the_parameters_that_keda_documents(name: str) -> None:
    """To the schema they are any texts. No secret is among them: KEDA has an identity."""
    objects = by_kind(rendered(ROOT / "k8s" / "overlays" / name))
    (trigger,) = objects["ScaledObject"]["spec"]["triggers"]
    required, optional = SCALERS[trigger["type"]]
    assert required <= set(trigger["metadata"]) <= required | optional
    authentication = objects["TriggerAuthentication"]
    assert trigger["authenticationRef"] == {"name": authentication["metadata"]["name"]}
    provider = {"prometheus": "gcp", "aws-sqs-queue": "aws", "azure-servicebus": "azure-workload"}
    assert authentication["spec"] == {"podIdentity": {"provider": provider[trigger["type"]]}}


def test_azure_gives_the_pod_its_identity() -> None:
    """Of all overlays this one alone has to ask for it; without the label no token is mounted."""
    objects = by_kind(rendered(ROOT / "k8s" / "overlays" / "servicebus-keda"))
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert labels["azure.workload.identity/use"] == "true"
    assert list(objects["ServiceAccount"]["metadata"]["annotations"]) == ["azure.workload.identity/client-id"]


def test_only_scrapes_come_in_and_only_calls_go_out(overlay: str, objects: Objects) -> None:
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
    """Return the kustomizations that docs/kubernetes.md shows, by the overlay they are on top of."""
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    texts = re.findall(r"<!-- rendered by [^>]*>\n```yaml\n(.*?)```", page, re.DOTALL)
    return {text.partition("overlays/")[2].split()[0]: text for text in texts}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_documented_kustomization_is_whole(name: str, tmp_path: Path) -> None:
    """It lies beside the checkout and gives everything that is a placeholder a value."""
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
    below = rendered(ROOT / "k8s" / "overlays" / name)
    assert any(placeholder in below for placeholder in PLACEHOLDERS)


def test_the_container_runs_as_the_manifest_says(sandbox: Sandbox, tmp_path: Path) -> None:
    """Arguments, variables, mounted files, probes and the end are the manifest's; only queue and services are ours.

    Home, working directory and TMPDIR stay empty: the root file system may be read-only.
    """
    objects = by_kind(rendered(ROOT / "k8s" / "overlays" / "pubsub-keda"))
    container, port = container_of(objects), free_port()
    secrets, home = tmp_path / "secrets", tmp_path / "home"
    secrets.mkdir()
    home.mkdir()
    ours = {name: value for name, value in sandbox.environment.items() if name not in SECRET_NAMES}
    ours |= {"QUEUE_URL": f"embedded://{tmp_path}/queue.db", "KLAVIYO_WORKER_HTTP_PORT": str(port)}
    ours |= {"HOME": str(home), "TMPDIR": str(home)}
    worker = Worker(environment_of(objects) | secrets_in(secrets, objects, sandbox) | ours, home)
    worker.publish(sample_notifications(sandbox.shop)[0].body)
    assert "command" not in container  # the image's: klaviyo-worker
    process = worker.start(*container["args"])
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        wait_for(lambda path=container[probe]["httpGet"]["path"]: http_get(port, path)[0] == 200)
    wait_for(lambda: log_lines(worker.log.read_text()))
    process.send_signal(signal.SIGTERM)
    assert process.wait(pod_of(objects)["terminationGracePeriodSeconds"]) == 0
    assert [line["outcome"] for line in log_lines(worker.log.read_text())] == ["sent"]
    assert [path.name for path in home.iterdir()] == [worker.log.name]
