"""The common mistakes in docs/check.md, with the line that `check` prints for each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from tests.support import sqs_fakes as sqs
from tests.support.company_proxy import Authority, CompanyProxy
from tests.support.pubsub_emulator import Subscription

if TYPE_CHECKING:
    from tests.acceptance.conftest import Worker
    from tests.support.pubsub_emulator import Emulator
    from worker.sandbox import Sandbox

PAGE = Path(__file__).parents[2] / "docs" / "check.md"
CLIENT = '{"clientId": "…", "secret": "…"}'
EU, US = "europe-west1.gcp.commercetools.com", "us-central1.gcp.commercetools.com"


_NUMBERS = re.compile(r"\d+ of \d+ handlers")


def documented(mistake: str) -> str:
    """Return the line that the page has for a mistake, with the project and the number of handlers of the tests."""
    page = PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(mistake)} \| `(.*)` \|$", page, re.MULTILINE)
    assert found, f"docs/check.md has no row for: {mistake}"
    return _NUMBERS.sub("N handlers", found[1]).replace("my-shop", "sandbox-shop")


def line_of(worker: Worker, check: str, **environment: str) -> str:
    """Return the line of a check, with one blank between its parts."""
    done = worker("check", "--retry-timeout", "0", env=environment)
    (line,) = (line for line in done.stdout.splitlines() if line.split()[1] == check)
    assert "Traceback" not in done.stdout + done.stderr
    return _NUMBERS.sub("N handlers", " ".join(line.split()))


@pytest.mark.parametrize(
    ("mistake", "environment"),
    [
        ("A line break at the end of the key", {"KLAVIYO_AUTH_KEY": "pk_1\n"}),
        ("A blank in the key", {"KLAVIYO_AUTH_KEY": "pk_1 2"}),
        ("A key without `pk_`", {"KLAVIYO_AUTH_KEY": "0123456789abcdef0123456789abcdef01"}),
        ("The public key (site ID)", {"KLAVIYO_AUTH_KEY": "AbC123"}),
        ("Quotes of an `--env-file`", {"KLAVIYO_AUTH_KEY": '"pk_1"'}),
        ("An API client that is quoted twice", {"CT_API_CLIENT": orjson.dumps(CLIENT).decode()}),
        ("An API client in single quotes", {"CT_API_CLIENT": f"'{CLIENT}'"}),
        ("URLs of two regions", {"CT_API_URL": f"https://api.{EU}", "CT_AUTH_URL": f"https://auth.{US}"}),
        ("The project key in the URL", {"CT_API_URL": f"https://api.{EU}/sandbox-shop"}),
        ("Scopes of another project", {"CT_SCOPE": "view_orders:other-shop"}),
        ("`http://` instead of `https://`", {"CT_API_URL": f"http://api.{EU}"}),
        ("A password with special characters", {"HTTPS_PROXY": "http://user:pass/word@proxy.example:3128"}),
        ("A SOCKS proxy", {"HTTPS_PROXY": "socks5://proxy.example:1080"}),
        ("A misspelled variable", {"KLAVIYO_WORKER_LANE": "8"}),
    ],
)
def test_mistake_in_the_configuration(mistake: str, environment: dict[str, str], worker: Worker) -> None:
    """`run` exits with the same text."""
    line = line_of(worker, "configuration", **environment)
    assert line == documented(mistake)
    status, _, text = line.split(" ", 2)
    if status == "FAIL":
        done = worker("run", "--once", env=environment)
        assert (done.returncode, done.stderr) == (2, f"Error: {text.replace(' → ', ': ')}\n")


def test_project_of_another_region(worker: Worker) -> None:
    """A project exists only in its region."""
    environment = {"CT_PROJECT_ID": "other-shop", "CT_SCOPE": ""}
    assert line_of(worker, "commercetools", **environment) == documented("A project that is not in the region")


def test_client_of_another_region(worker: Worker) -> None:
    """An API client exists only in the region of its project."""
    line = line_of(worker, "commercetools", CT_API_CLIENT='{"clientId": "x", "secret": "y"}')
    assert line == documented("An API client of another region")


def test_subscription_on_another_topic(worker: Worker, emulator: Emulator) -> None:
    """The queue is in order, and stays empty."""
    subscription = Subscription(emulator)
    environment = {"QUEUE_URL": subscription.url, "PUBSUB_EMULATOR_HOST": emulator.host, "CT_SCOPE": ""}
    done = worker("subscriptions", "apply", "--destination", "pubsub://demo/old-topic", "--wait", "0", env=environment)
    assert done.returncode == 0, done.stderr
    line = line_of(worker, "subscriptions", **environment)
    assert line.replace(subscription.name, "my-topic") == documented("A subscription on another topic")


def test_short_ack_deadline(worker: Worker, emulator: Emulator) -> None:
    """Pub/Sub's default is 10 s."""
    subscription = Subscription(emulator)
    update = {"name": subscription.path, "ack_deadline_seconds": 10}
    mask = {"paths": ["ack_deadline_seconds"]}
    subscription.subscriber.update_subscription(request={"subscription": update, "update_mask": mask})
    line = line_of(worker, "queue", QUEUE_URL=subscription.url, PUBSUB_EMULATOR_HOST=emulator.host)
    assert line.replace(subscription.name, "my-subscription") == documented("An ack deadline of 10 s")


def test_queue_of_another_region(worker: Worker, moto: sqs.Server) -> None:
    """Each region has its own queues."""
    queue = sqs.Queue(moto)
    environment = sqs.environment(moto.port) | {"QUEUE_URL": f"sqs://{queue.name}?region=us-east-1"}
    line = line_of(worker, "queue", **environment)
    assert line.replace(queue.name, "my-queue") == documented("A queue of another region")


def test_wrong_clock(worker: Worker, sandbox: Sandbox) -> None:
    """The Date headers of the services are ten minutes ahead."""
    sandbox.commercetools.clock_offset = 600
    line = line_of(worker, "clock")
    assert re.sub(r"\b(59|60)\d s", "600 s", line) == documented("A clock that is ten minutes slow")


@pytest.mark.parametrize(
    ("mistake", "credentials"), [("A wrong password of the proxy", "user:wrong"), ("A proxy without a password", "")]
)
def test_password_of_the_proxy(mistake: str, credentials: str, worker: Worker, tmp_path: Path) -> None:
    """The password is not printed."""
    with CompanyProxy(Authority(tmp_path), {}) as proxy:
        environment = {"KLAVIYO_API_URL": "https://a.klaviyo.com", "HTTPS_PROXY": proxy.url(credentials)}
        line = line_of(worker, "klaviyo", **environment)
    assert line.replace(proxy.address, "proxy.example:3128") == documented(mistake)
