"""`make image-steps`: runs the steps of the Dockerfile's build stage, and then the worker that they installed.

No container engine is needed. The instructions run in a scratch directory with its own absolute paths. This interpreter
replaces the base image. The worker runs as the image's user with a read-only root.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tests.deploy import sbom
from tests.deploy.dockerfile import ROOT, stages
from worker.sandbox import Sandbox
from worker.sandbox.samples import sample_notifications

if TYPE_CHECKING:
    from collections.abc import Mapping

USER = 10001
HOME = "opt/klaviyo-worker"
_ABSOLUTE = re.compile(r"(?<![\w.])/(?=opt/|build\b)")
_UNWANTED = {"pip", "setuptools", "wheel", "pytest"}
_LIST = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
_SEAL = ["unshare", "--mount", "sh", "-ec", 'mount --bind "$0" "$0"; mount -o remount,bind,ro /; exec "$@"']
# dac_read_search, because the interpreter can be in a directory of root.
_AS_USER = f"setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs --inh-caps=-all,+dac_read_search"
_AS_USER += " --ambient-caps=-all,+dac_read_search --bounding-set=-all,+dac_read_search"


def main() -> int:
    """Build, inspect, write the SBOM and run; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="klaviyo-worker-") as temporary:
        scratch = Path(temporary)
        scratch.chmod(0o755)
        build(scratch)
        inspect(scratch / HOME)
        sbom.write(sbom.path())
        click.echo(f"SBOM: {sbom.path().relative_to(ROOT)}")
        click.echo(_run([str(scratch / HOME / "bin/klaviyo-worker"), "demo"], scratch).stdout.splitlines()[-1])
        drain_as_user(scratch)
    return 0


def build(scratch: Path) -> None:
    """Run the instructions of the build stage in `scratch`."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PIP_QUIET": "1"}
    directory = scratch
    for name, value in stages()[0][1:]:
        if name == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(value))
        elif name == "WORKDIR":
            directory = scratch / value.lstrip("/")
            directory.mkdir(parents=True)
        elif name == "COPY":
            copy(value, directory)
        elif name == "RUN":
            command = _ABSOLUTE.sub(f"{scratch}/", value)
            subprocess.run(["/bin/sh", "-ec", command], cwd=directory, env=environment, check=True)
        else:
            raise ValueError(f"the Dockerfile's build stage has {name}: expected ENV, WORKDIR, COPY or RUN")


def copy(value: str, directory: Path) -> None:
    """Copy files into the working directory, or one directory to another."""
    *sources, target = value.split()
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, directory / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, directory / target)


def inspect(home: Path) -> None:
    """Print the installed distributions and their size. Fail if there is an unwanted one."""
    installed = set(_run([str(home / "bin/python"), "-c", _LIST], home).stdout.split())
    assert "klaviyo-worker" in installed
    assert not installed & _UNWANTED, installed & _UNWANTED
    assert not list((home / "bin").glob("pip*"))
    (packages,) = home.glob("lib/python*/site-packages")
    (record,) = packages.glob("klaviyo_worker-*.dist-info/RECORD")
    installed_files = {line.split(",")[0] for line in record.read_text(encoding="utf-8").splitlines()}
    top_level = {name.split("/")[0] for name in installed_files}
    assert top_level == {"..", "adapters", "worker", record.parent.name}, top_level
    assert not source_files() - installed_files, "missing in the wheel: add them to setup.cfg"
    assert list(packages.glob("worker/cli/__pycache__/*.pyc")), "nothing is compiled"
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())
    click.echo(f"{len(installed)} distributions, {size / 1e6:.0f} MB in site-packages.")


def source_files() -> set[str]:
    """Return the paths of all files of the packages, in the repository."""
    found = (path for package in ("adapters", "worker") for path in (ROOT / package).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if path.parent.name != "__pycache__"}


def drain_as_user(scratch: Path) -> None:
    """Publish and drain as the image's user, with a read-only root except for the queue's directory."""
    state = scratch / "state"
    state.mkdir()
    prefix = [*_SEAL, str(state), *_AS_USER.split()]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        click.echo(f"Not run as user {USER} with a read-only root: this requires root, unshare and setpriv.")
        return
    os.chown(state, USER, USER)
    command = [*prefix, str(scratch / HOME / "bin/klaviyo-worker")]
    with Sandbox() as sandbox:
        bodies = [sample.body for sample in sample_notifications(sandbox.shop)]
        environment = sandbox.environment | {"QUEUE_URL": f"embedded://{state}/queue.db", "HOME": "/nowhere"}
        environment |= {"KLAVIYO_WORKER_HTTP_PORT": "0", "KLAVIYO_WORKER_LOG_FORMAT": "json"}
        _run([*command, "publish", "-"], scratch, environment, b"\n".join(bodies) + b"\n")
        log = _run([*command, "run", "--once"], scratch, environment).stderr
        events = len(sandbox.account.events)
    done = sum(json.loads(line)["event"] == "message_processed" for line in log.splitlines())
    assert done == len(bodies), f"{len(bodies)} messages, {done} outcomes"
    assert events
    click.echo(f"As user {USER} with a read-only root: {done} messages, {events} events.")


def _run(
    command: list[str], directory: Path, environment: Mapping[str, str] | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output. Raises RuntimeError if it fails."""
    done = subprocess.run(
        command, cwd=directory, env=environment, input=stdin, capture_output=True, timeout=240, check=False
    )
    output, errors = done.stdout.decode(), done.stderr.decode()
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} exited with {done.returncode}:\n{output}{errors}")
    return subprocess.CompletedProcess(command, 0, output, errors)


if __name__ == "__main__":
    sys.exit(main())
