"""The status page on real sockets, and in a real browser."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
from pathlib import Path
from threading import Thread
from threading import enumerate as threads
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.conftest import settings_for
from tests.integration.health.test_server import Response, request
from tests.support.chromium import Browser
from tests.support.ports import free_port
from tests.support.requirements import require_command
from tests.support.waiting import wait_for
from tests.support.worker_state import FakeWorkerState
from tests.unit.health.test_status import line
from tests.unit.runtime import test_runner
from worker.health.access import Access
from worker.health.server import HealthServer
from worker.health.status import Status
from worker.service import Worker
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from worker.sandbox import Sandbox

    Serve = Callable[..., HealthServer]

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\u202e'\"&lt;"
DOWN = {"klaviyo": HOSTILE, "commercetools": ""}
REFUSED = "Klaviyo answered 401 to POST /api/events: check KLAVIYO_AUTH_KEY"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers with the page, and stop them after the test."""
    servers: list[HealthServer] = []

    def start(telemetry: Telemetry | None = None, **state: Any) -> HealthServer:
        telemetry = telemetry or Telemetry(Metrics("embedded"))
        worker_state = FakeWorkerState(**state)
        settings = test_runner.settings_for(queue_url="sqs://key:s3cret@queue?token=s3cret")
        status = Status(settings, worker_state, telemetry)
        servers.append(HealthServer(Access(), 0, telemetry.metrics, worker_state, status))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    require_command("chromium")
    running = Browser(tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()


def policy_of(response: Response) -> dict[str, str]:
    directives = (part.partition(" ") for part in response.headers["Content-Security-Policy"].split("; "))
    return {name: value for name, _, value in directives}


def test_page_is_self_contained(serve: Serve) -> None:
    """Other servers can be unreachable, so the page loads no fonts, images, scripts or styles from them."""
    response = request(serve(), "/")
    page = response.body.decode()
    assert (response.status, response.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", page) == [
        "data:,",
        "status.json",
        "status.json",
        "metrics",
        "readyz",
    ]
    assert not re.search(r"url\(|@import|innerHTML|style=|\son\w+=", page)
    assert len(response.body) < 30_000


def test_content_security_policy_allows_only_the_style_and_script_of_the_page(serve: Serve) -> None:
    """They are allowed by hash. Frames, forms and HTML from text are forbidden."""
    response = request(serve(), "/")
    policy = policy_of(response)
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", response.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(directive) == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


@pytest.mark.parametrize("path", ["/", "/status.json", "/?x", "/status.json?x"])
def test_page_and_data_have_security_headers(serve: Serve, path: str) -> None:
    """HEAD returns the same headers."""
    server = serve()
    for method in ("GET", "HEAD"):
        response = request(server, path, method)
        assert response.status == 200
        assert response.headers.items() >= {
            ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        }
        assert "Access-Control-Allow-Origin" not in response.headers
        assert (response.body == b"") == (method == "HEAD")
    assert request(server, path, "POST").status == 405


def test_data_contains_no_secret(serve: Serve) -> None:
    """The port has no password."""
    response = request(serve(), "/status.json")
    assert response.headers["Content-Type"] == "application/json"
    assert json.loads(response.body)["worker"]["queue"] == "sqs://queue"
    assert not re.search(rb"s3cret|secret|pk_1|example\.com", response.body)


def test_history_is_sampled_from_start_to_stop_of_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sampled even if no client requests the page, so that charts are complete when one does."""
    monkeypatch.setattr("worker.health.status.STEP", 0.01)
    server = serve()
    wait_for(lambda: len(json.loads(request(server, "/status.json").body)["history"]["ago"]) > 3)
    (sampling,) = (thread for thread in threads() if thread.name == "status")
    server.stop()
    sampling.join(60)
    assert not sampling.is_alive()


@pytest.mark.parametrize(("setting", "status"), [("on", 200), ("off", 404)])
def test_setting_removes_the_page(sandbox: Sandbox, tmp_path: Path, setting: str, status: int) -> None:
    """With `off`, the page is not found. Health and metrics remain."""
    port = free_port()
    settings = settings_for(
        sandbox, queue_url=f"embedded://{tmp_path}/q.db", http_port=port, status_page=setting, cache_ttl=0
    )
    worker = Worker(settings)
    running = Thread(target=worker.run, kwargs={"once": False, "max_wait": 0.0})
    running.start()
    try:
        wait_for(lambda: _status_of(port, "/livez") == 200)
        assert [_status_of(port, path) for path in ("/", "/status.json", "/metrics")] == [status, status, 200]
    finally:
        worker.stop()
        running.join()


def _status_of(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def shown(browser: Browser, server: HealthServer, **how: Any) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/", **how)
    browser.wait_for("document.title.includes('·')")


def text(browser: Browser, selector: str) -> str:
    return str(browser.evaluate(f"document.querySelector('{selector}').innerText"))


def busy() -> Telemetry:
    """Return the telemetry of a worker with all outcomes and some failures."""
    telemetry = Telemetry(Metrics("embedded"))
    telemetry.failures.add(line(message_type=HOSTILE, resource_id=HOSTILE * 9, reason=HOSTILE * 9, message_id=HOSTILE))
    telemetry.failures.add(line(outcome="held", reason="503 to POST a.klaviyo.com/api/events"))
    for outcome in ("sent", "ignored", "retried", "dead_lettered", "returned"):
        telemetry.metrics.record_settled("PaymentTransactionStateChanged", outcome, 0.1, 1.0)
    for setting in ("project", "project", "countries"):
        telemetry.metrics.record_excluded(setting)
    return telemetry


def test_page_shows_the_state_with_reasons_and_advice_first(serve: Serve, browser: Browser) -> None:
    """The state is large and is read aloud when it changes. The page requests nothing but its data."""
    server = serve(busy(), parked_reason=REFUSED)
    shown(browser, server)
    assert browser.evaluate("document.title") == "parked · klaviyo-worker"
    assert text(browser, "[role=status]").split("\n")[:2] == ["parked", REFUSED]
    assert "resumes by itself" in text(browser, "#advice")
    size = "parseFloat(getComputedStyle(document.querySelector('h1')).fontSize)"
    assert browser.evaluate(size) >= 44
    assert set(browser.requests) <= {f"http://127.0.0.1:{server.port}/{path}" for path in ("", "status.json")} | {
        "data:,"
    }
    assert browser.errors == []


def test_page_shows_figures_lanes_limits_failures_and_outcomes(serve: Serve, browser: Browser) -> None:
    """They are shown in tables and lists."""
    shown(browser, serve(busy()))
    figures = text(browser, "#figures").replace("\n", " ")
    assert figures == "In flight 7 of 20,000 Held 3 Backlog 120 Dead letters 2"
    assert (
        text(browser, "#lanes").replace("\n", " ")
        == "events 12 idle profiles idle 1 deletions idle idle catalog idle idle"
    )
    assert "0 of 3,500 a minute" in text(browser, "#limits")
    assert "the account has 2,900 left · 2 waiting" in text(browser, "#limits")
    assert "503 to POST a.klaviyo.com/api/events" in text(browser, "#failures li:first-child")
    titles = text(browser, "#outcomes thead").strip()
    assert titles.replace("\t", "|") == "Type|Sent|Ignored|Retried|Dead letters|Returned"
    assert text(browser, "#outcomes tbody").split() == ["PaymentTransactionStateChanged", *"11111"]
    project = test_runner.settings_for().ct_project_id
    excluded = f"2 of another project than {project}, 1 of another country."
    assert text(browser, "#excluded") == f"Ignored messages that this worker does not serve: {excluded}"
    assert browser.evaluate("document.querySelectorAll('#charts [role=img][aria-label]').length") == 4


def test_earlier_failures_are_collapsed(serve: Serve, browser: Browser) -> None:
    """When the user has expanded them, they stay expanded."""
    telemetry = busy()
    for number in range(7):
        telemetry.failures.add(line(reason=f"reason {number}"))
    shown(browser, serve(telemetry))
    assert browser.evaluate("document.querySelectorAll('#failures li').length") == 5
    assert "reason 1" not in text(browser, "#page")
    browser.evaluate("document.querySelector('summary').click()")
    telemetry.failures.add(line(reason="reason 7"))
    browser.wait_for("document.querySelector('#failures').innerText.includes('reason 7')")
    assert "reason 1" in text(browser, "#earlier")


def test_page_follows_the_worker_without_a_reload(serve: Serve, browser: Browser) -> None:
    """If the worker stops answering, the page marks its figures as old."""
    server = serve()
    shown(browser, server)
    assert text(browser, "h1") == "running"
    server._state.values["is_stopping"] = True  # type: ignore[attr-defined]
    browser.wait_for("document.querySelector('h1').innerText === 'stopping'")
    assert browser.evaluate("document.querySelector('#lost').hidden")
    server.stop()
    browser.wait_for("!document.querySelector('#lost').hidden")
    assert "No response since" in text(browser, "#lost")


def test_hostile_text_is_shown_as_text(serve: Serve, browser: Browser) -> None:
    """Types, ids and reasons can contain HTML and characters that reverse the direction of text."""
    shown(browser, serve(busy(), outage_reasons=DOWN))
    assert HOSTILE in browser.evaluate("document.querySelector('#reasons').textContent")
    assert HOSTILE in browser.evaluate("document.querySelector('#failures').textContent")
    assert browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert browser.evaluate("document.title") == "running · klaviyo-worker"
    assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True])
def test_page_is_readable_on_a_phone_and_in_dark_mode(serve: Serve, browser: Browser, *, dark: bool) -> None:
    """Nothing is wider than 360 px, and all text has the contrast that WCAG AA requires."""
    shown(browser, serve(busy(), outage_reasons=DOWN), width=360, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(22, 23, 25)" if dark else "rgb(251, 250, 248)"
    )
    contrasts = browser.evaluate((Path(__file__).parent / "contrasts.js").read_text(encoding="utf-8"))
    assert len(contrasts) > 50
    assert [found for found in contrasts if found["contrast"] < 4.5] == []
