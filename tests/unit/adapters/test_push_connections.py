"""The number of connections to the push endpoint."""

from __future__ import annotations

import resource

import pytest

from adapters.push.connections import SPARE_CONNECTIONS, limited_protocol


@pytest.mark.parametrize(
    ("files", "maximum"), [(256, 128), (100_000, 4_000 + SPARE_CONNECTIONS), (resource.RLIM_INFINITY, 4_064)]
)
def test_connections_leave_half_of_the_files(files: int, maximum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise silent clients would end the probes and the requests to Klaviyo, which need files, too."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert vars(limited_protocol(4_000))["maximum"] == maximum
