"""`make audit` against a fake of the database."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest

from tests.deploy import audit
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUESTS: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    """Knows two vulnerabilities of urllib3, on two pages."""

    def do_POST(self) -> None:
        assert self.path == "/v1/querybatch"
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        REQUESTS.extend(queries)
        body = json.dumps({"results": list(map(self.result, queries))}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def result(self, query: dict[str, Any]) -> dict[str, Any]:
        if query["package"] != {"name": "urllib3", "ecosystem": "PyPI"}:
            return {}
        if query.get("page_token"):
            return {"vulns": [{"id": "GHSA-2"}]}
        return {"vulns": [{"id": "GHSA-1"}], "next_page_token": "more"}

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def database() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_vulnerable_packages_of_all_locks_are_listed(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 1, so that a release stops."""
    packages = dict(audit.locked_packages())
    assert {"urllib3", "pytest", "uv", "uvicorn"} <= packages.keys()
    assert audit.main(database) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"urllib3 {packages['urllib3']}: https://osv.dev/GHSA-1, https://osv.dev/GHSA-2"
    assert shown[-1].endswith("packages, 1 with known vulnerabilities")
    assert {query["version"] for query in REQUESTS if query["package"]["name"] == "urllib3"} == {packages["urllib3"]}


def test_database_that_cannot_be_reached_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is 2."""
    assert audit.main(f"http://127.0.0.1:{free_port()}") == 2
    assert "cannot be reached (ConnectionError)" in capsys.readouterr().out
