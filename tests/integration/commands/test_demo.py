"""`klaviyo-worker demo`, in this process."""

from __future__ import annotations

from click.testing import CliRunner

from worker.cli import main


def test_demo_needs_no_settings() -> None:
    """The demo prints messages, profiles, events, catalog and dead letters, and exits with 0."""
    done = CliRunner().invoke(main, ["demo"])
    assert done.exit_code == 0, done.output
    for text in ("MESSAGE", "Profiles in Klaviyo", "Events in Klaviyo", "Catalog in Klaviyo", "Dead letters"):
        assert text in done.stdout
    assert "messages ended as expected" in done.stdout
