"""The HTML of the status page, with its style and script, and its security headers."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import NamedTuple

HEADERS = {  # for the page and for its data
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_POLICY = (
    "default-src 'none'",
    "connect-src 'self'",
    "img-src data:",  # an empty icon, so that browsers do not request one
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",  # together with the next line: the script cannot turn text into HTML
    "trusted-types 'none'",
)


class Page(NamedTuple):
    """The page with its style and script, and a Content-Security-Policy that allows no other style and script."""

    body: bytes
    policy: str


def build_page() -> Page:
    """Build the page from the files in this folder."""
    parts = {name: (files(__package__) / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    html = re.sub(r"/\* (css|js) \*/", lambda match: parts[match[1]], parts["html"])
    allowed = (f"style-src {_hash(parts['css'])}", f"script-src {_hash(parts['js'])}")
    return Page(html.encode(), "; ".join((*_POLICY, *allowed)))


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
