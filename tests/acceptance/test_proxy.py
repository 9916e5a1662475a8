"""All calls through a company's proxy, which demands credentials and intercepts TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.acceptance.conftest import json_lines
from tests.acceptance.test_run import updated
from tests.support.company_proxy import ENCODED, Authority, CompanyProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.acceptance.conftest import Worker
    from worker.sandbox import Sandbox

COMMERCETOOLS, TOKEN, KLAVIYO = HOSTS = ("api.shop.example", "auth.shop.example", "a.klaviyo.example")
ALL = {(host, 200) for host in HOSTS}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def ports(sandbox: Sandbox) -> dict[str, int]:
    commercetools, klaviyo = (urlsplit(server.url).port or 0 for server in (sandbox.commercetools, sandbox.klaviyo))
    return {COMMERCETOOLS: commercetools, TOKEN: commercetools, KLAVIYO: klaviyo}


@pytest.fixture
def proxy(authority: Authority, ports: dict[str, int]) -> Iterator[CompanyProxy]:
    with CompanyProxy(authority, ports) as running:
        yield running


@pytest.fixture
def inside(worker: Worker, authority: Authority) -> Worker:
    """A worker in a company's network: it reaches the services by names that only the proxy knows."""
    urls = {"CT_API_URL": COMMERCETOOLS, "CT_AUTH_URL": TOKEN, "KLAVIYO_API_URL": KLAVIYO}
    worker.environment |= {name: f"https://{host}" for name, host in urls.items()}
    worker.environment |= {"SSL_CERT_FILE": str(authority.bundle), "KLAVIYO_WORKER_RETRY_TIMEOUT": "0"}
    return worker


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["", "http://"])
def test_every_call_uses_the_proxy(variable: str, scheme: str, inside: Worker, proxy: CompanyProxy) -> None:
    """The password has special characters. The scheme can be missing."""
    done = inside("check", env={variable: f"{scheme}{ENCODED}@{proxy.address}"})
    assert done.returncode == 0, done.stdout
    assert set(proxy.statuses) == ALL


def test_proxy_can_be_reached_over_tls(inside: Worker, authority: Authority, ports: dict[str, int]) -> None:
    """Its certificate is of the company's authority, too."""
    with CompanyProxy(authority, ports, scheme="https") as proxy:
        assert inside("check", env={"HTTPS_PROXY": proxy.url()}).returncode == 0
    assert set(proxy.statuses) == ALL


def test_messages_are_processed_through_the_proxy(inside: Worker, proxy: CompanyProxy, sandbox: Sandbox) -> None:
    """`run` makes the same calls as `check`."""
    customer = next(customer for customer in sandbox.shop.customers.values() if customer.get("email"))
    inside.publish(updated(customer["id"]))
    done = inside("run", "--once", env={"HTTPS_PROXY": proxy.url()})
    assert done.returncode == 0, done.stderr
    assert set(proxy.statuses) == ALL
    assert sandbox.account.profiles


def test_worker_parks_if_the_proxy_refuses_the_password(inside: Worker, proxy: CompanyProxy, sandbox: Sandbox) -> None:
    """The log names the reason, and the message stays on the queue."""
    inside.publish(updated(next(iter(sandbox.shop.customers))))
    done = inside("run", "--once", "--max-wait", "1", env={"HTTPS_PROXY": proxy.url("worker:wr0ng")})
    assert done.returncode == 2, done.stderr
    (parked,) = (line for line in json_lines(done.stderr) if line["event"] == "parked")
    assert f"the proxy http://{proxy.address} refuses user and password (407)" in parked["reason"]
    assert "wr0ng" not in done.stdout + done.stderr
    assert inside.dead_letters() == []


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_every_call_trusts_the_authority_of_the_company(
    variable: str, inside: Worker, proxy: CompanyProxy, authority: Authority
) -> None:
    """The libraries read different variables."""
    network = {"HTTPS_PROXY": proxy.url(), "SSL_CERT_FILE": "", variable: str(authority.bundle)}
    done = inside("check", env=network)
    assert done.returncode == 0, done.stdout


def test_unknown_authority_is_named(inside: Worker, proxy: CompanyProxy) -> None:
    """The advice names the variable."""
    done = inside("check", env={"HTTPS_PROXY": proxy.url(), "SSL_CERT_FILE": ""})
    assert done.returncode == 4
    for line in done.stdout.splitlines()[2:]:
        assert line.endswith(
            "its certificate is not valid (unable to get local issuer certificate) → if a proxy intercepts TLS, set "
            "SSL_CERT_FILE to a file with public certificate authorities and your own"
        )


@pytest.mark.parametrize(
    ("credentials", "expected"),
    [
        ("worker:wr0ng", "refuses user and password (407) → correct them in HTTPS_PROXY, and percent-encode special "),
        ("", "requires user and password (407) → set HTTPS_PROXY to http://USER:PASSWORD@HOST:PORT"),
    ],
)
def test_refused_credentials_are_named_without_the_password(
    credentials: str, expected: str, inside: Worker, proxy: CompanyProxy
) -> None:
    """All three services report the same."""
    done = inside("check", env={"HTTPS_PROXY": proxy.url(credentials)})
    assert done.returncode == 4
    failed = done.stdout.splitlines()[2:]
    assert len(failed) == 3
    assert all(f"the proxy http://{proxy.address} {expected}" in line for line in failed)
    assert {status for _, status in proxy.statuses} == {407}
    assert "wr0ng" not in done.stdout + done.stderr


def test_exceptions_hold_for_every_call(inside: Worker, proxy: CompanyProxy) -> None:
    """Without the proxy, the names are unknown."""
    done = inside("check", env={"HTTPS_PROXY": proxy.url(), "NO_PROXY": ".shop.example,a.klaviyo.example"})
    assert done.returncode == 4
    assert done.stdout.count(": the name of the host is unknown → ") == 3
    assert proxy.statuses == []


def test_services_on_this_machine_are_reached_without_the_proxy(worker: Worker, proxy: CompanyProxy) -> None:
    """Otherwise, emulators would need an entry in NO_PROXY."""
    done = worker("check", env={name: proxy.url() for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")})
    assert done.returncode == 0, done.stdout
    assert proxy.statuses == []


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ({"HTTPS_PROXY": "socks5://proxy.example:1080"}, "HTTPS_PROXY names a SOCKS proxy → expected [http://][USER"),
        ({"HTTPS_PROXY": "http://user:s3cr/et@proxy.example:3128"}, "HTTPS_PROXY is malformed → expected "),
        ({"HTTPS_PROXY": "http://user:s3cr#et@proxy.example:3128"}, "HTTPS_PROXY is malformed → expected "),
        ({"ALL_PROXY": "ftp://proxy.example"}, "ALL_PROXY is malformed → expected [http://][USER:PASSWORD@]HOST:PORT"),
        ({"SSL_CERT_FILE": "/nowhere/ca.pem"}, "SSL_CERT_FILE: cannot read /nowhere/ca.pem: No such file or directory"),
        ({"SSL_CERT_FILE": "empty.pem"}, "SSL_CERT_FILE: cannot read empty.pem: it contains no certificate → "),
        ({"SSL_CERT_FILE": "", "REQUESTS_CA_BUNDLE": "/"}, "REQUESTS_CA_BUNDLE: cannot read /: "),
    ],
)
def test_invalid_variable_is_named(network: dict[str, str], expected: str, inside: Worker) -> None:
    """It is a part of the configuration. The line does not quote the password."""
    (inside.directory / "empty.pem").touch()
    done = inside("check", env=network)
    assert done.returncode == 2
    assert done.stdout.startswith(f"FAIL    configuration  {expected}")
    assert "s3cr" not in done.stdout + done.stderr
    assert done.stdout.count("\n") == 1


def test_refusing_proxy_is_named(inside: Worker, proxy: CompanyProxy) -> None:
    """A proxy can permit some hosts only."""
    done = inside("check", env={"HTTPS_PROXY": proxy.url(), "KLAVIYO_API_URL": "https://other.example"})
    assert done.returncode == 5
    assert (
        f"other.example/api/catalog-items: the proxy http://{proxy.address} answered 403 → check the URL, and that the "
        "proxy permits the host\n"
    ) in done.stdout


def test_unreachable_proxy_is_named(inside: Worker, proxy: CompanyProxy) -> None:
    """The line names the proxy, not its password."""
    done = inside("check", env={"HTTPS_PROXY": "http://user:s3cret@proxy.example:3128"})
    assert done.returncode == 4
    assert done.stdout.count(": the proxy http://proxy.example:3128 is not reachable (") == 3
    assert "s3cret" not in done.stdout + done.stderr
