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
from tests.integration.health.test_server import Answer, ask
from tests.support.chromium import Browser
from tests.support.pubsub_emulator import free_port
from tests.support.requirements import require_command
from tests.support.worker_state import FakeWorkerState
from tests.unit.health.test_status import line
from tests.unit.runtime import test_runner
from tests.unit.runtime.test_runner import wait_for
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
    """Start servers with the page, and stop them in the end."""
    servers: list[HealthServer] = []

    def start(telemetry: Telemetry | None = None, **state: Any) -> HealthServer:
        telemetry = telemetry or Telemetry(Metrics("embedded"))
        told = FakeWorkerState(**state)
        shown = Status(test_runner.settings_for(queue_url="sqs://key:s3cret@queue?token=s3cret"), told, telemetry)
        servers.append(HealthServer("127.0.0.1", 0, telemetry.metrics, told, shown))
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


def policy_of(answer: Answer) -> dict[str, str]:
    directives = (part.partition(" ") for part in answer.headers["Content-Security-Policy"].split("; "))
    return {name: value for name, _, value in directives}


def test_the_page_is_one_answer_that_needs_no_other(serve: Serve) -> None:
    """No font, picture, script or style from elsewhere: it has to work where nothing else does."""
    answer = ask(serve(), "/")
    page = answer.body.decode()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", page) == [
        "data:,",
        "status.json",
        "status.json",
        "metrics",
        "readyz",
    ]
    assert not re.search(r"url\(|@import|innerHTML|style=|\son\w+=", page)
    assert len(answer.body) < 30_000


def test_the_browser_is_told_to_run_nothing_else(serve: Serve) -> None:
    """Only this style and this script, by their hashes; no frame, no form, no text that becomes HTML."""
    answer = ask(serve(), "/")
    policy = policy_of(answer)
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.body.decode(), re.DOTALL)
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
def test_nothing_is_stored_guessed_or_lent_to_others(serve: Serve, path: str) -> None:
    """Neither page nor data; HEAD says the same."""
    server = serve()
    for method in ("GET", "HEAD"):
        answer = ask(server, path, method)
        assert answer.status == 200
        assert answer.headers.items() >= {
            ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        }
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert (answer.body == b"") == (method == "HEAD")
    assert ask(server, path, "POST").status == 405


def test_the_data_has_no_secret(serve: Serve) -> None:
    """The port asks nobody for a password."""
    answer = ask(serve(), "/status.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert json.loads(answer.body)["worker"]["queue"] == "sqs://queue"
    assert not re.search(rb"s3cret|secret|pk_1|example\.com", answer.body)


def test_history_begins_by_itself_and_ends_with_the_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody looks: charts are full when somebody does."""
    monkeypatch.setattr("worker.health.status.STEP", 0.01)
    server = serve()
    wait_for(lambda: len(json.loads(ask(server, "/status.json").body)["history"]["ago"]) > 3)
    (sampling,) = (thread for thread in threads() if thread.name == "status")
    server.stop()
    sampling.join(5)
    assert not sampling.is_alive()


@pytest.mark.parametrize(("setting", "status"), [("on", 200), ("off", 404)])
def test_a_worker_shows_how_it_is_unless_told_not_to(
    sandbox: Sandbox, tmp_path: Path, setting: str, status: int
) -> None:
    """Off: not even that there is such a page; health and metrics stay."""
    port = free_port()
    settings = settings_for(
        sandbox, queue_url=f"embedded://{tmp_path}/q.db", http_port=port, status_page=setting, cache_ttl=0
    )
    service = Worker(settings)
    running = Thread(target=service.run, kwargs={"once": False, "max_wait": 0.0})
    running.start()
    try:
        wait_for(lambda: _asked(port, "/livez") == 200)
        assert [_asked(port, path) for path in ("/", "/status.json", "/metrics")] == [status, status, 200]
    finally:
        service.stop()
        running.join()


def _asked(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
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
    """Return what was told by a worker that has done much, some of it in vain."""
    telemetry = Telemetry(Metrics("embedded"))
    telemetry.failures.add(line(message_type=HOSTILE, resource_id=HOSTILE * 9, reason=HOSTILE * 9, message_id=HOSTILE))
    telemetry.failures.add(line(outcome="waiting", reason="503 to POST a.klaviyo.com/api/events"))
    for outcome in ("sent", "ignored", "retried", "dead_lettered", "returned"):
        telemetry.metrics.record_settled("PaymentTransactionStateChanged", outcome, 0.1, 1.0)
    return telemetry


def test_a_person_sees_the_state_first(serve: Serve, browser: Browser) -> None:
    """In large, with why and what to do, read out when it changes; and nothing else is asked for."""
    server = serve(busy(), parked_reason=REFUSED)
    shown(browser, server)
    assert browser.evaluate("document.title") == "parked · klaviyo-worker"
    assert text(browser, "[role=status]").split("\n")[:2] == ["parked", REFUSED]
    assert "goes on by itself" in text(browser, "#advice")
    size = "parseFloat(getComputedStyle(document.querySelector('h1')).fontSize)"
    assert browser.evaluate(size) >= 44
    assert set(browser.requests) <= {f"http://127.0.0.1:{server.port}/{path}" for path in ("", "status.json")} | {
        "data:,"
    }
    assert browser.complaints == []


def test_what_the_worker_does_can_be_read(serve: Serve, browser: Browser) -> None:
    """Figures, lanes, limits, failures with their reasons, and outcomes by type, in tables and lists."""
    shown(browser, serve(busy()))
    figures = text(browser, "#figures").replace("\n", " ")
    assert figures == "In flight 7 of 2,000 Of these, waiting 3 Backlog 120 Dead letters 2"
    assert text(browser, "#lanes").replace("\n", " ") == "events 12 idle profiles idle 1 catalog idle idle"
    assert "0 of 3,500 a minute" in text(browser, "#limits")
    assert "the account has 2,900 left · 2 waiting" in text(browser, "#limits")
    assert "503 to POST a.klaviyo.com/api/events" in text(browser, "#failures li:first-child")
    titles = text(browser, "#outcomes thead").strip()
    assert titles.replace("\t", "|") == "Type|Sent|Ignored|Retried|Dead letters|Returned"
    assert text(browser, "#outcomes tbody").split() == ["PaymentTransactionStateChanged", *"11111"]
    assert browser.evaluate("document.querySelectorAll('#charts [role=img][aria-label]').length") == 4


def test_only_the_newest_failures_stand_before_the_rest(serve: Serve, browser: Browser) -> None:
    """Whoever wants more opens them, and they stay open."""
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


def test_the_page_follows_the_worker(serve: Serve, browser: Browser) -> None:
    """Without a reload, also when it goes away: old figures must not look like new ones."""
    server = serve()
    shown(browser, server)
    assert text(browser, "h1") == "running"
    server._state.values["is_stopping"] = True  # type: ignore[attr-defined]
    browser.wait_for("document.querySelector('h1').innerText === 'stopping'")
    assert browser.evaluate("document.querySelector('#lost').hidden")
    server.stop()
    browser.wait_for("!document.querySelector('#lost').hidden")
    assert "No answer since" in text(browser, "#lost")


def test_hostile_texts_stay_texts(serve: Serve, browser: Browser) -> None:
    """Types, ids and reasons are anybody's: they are shown as they are, and turn nothing else round."""
    shown(browser, serve(busy(), outage_reasons=DOWN))
    assert HOSTILE in browser.evaluate("document.querySelector('#why').textContent")
    assert HOSTILE in browser.evaluate("document.querySelector('#failures').textContent")
    assert browser.evaluate("document.querySelectorAll('main img, main script').length") == 0
    assert browser.evaluate("document.title") == "running · klaviyo-worker"
    assert browser.complaints == []


@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_on_a_phone_and_at_night(serve: Serve, browser: Browser, *, dark: bool) -> None:
    """Nothing is wider than 360 px, and all text has the contrast that WCAG AA asks for."""
    shown(browser, serve(busy(), outage_reasons=DOWN), width=360, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(22, 23, 25)" if dark else "rgb(251, 250, 248)"
    )
    contrasts = browser.evaluate((Path(__file__).parent / "contrasts.js").read_text(encoding="utf-8"))
    assert len(contrasts) > 50
    assert [found for found in contrasts if found["contrast"] < 4.5] == []
