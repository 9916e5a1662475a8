"""The locks and the Dockerfile. `make image-steps` runs the steps of the image."""

from __future__ import annotations

import json
import re
import tomllib
from configparser import ConfigParser

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.dockerfile import ROOT, stages
from tests.deploy.pages import page
from worker.health.access import ALL_INTERFACES

LOCKS = ("requirements.lock", "requirements-dev.lock")
_ENTRY = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; [^\\]+)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")
_INSTALLED = re.compile(r"'klaviyo-worker\[([\w,]+)\]'")


def locked(name: str) -> dict[str, str]:
    """Return the version of each distribution in a lock."""
    return {distribution: version for distribution, version, _ in _ENTRY.findall(page(name))}


LOCKED = [
    (name, version, re.findall(r"sha256:([0-9a-f]{64})", hashes))
    for name, version, hashes in _ENTRY.findall(page("requirements.lock"))
]
"""Each distribution of the image: name, version, SHA-256 hashes of its files."""


def extras() -> list[str]:
    """Return the extras in the image."""
    build, _ = stages()
    (names,) = _INSTALLED.findall(build[-1].value)
    return str(names).split(",")


def requirements() -> list[tuple[str, Requirement]]:
    """Return the requirements that each lock must satisfy."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    optional = setup["options.extras_require"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    image = "\n".join([*(optional[extra] for extra in extras()), *project["build-system"]["requires"]])
    texts = {"requirements.lock": image, "requirements-dev.lock": optional["dev"]}
    shared = setup["options"]["install_requires"]
    lines = [(name, line) for name, text in texts.items() for line in f"{shared}\n{text}".split("\n") if line]
    return [(name, Requirement(line)) for name, line in lines]


@pytest.mark.parametrize(("name", "requirement"), requirements(), ids=str)
def test_lock_satisfies_the_requirements(name: str, requirement: Requirement) -> None:
    """After a change of a requirement, `make lock` must be run."""
    version = locked(name).get(canonicalize_name(requirement.name))
    assert version, "missing: run make lock"
    assert requirement.specifier.contains(version), "another version: run make lock"


def test_locks_agree() -> None:
    """The tests run with the versions that the image has."""
    image, dev = map(locked, LOCKS)
    assert {name: dev[name] for name in image.keys() & dev} == {name: image[name] for name in image.keys() & dev}


@pytest.mark.parametrize("name", LOCKS)
def test_lock_contains_only_versions_and_hashes(name: str) -> None:
    """It names no index, path or link: the installer chooses the source, and the hashes verify the content."""
    rest = _ENTRY.sub("", page(name)).splitlines()
    assert len(locked(name)) > 50
    assert [line for line in rest if not line.lstrip().startswith("#")] == []
    assert "/" not in page(name)


def test_image_contains_the_clients_of_all_queues() -> None:
    assert sorted(extras()) == ["push", "servicebus", "sqs"]


def test_build_context_contains_only_copied_files() -> None:
    """.dockerignore excludes tests, documents and secrets."""
    build, _ = stages()
    copied = [source for name, value in build if name == "COPY" for source in value.split()[:-1]]
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns == ["*", *(f"!{source}" for source in copied), "**/__pycache__"]


def test_source_changes_do_not_reinstall_dependencies() -> None:
    """The layers of the dependencies come first."""
    build, _ = stages()
    steps = [value for name, value in build if name in {"COPY", "RUN"}]
    dependencies = [place for place, step in enumerate(steps) if "--requirement requirements.lock" in step]
    assert steps[0] == "requirements.lock ./"
    assert dependencies == [1, 2]


def test_dependencies_are_verified_by_hash_and_nothing_else_is_downloaded() -> None:
    build, _ = stages()
    commands = [part for name, value in build if name == "RUN" for part in value.split("&& ")]
    installing = [command for command in commands if re.match(r"pip .*\b(wheel|install)\b", command)]
    assert "--require-hashes" in installing[0]
    assert ["--no-index" in command for command in installing[1:]] == [True] * 3


def test_final_stage_runs_as_a_numeric_user() -> None:
    """Kubernetes requires a number to verify a non-root user; the exec form forwards SIGTERM."""
    build, final = stages()
    assert build[0].value == "${PYTHON_IMAGE} AS build"
    assert final[0].value == "${PYTHON_IMAGE}"
    found = dict(final)
    assert [value for name, value in final if name == "COPY"] == [
        "--from=build /opt/klaviyo-worker /opt/klaviyo-worker"
    ]
    assert found["USER"] == "10001:10001"
    assert json.loads(found["ENTRYPOINT"]) == ["klaviyo-worker"]
    assert json.loads(found["CMD"]) == ["run"]
    assert found["EXPOSE"] == "9090"
    assert not any("pip" in value for name, value in final if name == "RUN")
    assert {"PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1"} <= set(found["ENV"].split())


def test_http_port_is_open_to_probes_and_scrapes() -> None:
    """They come from outside the container, over IPv4 and IPv6."""
    _, final = stages()
    assert f"KLAVIYO_WORKER_HTTP_HOST={ALL_INTERFACES}" in dict(final)["ENV"].split()


def test_make_image_sets_the_labels() -> None:
    """An image has labels with its version, its commit and its build time."""
    _, final = stages()
    arguments = [value.split("=")[0] for name, value in final if name == "ARG"]
    assert arguments == ["VERSION", "REVISION", "CREATED"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        assert f'image.{argument.lower()}="${{{argument}}}"' in dict(final)["LABEL"]
        assert f"--build-arg {argument}=" in makefile
