"""docs/serverless.md: flags, settings, and a worker with the settings of the Cloud Run service."""

from __future__ import annotations

import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.acceptance.conftest import Worker, events_named, log_lines
from tests.acceptance.workload import Workload
from tests.deploy.pages import commands, flags, page
from tests.integration.adapters.test_push import envelope
from tests.support.ports import free_port
from tests.support.waiting import wait_for
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.sandbox import Sandbox

MARK = "flags checked by tests/deploy/test_serverless.py"
PAGE = "docs/serverless.md"
OLDER = {"gcloud run worker-pools": ("gcloud beta run worker-pools", {"--instances": "--scaling"})}
VARIABLES = {str(field.validation_alias) for field in Settings.model_fields.values()}
KILLED_AFTER = 10  # seconds from SIGTERM, on Cloud Run


def _flags_of(start: str) -> dict[str, str]:
    """Return the flags of the only command with this start."""
    (command,) = [command for command in commands(PAGE) if command.startswith(start)]
    return flags(command)


def _pairs(value: str, separator: str = ",") -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in value.split(separator))


SERVICE = _flags_of("gcloud run deploy")
POOL = _flags_of("gcloud run worker-pools deploy")
APP = _flags_of("az containerapp create")
PUSH = _flags_of("gcloud pubsub subscriptions create")


@cache
def _gcloud() -> dict[str, Any]:
    """Return gcloud's static table of commands and flags; running gcloud takes seconds."""
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed")
    names: dict[str, Any] = {}
    table = Path(gcloud).resolve().parents[1] / "data" / "cli" / "gcloud_completions.py"
    exec(compile(table.read_text(encoding="utf-8"), table, "exec"), names)
    tree: dict[str, Any] = names["STATIC_COMPLETION_CLI_TREE"]
    return tree


def _unknown(command: str) -> set[str]:
    """Return the flags that the installed gcloud does not have; for an older gcloud, those of the beta command."""
    old, renamed = next((found for start, found in OLDER.items() if command.startswith(start)), ("", {}))
    node = _node(command) or _node(command.replace("gcloud run worker-pools", old))
    assert node, f"gcloud has no such command: {command}"
    known = {*node["flags"], *_gcloud()["flags"], *(new for new, name in renamed.items() if name in node["flags"])}
    return {name for name in flags(command) if name not in known and name.replace("--no-", "--") not in known}


def _node(command: str) -> dict[str, Any] | None:
    node, (_, *words) = _gcloud(), command.split()
    for word in words:
        if not node["commands"]:
            return node
        if word not in node["commands"]:
            return None
        node = node["commands"][word]
    return node


def test_gcloud_has_every_flag() -> None:
    """The flags are those of the installed gcloud."""
    shown = [command for command in commands(PAGE, MARK) if "gcloud" in command]
    inner = [re.sub(r"^\w+=\$\((.*)\)$", r"\1", command) for command in shown]
    assert len(inner) > 10
    assert {command: _unknown(command) for command in inner if _unknown(command)} == {}


@pytest.mark.parametrize("found", [SERVICE, POOL, APP], ids=["service", "pool", "app"])
def test_variables_are_settings_and_complete(found: dict[str, str]) -> None:
    """Secrets are files."""
    given = _pairs(found["--set-env-vars"]) if "--set-env-vars" in found else _pairs(found["--env-vars"], " ")
    assert {name.removesuffix("_FILE") for name in given} <= VARIABLES | {"AZURE_CLIENT_ID"}
    required = {str(info.validation_alias) for info in Settings.model_fields.values() if info.is_required()}
    secrets = {"CT_API_CLIENT", "KLAVIYO_AUTH_KEY"}
    assert set(given) >= (required - secrets) | {f"{name}_FILE" for name in secrets} | {"QUEUE_URL"}


@pytest.mark.parametrize("found", [SERVICE, POOL], ids=["service", "pool"])
def test_secrets_are_mounted_where_the_worker_reads_them(found: dict[str, str]) -> None:
    """Each has its own directory, as Cloud Run requires, and the name with which it is created."""
    mounted = _pairs(found["--set-secrets"])
    files = {value for name, value in _pairs(found["--set-env-vars"]).items() if name.endswith("_FILE")}
    assert set(mounted) == files
    assert len({Path(name).parent for name in mounted}) == len(mounted)
    created = {command.split()[3] for command in commands(PAGE) if command.startswith("gcloud secrets create")}
    assert {secret.removesuffix(":latest") for secret in mounted.values()} == created


def test_secret_files_are_outside_the_build_directory() -> None:
    """A build uploads the current directory."""
    shown = [flags(command) for command in commands(PAGE) if "secrets create" in command or "secret set" in command]
    files = [found.get("--data-file") or found["--file"] for found in shown]
    assert len(files) == 4
    assert all(name.startswith("../") for name in files)


def test_container_apps_secrets_have_the_names_of_the_files() -> None:
    """All are mounted in one directory, and a name has at most 20 characters."""
    names = [entry.partition("=")[0] for entry in APP["--secrets"].split()]
    files = {value for name, value in _pairs(APP["--env-vars"], " ").items() if name.endswith("_FILE")}
    assert {f"{APP['--secret-volume-mount']}/{name}" for name in names} == files
    assert max(map(len, names)) <= 20


def test_only_the_pusher_can_call_the_service() -> None:
    """Cloud Run must check the token, because the worker does not; the audience is the URL of the service."""
    assert "--no-allow-unauthenticated" in SERVICE
    assert "audience" not in SERVICE["--set-env-vars"]
    invoker = _flags_of("gcloud run services add-iam-policy-binding")
    assert (invoker["--role"], invoker["--member"]) == ("roles/run.invoker", "serviceAccount:$PUSHER")
    assert PUSH["--push-auth-service-account"] == "$PUSHER"
    assert (PUSH["--push-endpoint"], PUSH["--push-auth-token-audience"]) == ("$URL/", "$URL")


def test_timeouts_and_ports_are_consistent() -> None:
    """Pub/Sub and Cloud Run wait longer than the worker holds a message; the grace period ends before the kill."""
    settings = _pairs(SERVICE["--set-env-vars"])
    hold, deadline = int(settings["KLAVIYO_WORKER_OUTAGE_HOLD"]), int(PUSH["--ack-deadline"])
    assert hold < deadline <= int(SERVICE["--timeout"])
    assert PUSH["--max-delivery-attempts"] == "100"
    assert int(SERVICE["--concurrency"]) <= Settings.model_fields["max_in_flight"].default
    for found in (SERVICE, POOL):
        assert int(_pairs(found["--set-env-vars"])["KLAVIYO_WORKER_SHUTDOWN_GRACE_PERIOD"]) < KILLED_AFTER
    assert int(APP["--termination-grace-period"]) > Settings.model_fields["shutdown_grace_period"].default
    assert settings["QUEUE_URL"].rpartition(":")[2] == SERVICE["--port"]
    probe = _pairs(SERVICE["--liveness-probe"])
    assert probe["httpGet.port"] == str(Settings.model_fields["http_port"].default)


def test_worker_runs_with_the_settings_of_the_cloud_run_service(sandbox: Sandbox, tmp_path: Path) -> None:
    """Cloud Run has checked the token and removed its signature."""
    port, metrics = free_port(), free_port()
    worker = Worker(
        _cloud_run_environment(sandbox, tmp_path, port) | {"KLAVIYO_WORKER_HTTP_PORT": str(metrics)}, tmp_path
    )
    workload = Workload(sandbox, 10)
    process = worker.start("run")
    wait_for(lambda: events_named(worker, "listening"))
    socket.create_connection(("127.0.0.1", port)).close()  # the startup probe
    url = f"http://127.0.0.1:{port}/"
    assert requests.get(url, timeout=60).status_code == 405
    token = {"Authorization": "Bearer eyJhbGciOiJSUzI1NiJ9.e30.SIGNATURE_REMOVED_BY_GOOGLE"}
    with ThreadPoolExecutor(10) as pool:
        push = partial(requests.post, url, headers=token, timeout=30)
        answers = [answer.status_code for answer in pool.map(push, map(envelope, workload.bodies))]
    assert answers == [204] * 10
    probe = _pairs(SERVICE["--liveness-probe"])["httpGet.path"]
    assert requests.get(f"http://127.0.0.1:{metrics}{probe}", timeout=60).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(KILLED_AFTER) == 0
    workload.assert_exactly_once()
    assert {line["outcome"] for line in log_lines(worker.log.read_text())} <= {"sent", "ignored"}


def _cloud_run_environment(sandbox: Sandbox, directory: Path, port: int) -> dict[str, str]:
    """Return the documented environment, with the sandbox as both services and files under `directory`."""
    given = _pairs(SERVICE["--set-env-vars"])
    given["QUEUE_URL"] = given["QUEUE_URL"].replace(SERVICE["--port"], str(port))
    for name in ("CT_API_CLIENT", "KLAVIYO_AUTH_KEY"):
        file = directory / given[f"{name}_FILE"].lstrip("/")
        file.parent.mkdir(parents=True)
        file.write_text(f"{sandbox.environment[name]}\n", encoding="utf-8")
        given[f"{name}_FILE"] = str(file)
    services = ("CT_API_URL", "CT_AUTH_URL", "CT_PROJECT_ID", "KLAVIYO_API_URL")
    return given | {name: sandbox.environment[name] for name in services}


def test_lambda_template_matches_the_commands() -> None:
    """The handler exists."""
    _, _, template = page("docs/sqs.md").partition("AWS::Serverless::Function")
    template_values = dict(re.findall(r"^ +(\w+): (\S.*)$", template, re.MULTILINE))
    (function,) = [flags(command) for command in commands("docs/sqs.md") if "create-function" in command]
    (source,) = [flags(command) for command in commands("docs/sqs.md") if "create-event-source-mapping" in command]
    shown = {
        "Handler": function["--handler"],
        "Runtime": function["--runtime"],
        "Timeout": function["--timeout"],
        "MemorySize": function["--memory-size"],
        "BatchSize": source["--batch-size"],
        "MaximumBatchingWindowInSeconds": source["--maximum-batching-window-in-seconds"],
        "ScalingConfig": "{" + source["--scaling-config"].replace("=", ": ") + "}",
        "FunctionResponseTypes": f"[{source['--function-response-types']}]",
    }
    assert {name: template_values[name] for name in shown} == shown
    (visibility,) = re.findall(r'"VisibilityTimeout": "(\d+)"', page("docs/sqs.md"))
    assert int(visibility) >= 6 * int(function["--timeout"])  # AWS requires it
    (permissions,) = [command for command in commands("docs/sqs.md") if command.startswith("MAY=")]
    assert set(re.findall(r"sqs:\w+", permissions)) == {
        "sqs:ReceiveMessage",
        "sqs:DeleteMessage",
        "sqs:GetQueueAttributes",
    }
    module, _, name = function["--handler"].rpartition(".")
    assert callable(getattr(import_module(module), name))
