"""Where the code of others comes from: versions, digests and hashes are fixed."""

from __future__ import annotations

import re
import shutil
import subprocess
from configparser import ConfigParser
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy import sbom
from tests.deploy.dockerfile import ROOT
from tests.deploy.hcl import blocks
from tests.deploy.pages import page
from tests.deploy.test_image import LOCKS, locked, requirements

if TYPE_CHECKING:
    from pathlib import Path

DECISION = "docs/decisions/0025-lower-bounds-exclude-vulnerable-versions.md"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BASE = re.compile(r"^ARG PYTHON_IMAGE=(\S+)$", re.MULTILINE)
BOUNDS = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", page(DECISION), re.MULTILINE))


def bounds() -> list[tuple[str, Version]]:
    """Return the lower bound of each requirement of setup.cfg and pyproject.toml that the decision names."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [line for text in setup["options.extras_require"].values() for line in text.split("\n") if line]
    found = [Requirement(line) for line in lines] + [requirement for _, requirement in requirements()]
    named = {canonicalize_name(name) for name in BOUNDS}
    return [
        (canonicalize_name(requirement.name), Version(specifier.version))
        for requirement in found
        if canonicalize_name(requirement.name) in named
        for specifier in requirement.specifier
        if specifier.operator == ">="
    ]


@pytest.mark.parametrize("name", BOUNDS)
def test_lower_bounds_exclude_vulnerable_versions(name: str) -> None:
    """Each bound is at least the one of the decision, and so are the locked versions."""
    found = [version for bound, version in bounds() if bound == canonicalize_name(name)]
    assert found
    assert min(found) >= Version(BOUNDS[name])
    versions = [version for lock in LOCKS if (version := locked(lock).get(canonicalize_name(name)))]
    assert versions
    assert all(Version(version) >= Version(BOUNDS[name]) for version in versions)


def test_base_image_has_a_digest() -> None:
    (base,) = BASE.findall((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert re.fullmatch(r"python:3\.\d+-slim@sha256:[0-9a-f]{64}", base)


@pytest.mark.parametrize("answer", ["sha256:" + "ab" * 32, "<nil>", ""])
def test_make_base_image_replaces_the_digest(answer: str, tmp_path: Path) -> None:
    """It asks for the digest of all platforms. It changes nothing if the answer is not a digest."""
    for name in ("Makefile", "Dockerfile", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path / name)
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\necho "{answer}"\n', encoding="utf-8")
    docker.chmod(0o755)
    before = (tmp_path / "Dockerfile").read_text(encoding="utf-8")
    command = ["make", "--no-print-directory", f"DOCKER={docker}", "base-image"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    after = (tmp_path / "Dockerfile").read_text(encoding="utf-8")
    (base,) = BASE.findall(before)
    tag = base.partition("@")[0]
    calls = (tmp_path / "calls").read_text(encoding="utf-8")
    assert calls == f"buildx imagetools inspect --format {{{{.Manifest.Digest}}}} {tag}\n"
    assert (done.returncode == 0) is answer.startswith("sha256:")
    assert after == (before.replace(base, f"{tag}@{answer}") if done.returncode == 0 else before)


def test_tools_of_the_tests_come_from_locks_with_hashes() -> None:
    """`make demo`, which installs the worker with its bounds for a first look, is the only exception."""
    commands = re.findall(r"(?:\$\(call install,|pip install)([^\n|]*)", MAKEFILE)
    sources = [command for command in commands if "$(1)" not in command]
    exceptions = {"--editable .,klaviyo-worker)", "--no-deps --no-build-isolation --editable .,klaviyo-worker)"}
    assert len(sources) == 5
    assert exceptions < set(sources)
    assert all("--require-hashes" in source for source in set(sources) - exceptions)


@pytest.mark.parametrize("lock", ["requirements-uv.lock", "requirements-proton.lock"])
def test_tools_outside_the_lock_have_hashes(lock: str) -> None:
    assert len(locked(lock)) == 1


def test_npm_runs_no_scripts_and_installs_exact_versions() -> None:
    commands = re.findall(r"npm install (.*?)(?: >|$)", MAKEFILE, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert "--ignore-scripts" in command
        assert re.fullmatch(r"(@\w+/)?[\w-]+@\d+\.\d+\.\d+", command.split()[-1])


def test_terraform_providers_have_exact_versions() -> None:
    """The one of commercetools is from a third party and gets a secret."""
    (providers,) = [block["required_providers"] for block in blocks("terraform")]
    versions = {name: body["version"] for provider in providers for name, body in provider.items()}
    assert set(versions) == {"commercetools", "google"}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())


def test_documents_and_manifests_name_this_version() -> None:
    """A release changes them together (docs/releasing.md)."""
    files = [*ROOT.glob("docs/*.md"), *ROOT.glob("k8s/**/*.yaml")]
    pattern = re.compile(r"(?:klaviyo-worker:|newTag: |\$ VERSION=)(\d+\.\d+\.\d+)")
    named = {version for file in files for version in pattern.findall(file.read_text(encoding="utf-8"))}
    assert named == {sbom.metadata()["version"]}
