"""`klaviyo-worker subscriptions` against a third-party mock of commercetools.

`make ct-mock` installs it: https://github.com/labd/commercetools-node-mock. It has no /health, and setKey is its only
update action.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tests.support.ports import free_port
from worker.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

PLACE = Path(sys.prefix) / "commercetools-mock"
TOPIC = "pubsub://my-project/klaviyo-worker"
SERVE = """
import { CommercetoolsMock } from "@labdigital/commercetools-mock";
const mock = new CommercetoolsMock({ enableAuthentication: true, defaultProjectKey: "my-shop", silent: true });
await mock.runServer(%d);
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Return the URL of the mock."""
    if not (PLACE / "node_modules").is_dir() or shutil.which("node") is None:
        pytest.skip("not installed: make ct-mock, which takes npm")
    port = free_port()
    process = subprocess.Popen(["node", "--input-type=module", "--eval", SERVE % port], cwd=PLACE)
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("the mock does not listen")


def run(url: str, *arguments: str) -> Result:
    environment = {
        "CT_API_URL": url,
        "CT_AUTH_URL": url,
        "CT_PROJECT_ID": "my-shop",
        "CT_API_CLIENT": '{"clientId": "admin", "secret": "s3cret"}',
        "CT_SCOPE": "",
    }
    return CliRunner().invoke(main, ["subscriptions", *arguments, "--destination", TOPIC], env=environment)


def test_subscription_is_created_once(url: str) -> None:
    """A service that does not report the health of a subscription is accepted."""
    assert run(url, "plan").stdout.startswith("+ create subscription klaviyo-worker\n")
    done = run(url, "apply")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.endswith("applied: version 1; this commercetools does not report health\n")
    assert run(url, "apply").stdout.startswith("= subscription klaviyo-worker is up to date\n")


def test_stale_subscriptions_are_deleted(url: str) -> None:
    """The request has the version of the subscription."""
    run(url, "apply", "--key", "old")
    done = run(url, "apply", "--key", "new", "--delete-stale", "--yes")
    assert done.exit_code == 0
    assert "stale deleted" in done.stdout
    assert not [line for line in run(url, "plan", "--key", "new").stdout.splitlines() if line.startswith("- stale")]


def test_rejected_update_reports_the_reason(url: str) -> None:
    """The mock cannot change a destination."""
    run(url, "apply", "--key", "renewed")
    done = run(url, "apply", "--key", "renewed", "--renew")
    assert done.exit_code == 4
    assert "400 InvalidInput for subscriptions: Invalid action changeDestination" in done.stderr
