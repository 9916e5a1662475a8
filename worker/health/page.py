"""The page: one answer that needs no other, and the headers that keep it so."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import NamedTuple

HEADERS = {  # of the page and of its data
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_POLICY = (
    "default-src 'none'",
    "connect-src 'self'",
    "img-src data:",  # an icon that is none, or browsers would ask for one
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",  # and no policy that makes any: a text can never become HTML
    "trusted-types 'none'",
)


class Page(NamedTuple):
    """The page with style and script in it, and a Content-Security-Policy that lets through only these."""

    body: bytes
    policy: str


def page() -> Page:
    """Put the page together from the files beside this one."""
    parts = {name: (files(__package__) / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    html = re.sub(r"/\* (css|js) \*/", lambda match: parts[match[1]], parts["html"])
    allowed = (f"style-src {_hash(parts['css'])}", f"script-src {_hash(parts['js'])}")
    return Page(html.encode(), "; ".join((*_POLICY, *allowed)))


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"
