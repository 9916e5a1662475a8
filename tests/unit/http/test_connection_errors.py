"""The errors of failed connections: the advice about a certificate that is not valid."""

from __future__ import annotations

import ssl

import pytest
import urllib3

from worker.errors import Transient
from worker.http.connection_errors import connection_error


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (10, "check the clock of this machine"),  # expired
        (20, "if a proxy intercepts TLS, set SSL_CERT_FILE"),  # unable to get local issuer certificate
        (85, "from Python 3.13 on, certificates must follow RFC 5280"),  # missing Authority Key Identifier
        (62, "check the URL"),  # hostname mismatch
    ],
)
def test_advice_about_a_certificate(code: int, expected: str) -> None:
    """The codes are OpenSSL's."""
    failure = ssl.SSLCertVerificationError(1, "certificate verify failed")
    failure.verify_code, failure.verify_message = code, "because"
    error = connection_error(urllib3.exceptions.SSLError(failure), "https://a.example", "no response")
    assert isinstance(error, Transient)
    assert error.reason == "no response: its certificate is not valid (because)"
    assert error.todo.startswith(expected)
