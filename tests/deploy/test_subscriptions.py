"""docs/subscriptions.md: the commands, the request that creates the subscription, and every destination."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import pytest
from click.testing import CliRunner
from commercetools.platform.models import SubscriptionDraft

from tests.deploy import subscribed
from tests.deploy.pages import commands, page
from tests.support.requirements import require_command
from worker.cli import main
from worker.commands.subscriptions.destination import parse
from worker.mapping import MappingConfig
from worker.sandbox import Sandbox
from worker.transform import HANDLERS, enabled_handlers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MARK = "run by tests/deploy/test_subscriptions.py"
PAGE = page("docs/subscriptions.md")
SHOWN = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
ROWS = re.findall(r"^\| .* \| `(\S+)`.* \| `(\{.*?\})`", PAGE, re.MULTILINE)
DESTINATIONS = [json.loads(text) for _, text in ROWS]


def test_every_handler_receives_its_notifications() -> None:
    """Two are different: the deletion of a product is a message, and one change has no handler."""
    messages = {entry["resourceTypeId"]: entry["types"] for entry in SHOWN["messages"]}
    received = subscribed.delivered(messages, [entry["resourceTypeId"] for entry in SHOWN["changes"]])
    enabled = {(handler.resource_type, handler.type) for handler in enabled_handlers(MappingConfig())}
    assert enabled - received == {("product", "ResourceDeleted")}
    assert ("product", "ProductDeleted") in received
    assert received - set(HANDLERS) == {("inventory-entry", "ResourceDeleted")}


@pytest.mark.parametrize("destination", DESTINATIONS, ids=[entry["type"] for entry in DESTINATIONS])
def test_commercetools_sdk_parses_the_request(destination: dict[str, Any]) -> None:
    """It drops unknown fields, and rejects resource types without subscriptions."""
    body = SHOWN | {"destination": destination}
    assert SubscriptionDraft.deserialize(body).serialize() == body


@pytest.mark.parametrize(("url", "shown"), ROWS, ids=[json.loads(text)["type"] for _, text in ROWS])
def test_destination_url_matches_the_json_next_to_it(url: str, shown: str) -> None:
    """The secret comes from its own setting."""
    fields = json.loads(shown)
    assert parse(url, fields.get("connectionString") or fields.get("accessKey") or "").fields == fields


def test_commands_print_the_documented_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The project has no subscriptions."""
    (block,) = re.findall(r"<!-- compared by [^>]*>\n```console\n(.*?)```", PAGE, re.DOTALL)
    with Sandbox() as sandbox:
        for name, value in (sandbox.environment | {"CT_SCOPE": ""}).items():
            monkeypatch.setenv(name, value)
        for shown in block.removeprefix("$ ").split("\n$ "):
            command, _, output = shown.partition("\n")
            whole, _, last = command.partition(" | tail -")
            done = CliRunner().invoke(main, shlex.split(whole)[1:])
            assert (done.exit_code, done.stderr) == (0, "")
            assert done.stdout.splitlines()[-int(last or 0) :] == output.splitlines()


def test_page_has_all_destinations() -> None:
    assert [entry["type"] for entry in DESTINATIONS] == [
        "GoogleCloudPubSub",
        "SQS",
        "SNS",
        "EventBridge",
        "AzureServiceBus",
        "EventGrid",
    ]
    assert DESTINATIONS[0] == SHOWN["destination"]
    for queue in ("sqs.md", "servicebus.md"):
        blocks = re.findall(r"```json\n(.*?)```", page(f"docs/{queue}"), re.DOTALL)
        (shown,) = [entry["destination"] for entry in map(json.loads, blocks) if "destination" in entry]
        assert shown in DESTINATIONS


class FakeCommercetools:
    """A fake of commercetools: issues a token, creates a subscription and returns its health."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.requested_paths: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self._answer(*outer.answer_post(self.path, dict(self.headers), body))

            def do_GET(self) -> None:
                self._answer(*outer.answer_get(self.path, dict(self.headers)))

            def _answer(self, status: int, document: dict[str, Any]) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer_post(self, path: str, headers: dict[str, str], body: str) -> tuple[int, dict[str, Any]]:
        if path == "/oauth/token":
            assert headers["Authorization"] == f"Basic {b64encode(b'admin:s3cret').decode()}"
            assert parse_qs(body) == {"grant_type": ["client_credentials"], "scope": ["manage_subscriptions:my-shop"]}
            return 200, {"access_token": "t0ken"}
        assert (path, headers["Authorization"]) == ("/my-shop/subscriptions", "Bearer t0ken")
        assert headers["Content-Type"] == "application/json"
        self.created.append(json.loads(body))
        return 201, {"id": "17", "version": 1, "status": "Healthy"}

    def answer_get(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
        self.requested_paths.append(path)
        if path.endswith("/health"):
            return 200, {}
        assert headers["Authorization"] == "Bearer t0ken"
        return 200, {"id": "17", "version": 1, "status": "Healthy"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def commercetools() -> Iterator[FakeCommercetools]:
    running = FakeCommercetools()
    yield running
    running.close()


def test_commands_create_the_subscription_and_show_its_health(commercetools: FakeCommercetools, tmp_path: Path) -> None:
    """The variables are those of the page and of the worker."""
    require_command("curl", "jq")
    (tmp_path / "subscription.json").write_text(json.dumps(SHOWN), encoding="utf-8")
    environment = {
        "PATH": os.environ["PATH"],
        "CLIENT_ID": "admin",
        "CLIENT_SECRET": "s3cret",
        "CT_PROJECT_ID": "my-shop",
        "CT_API_URL": commercetools.url,
        "CT_AUTH_URL": commercetools.url,
    }
    script = "\n".join(["set -euo pipefail", *commands("docs/subscriptions.md", MARK)])
    done = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert commercetools.created == [SHOWN]
    assert commercetools.requested_paths[-1] == "/my-shop/subscriptions/17/health"
    assert done.stdout.splitlines()[-1] == "200"
