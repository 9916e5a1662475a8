"""The software bill of materials (SBOM) of the image, in CycloneDX's JSON format."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from configparser import ConfigParser
from typing import TYPE_CHECKING

from tests.deploy.dockerfile import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SPECIFICATION = "1.6"  # read by all current scanners


def path() -> Path:
    """Return the file that a release publishes beside the wheel."""
    found = metadata()
    return ROOT / "dist" / f"{found['name']}-{found['version']}.cdx.json"


def write(target: Path) -> None:
    """Write the SBOM: the worker, and each distribution of requirements.lock with its version and hashes.

    It does not depend on this interpreter, and two runs write the same file. cyclonedx-py validates it against the
    schema. Raises CalledProcessError if it is invalid.
    """
    target.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as project:
        lines = [f'{key} = "{metadata()[key]}"' for key in ("name", "version", "description", "license")]
        project.write("\n".join(["[project]", *lines, ""]))
        project.flush()
        command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--pyproject", project.name, "--validate"]
        command += ["--output-reproducible", "--spec-version", SPECIFICATION, "--output-file", str(target)]
        subprocess.run([*command, "requirements.lock"], cwd=ROOT, check=True, capture_output=True)


def metadata() -> dict[str, str]:
    """Return the metadata of setup.cfg, which cyclonedx-py does not read."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return dict(setup["metadata"])
