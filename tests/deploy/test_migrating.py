"""The mapping keys and settings in docs/migrating.md exist."""

from __future__ import annotations

import re
import tomllib
from operator import attrgetter

from tests.deploy.pages import page
from worker.mapping import MappingConfig
from worker.settings import Settings

PAGE = page("docs/migrating.md")


def test_mapping_for_small_changes_is_valid() -> None:
    """It sets the behaviour of the plugin."""
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    mapping = MappingConfig.model_validate(tomllib.loads(block))
    assert mapping.order.raw_line_item
    assert mapping.order.properties.include == ["*"]
    assert (mapping.order.fulfilled_states, mapping.order.fulfilled_shipment_states) == (["Confirmed", "Complete"], [])


def test_replacements_of_plugin_settings_exist() -> None:
    """The last column has keys of the mapping; the variables that stay the same are settings."""
    _, _, table = PAGE.partition("| In the mapping file |\n|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    keys = [key for row in rows for key in re.findall(r"`([a-z_.]+)`", row.split("|")[2]) if key != "include"]
    assert len(keys) >= 8
    for key in keys:
        attrgetter(key)(MappingConfig())
    (same,) = re.findall(r"^\| (.*) \| the same \|$", PAGE.partition("- **Settings.**")[2], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", same)) <= {str(info.validation_alias) for info in Settings.model_fields.values()}
