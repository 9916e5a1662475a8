"""Rendering, validating and reading of Kubernetes manifests."""

from __future__ import annotations

import subprocess
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml

from tests.support.requirements import require_command

if TYPE_CHECKING:
    from pathlib import Path

OLDEST_KUBERNETES = "1.31"
Objects = dict[str, Any]  # by kind; each kind occurs once


@cache
def rendered(directory: Path) -> str:
    require_command("kubectl")
    done = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_kind(manifests: str) -> Objects:
    documents = list(yaml.safe_load_all(manifests))
    objects = {document["kind"]: document for document in documents}
    assert len(objects) == len(documents)
    return objects


@cache
def keda_schema(kind: str) -> dict[str, Any]:
    """Return KEDA's schema. It rejects unknown fields, as `kubectl apply` does."""
    from cloudcoil.models.keda import v1alpha1  # takes a second

    schema: dict[str, Any] = getattr(v1alpha1, kind).model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        if "properties" in definition:
            definition["additionalProperties"] = False
    return schema


def validate(document: dict[str, Any]) -> None:
    """Check a manifest against the schemas of the oldest supported Kubernetes and of the newest one."""
    import jsonschema  # both take seconds
    import kubernetes_validate

    if document["apiVersion"].startswith("keda.sh/"):
        jsonschema.validate(document, keda_schema(document["kind"]))
        return
    for release in (OLDEST_KUBERNETES, kubernetes_validate.latest_version()):
        kubernetes_validate.validate(document, release, strict=True)


def pod_of(objects: Objects) -> dict[str, Any]:
    pod: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return pod


def container_of(objects: Objects) -> dict[str, Any]:
    (container,) = pod_of(objects)["containers"]
    return dict(container)


def environment_of(objects: Objects) -> dict[str, str]:
    """Return the container's environment variables."""
    container, settings = container_of(objects), objects["ConfigMap"]
    assert container["envFrom"] == [{"configMapRef": {"name": settings["metadata"]["name"]}}]
    data: dict[str, str] = settings["data"]
    return data | {entry["name"]: entry["value"] for entry in container["env"]}
