"""The variables that all libraries read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.company_proxy import Authority
from worker.errors import SettingsError
from worker.network import configure, proxy_for

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("value", "url", "authorization"),
    [
        ("proxy.example:3128", "http://proxy.example:3128", ""),
        (" https://proxy.example/ ", "https://proxy.example", ""),
        ("u:p@[::1]:3128", "http://[::1]:3128", "Basic dTpw"),
        ("http://u:p@ss@proxy.example:3128", "http://proxy.example:3128", "Basic dTpwQHNz"),
        ("http://u@proxy.example:3128", "http://proxy.example:3128", "Basic dTo="),
    ],
)
def test_forms_of_a_proxy(value: str, url: str, authorization: str) -> None:
    """Scheme, password and port can be missing. The credentials are in a header, and not in the text of the object."""
    proxy = proxy_for("https://a.klaviyo.com", {"HTTPS_PROXY": value})
    assert proxy is not None
    assert (proxy.url, dict(proxy.headers)) == (url, {"Proxy-Authorization": authorization} if authorization else {})
    assert "Basic" not in repr(proxy)


@pytest.mark.parametrize(
    "value", ["http://", "proxy.example:port", "http://u:s3cr\u00fct@proxy.example", "proxy.example?s3cr", "ftp://p:1"]
)
def test_malformed_proxy(value: str) -> None:
    """The error does not quote the value."""
    with pytest.raises(SettingsError, match=r"^ALL_PROXY is malformed: expected \[http://\]") as error:
        configure({"ALL_PROXY": value})
    assert "s3cr" not in str(error.value)


def test_variables_of_all_libraries_are_set(tmp_path: Path) -> None:
    """The credentials are percent-encoded. Variables of one library are kept."""
    bundle = str(Authority(tmp_path).bundle)
    environment = {
        "HTTPS_PROXY": "",
        "all_proxy": "u:p@ss@proxy.example:3128",
        "NO_PROXY": "internal.example",
        "REQUESTS_CA_BUNDLE": bundle,
        "AWS_CA_BUNDLE": "other.pem",
    }
    configure(environment)
    proxy, no_proxy = "http://u:p%40ss@proxy.example:3128", "internal.example,localhost,127.0.0.1,::1"
    assert environment == {
        "HTTPS_PROXY": proxy,
        "https_proxy": proxy,
        "all_proxy": "u:p@ss@proxy.example:3128",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "SSL_CERT_FILE": bundle,
        "REQUESTS_CA_BUNDLE": bundle,
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": bundle,
        "AWS_CA_BUNDLE": "other.pem",
    }
    configure(environment)
    assert environment["no_proxy"] == no_proxy


def test_nothing_is_set_without_a_proxy() -> None:
    """An empty variable counts as not set."""
    environment = {"HTTPS_PROXY": "", "NO_PROXY": "internal.example"}
    configure(environment)
    assert environment == {"HTTPS_PROXY": "", "NO_PROXY": "internal.example"}
    assert proxy_for("https://a.klaviyo.com", environment) is None


def test_every_problem_is_reported() -> None:
    """An operator fixes all of them at once."""
    with pytest.raises(SettingsError) as error:
        configure({"HTTPS_PROXY": "socks5h://proxy.example", "SSL_CERT_FILE": "/nowhere"})
    assert len(error.value.problems) == 2
