"""The systemd unit, its settings, and the commands of docs/vm.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adapters.shared.loopback import is_loopback
from tests.deploy import sbom
from tests.support.installed import COMMAND
from worker.cli.options import SECRETS
from worker.errors import ExitCode
from worker.runtime.runner import STALL_TIMEOUT
from worker.setting_sources import load
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd/klaviyo-worker.service"
VERSION = sbom.metadata()["version"]
NEXT = "99.0.0"
ENVIRONMENT = ROOT / "systemd/worker.env"
MAX_EXPOSURE = 12  # accepted by `systemd-analyze security`, in tenths
NAMES = {str(info.validation_alias): name for name, info in Settings.model_fields.items()}
analyzed = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def options(name: str) -> list[str]:
    """Return the values of an option in the unit."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=240, check=False)


@analyzed
def test_systemd_accepts_the_unit_without_warnings(tmp_path: Path) -> None:
    """Systemd only warns about unknown options."""
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/klaviyo-worker/current/bin/klaviyo-worker", str(COMMAND)), encoding="utf-8")
    done = analyze("verify", "--man=no", str(unit))
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


@analyzed
def test_unit_has_a_low_exposure() -> None:
    """An attacker who controls the worker has a network and an empty machine."""
    done = analyze("security", "--offline=yes", "--no-pager", f"--threshold={MAX_EXPOSURE}", str(UNIT))
    assert done.returncode == 0, done.stdout


def test_written_memory_is_not_executable() -> None:
    """The exposure score does not cover this."""
    assert options("MemoryDenyWriteExecute") == ["yes"]


def test_unit_creates_its_user_and_directory() -> None:
    """docs/vm.md creates no user, and the embedded queue needs a directory."""
    assert options("DynamicUser") == ["yes"]
    assert options("StateDirectory") == ["klaviyo-worker"]


def test_secrets_are_credentials() -> None:
    """Each required secret is a credential with the name of its file."""
    required = {alias for alias, name in NAMES.items() if name in SECRETS and Settings.model_fields[name].is_required()}
    assert set(options("LoadCredential")) == {f"{name}:/etc/klaviyo-worker/{name}" for name in required}
    files = {f"{name}_FILE=/run/credentials/%n/{name}" for name in required}
    assert files <= set(options("Environment"))


def test_systemd_waits_longer_than_the_worker() -> None:
    """A stop is never cut short; exit code 2 is not restarted, because a restart cannot fix it."""
    (stop,), (prevented,), (watchdog,) = map(options, ("TimeoutStopSec", "RestartPreventExitStatus", "WatchdogSec"))
    assert int(stop) > Settings.model_fields["shutdown_grace_period"].default
    assert int(prevented) == ExitCode.USAGE
    assert f"hangs for {STALL_TIMEOUT:.0f} s, the worker stops notifying" in UNIT.read_text(encoding="utf-8")
    page = " ".join((ROOT / "docs/vm.md").read_text(encoding="utf-8").split())
    assert f"has not run for {STALL_TIMEOUT:.0f} s | gets no notification for another {watchdog} s" in page
    assert f"still runs after {stop} s" in page


def example_settings() -> dict[str, str]:
    """Return the settings of the example, including those that are commented out."""
    return dict(re.findall(r"^#?([A-Z_]+)=(.*)$", ENVIRONMENT.read_text(encoding="utf-8"), re.MULTILINE))


def test_example_is_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the two secrets, the worker starts, even with all optional settings."""
    for name, value in example_settings().items():
        monkeypatch.setenv(name, value)
    for name, secret in {"CT_API_CLIENT": '{"clientId": "id", "secret": "secret"}', "KLAVIYO_AUTH_KEY": "pk_1"}.items():
        (tmp_path / name).write_text(secret, encoding="utf-8")
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / name))
    settings = load(Settings, {})
    assert not is_loopback(settings.ct_api_url)
    assert set(example_settings()) <= set(NAMES)
    assert {NAMES[name] for name in example_settings()}.isdisjoint(SECRETS)
    commented = set(re.findall(r"^#([A-Z_]+)=", ENVIRONMENT.read_text(encoding="utf-8"), re.MULTILINE))
    assert not any(Settings.model_fields[NAMES[name]].is_required() for name in commented)


def test_service_can_read_the_files_of_the_example() -> None:
    """It cannot read /etc/klaviyo-worker: the mapping is a credential too."""
    assert not [name for name, value in example_settings().items() if value.startswith("/etc/klaviyo-worker/")]
    page = (ROOT / "docs/vm.md").read_text(encoding="utf-8")
    given = dict(re.findall(r"^LoadCredential=(\S+?):/etc/klaviyo-worker/(\S+)$", page, re.MULTILINE))
    files = dict(re.findall(r"^Environment=(\S+)=/run/credentials/%n/(\S+)$", page, re.MULTILINE))
    assert set(files.values()) == set(given)
    assert given[files["KLAVIYO_WORKER_CONFIG"]] == "mapping.toml"


def test_shells_and_systemd_parse_the_example_equally(tmp_path: Path) -> None:
    """No value needs quotes, which they would interpret differently."""
    everything = tmp_path / "worker.env"
    everything.write_text("".join(f"{name}={value}\n" for name, value in example_settings().items()), encoding="utf-8")
    done = subprocess.run(["bash", "-c", f". {everything}; declare -p"], capture_output=True, text=True, check=True)
    for name, value in example_settings().items():
        assert re.search(rf'^declare \S+ {name}="{re.escape(value)}"$', done.stdout, re.MULTILINE)
        assert not set(value) & set("'\"\\`$&;|<> ")


def block(name: str) -> str:
    """Return the commands of docs/vm.md with this name."""
    page = (ROOT / "docs/vm.md").read_text(encoding="utf-8")
    (commands,) = re.findall(rf"test_systemd.py: {name} -->\n```console\n(.*?)```", page, re.DOTALL)
    return "\n".join(line.removeprefix("$ ") for line in commands.splitlines())


class Machine:
    """A scratch directory in which the commands of docs/vm.md run, with fakes of systemctl, python3 and pip.

    The fake pip links to the command under test, because a real installation takes half a minute.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        (directory / "etc/systemd/system").mkdir(parents=True)
        pip = f'echo "pip $*" >> {self.calls}; [ "$2" != --no-deps ] || ln -s {COMMAND} "${{0%/*}}/klaviyo-worker"'
        make_venv = f'[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && cp {directory}/bin/pip "$3/bin/pip"'
        self._script("pip", pip)
        self._script("python3", make_venv)
        self._script("systemctl", f'echo "systemctl $*" >> {self.calls}')

    def _script(self, name: str, text: str) -> None:
        script = self.directory / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        script.chmod(0o755)

    def run(self, commands: str) -> str:
        """Run the commands in a checkout until one fails."""
        for place in ("/opt/", "/etc/"):
            commands = commands.replace(place, f"{self.directory}{place}")
        environment = {"PATH": f"{self.directory}/bin:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=ROOT, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{done.stdout.decode()}{done.stderr.decode()}"
        return done.stdout.decode()

    def configure(self, sandbox: Sandbox) -> None:
        """Edit the files that the commands created."""
        etc = self.directory / "etc/klaviyo-worker"
        assert {path.name: oct(path.stat().st_mode)[-3:] for path in (etc, *etc.iterdir())} == {
            "klaviyo-worker": "700",
            "worker.env": "600",
            "CT_API_CLIENT": "600",
            "KLAVIYO_AUTH_KEY": "600",
        }
        values = sandbox.environment | {"QUEUE_URL": f"embedded://{self.directory}/queue.db"}
        for name in ("CT_API_CLIENT", "KLAVIYO_AUTH_KEY"):
            (etc / name).write_text(values.pop(name), encoding="utf-8")
        with (etc / "worker.env").open("a", encoding="utf-8") as settings:
            settings.writelines(f"{name}={value}\n" for name, value in values.items())

    def version(self, link: str) -> str:
        return (self.directory / "opt/klaviyo-worker" / link).readlink().name


def test_install_upgrade_and_rollback(tmp_path: Path, sandbox: Sandbox) -> None:
    """These are the commands of docs/vm.md; each version has its own unit."""
    machine = Machine(tmp_path)
    machine.run(block("install") + "\n" + block("configure"))
    machine.configure(sandbox)
    shown = machine.run(f"VERSION={VERSION}\n" + block("check") + "\n" + block("start"))
    assert re.findall(r"^\w+", shown, re.MULTILINE) == [*["OK"] * 4, "SKIP", "OK"]
    assert machine.version("current") == VERSION
    installed = tmp_path / "etc/systemd/system/klaviyo-worker.service"
    assert installed.read_bytes() == UNIT.read_bytes()

    old = tmp_path / f"opt/klaviyo-worker/{VERSION}/klaviyo-worker.service"
    old.write_text("the unit of the old version", encoding="utf-8")
    new = block("install").replace(f"VERSION={VERSION}", f"VERSION={NEXT}")
    machine.run("\n".join((new, block("check"), block("upgrade"))))
    assert (machine.version("current"), machine.version("previous")) == (NEXT, VERSION)
    assert installed.read_bytes() == UNIT.read_bytes()

    machine.run(block("rollback"))
    assert machine.version("current") == VERSION
    assert installed.read_text(encoding="utf-8") == "the unit of the old version"
    install = ["pip install --require-hashes -r requirements.lock", "pip install --no-deps ."]
    restart = ["systemctl daemon-reload", "systemctl restart klaviyo-worker"]
    assert machine.calls.read_text(encoding="utf-8").splitlines() == [
        *install,
        "systemctl daemon-reload",
        "systemctl enable --now klaviyo-worker",
        *install,
        *restart,
        *restart,
    ]
