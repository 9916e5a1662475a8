"""The error of a proxy that refuses its credentials."""

from __future__ import annotations

REFUSED = "the proxy refuses user and password (407)"
ADVICE = "correct them in HTTPS_PROXY, and percent-encode special characters"


def is_refusal(text: str) -> bool:
    """Return whether a library's error text reports the status 407 of a proxy, in the words of gRPC or of urllib3."""
    return "proxy returned response code 407" in text or "Tunnel connection failed: 407" in text
