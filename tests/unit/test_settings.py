"""Settings and the mapping file."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

import pytest

from worker import renamed
from worker.errors import SettingsError
from worker.mapping import MappingConfig, load_mapping
from worker.settings import MappingSettings, QueueSettings, Settings, load

if TYPE_CHECKING:
    from pathlib import Path

GOOD = {
    "CT_API_URL": "https://api.example.com/",
    "CT_AUTH_URL": "https://auth.example.com",
    "CT_PROJECT_ID": "shop",
    "CT_API_CLIENT": '{"clientId": "id", "secret": "s3cret"}',
    "KLAVIYO_AUTH_KEY": "pk_s3cret",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.usefixtures("environment")
def test_five_variables_are_required() -> None:
    """Every other setting has a default."""
    settings = load(Settings, {})
    assert settings.ct_api_url == "https://api.example.com"
    assert settings.ct_token_url == "https://auth.example.com/oauth/token"
    assert settings.ct_api_client.client_id == "id"
    assert settings.klaviyo_api_url == "https://a.klaviyo.com"
    assert settings.ct_scope == ""


@pytest.mark.parametrize("name", GOOD)
def test_missing_variable_is_named_in_one_line(name: str, environment: pytest.MonkeyPatch) -> None:
    """The line states how to set the variable."""
    environment.delenv(name)
    with pytest.raises(SettingsError) as error:
        load(Settings, {})
    assert str(error.value).startswith(f"{name} is missing: set it (or {name}_FILE) to the ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CT_API_URL", "api.example.com"),
        ("CT_API_URL", "http://api.example.com"),
        ("CT_AUTH_URL", "ftp://auth.example.com"),
        ("CT_PROJECT_ID", "   "),
        ("CT_API_CLIENT", "id:s3cret"),
        ("CT_API_CLIENT", '{"clientId": "id", "s3cret": 1}'),
        ("CT_API_CLIENT", '{"clientId": "id", "secret": 53}'),
        ("CT_API_CLIENT", '["id", "s3cret"]'),
        ("KLAVIYO_AUTH_KEY", "pk s3cret"),
        ("KLAVIYO_AUTH_KEY", "pk_s3cret\nx"),
        ("KLAVIYO_API_URL", "http://a.klaviyo.com"),
        ("KLAVIYO_WORKER_LANES", "many"),
        ("KLAVIYO_WORKER_LANES", "0"),
        ("KLAVIYO_WORKER_READ_TIMEOUT", "-1"),
        ("KLAVIYO_WORKER_LOG_FORMAT", "xml"),
    ],
)
def test_malformed_variable_is_named_in_one_line_without_its_value(
    name: str, value: str, environment: pytest.MonkeyPatch
) -> None:
    """The line states the expected value and never contains a secret."""
    environment.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        load(Settings, {})
    assert str(error.value).startswith(f"{name} is malformed: ")
    assert "\n" not in str(error.value)
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1"])
def test_http_is_accepted_only_on_loopback(url: str, environment: pytest.MonkeyPatch) -> None:
    """Credentials must not cross a network unencrypted."""
    environment.setenv("CT_API_URL", url)
    assert load(Settings, {}).ct_api_url == url


def test_value_is_read_from_the_file_named_by_the_environment(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mounted secret can end in a newline. The variable itself takes precedence."""
    file = tmp_path / "key"
    file.write_text("pk_from_file\n")
    environment.setenv("KLAVIYO_AUTH_KEY_FILE", str(file))
    assert load(Settings, {}).klaviyo_auth_key.get_secret_value() == "pk_s3cret"
    environment.delenv("KLAVIYO_AUTH_KEY")
    assert load(Settings, {}).klaviyo_auth_key.get_secret_value() == "pk_from_file"
    environment.setenv("KLAVIYO_AUTH_KEY_FILE", str(tmp_path / "missing"))
    with pytest.raises(SettingsError, match="KLAVIYO_AUTH_KEY_FILE: cannot read"):
        load(Settings, {})


@pytest.mark.usefixtures("environment")
def test_repr_contains_no_secret() -> None:
    """A traceback can contain the repr of the settings."""
    assert "s3cret" not in repr(load(Settings, {}))


def test_option_takes_precedence_over_the_environment(environment: pytest.MonkeyPatch) -> None:
    """The order is option, environment, default."""
    assert load(Settings, {}).lanes == 4
    environment.setenv("KLAVIYO_WORKER_LANES", "5")
    assert load(Settings, {"lanes": None}).lanes == 5
    assert load(Settings, {"lanes": "6"}).lanes == 6


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("suffix", ["", "_FILE"])
@pytest.mark.parametrize(("old", "new"), renamed.SETTINGS.items())
def test_former_variable_is_an_error_that_names_the_new_one(
    old: str, new: str, suffix: str, environment: pytest.MonkeyPatch
) -> None:
    """A variable with its former name is never ignored, unless it is empty."""
    environment.setenv(f"{old}{suffix}", "1")
    for kind in (Settings, QueueSettings):
        with pytest.raises(SettingsError) as error:
            load(kind, {})
        assert str(error.value) == f"{old}{suffix} was renamed: use {new}{suffix}"
    assert new in {info.validation_alias for info in Settings.model_fields.values()}
    environment.setenv(f"{old}{suffix}", "")
    load(Settings, {})


def test_former_dead_letter_mode_is_an_error_that_names_the_new_one(environment: pytest.MonkeyPatch) -> None:
    """`policy` replaced `queue`."""
    environment.setenv("KLAVIYO_WORKER_DEAD_LETTER_MODE", "queue")
    with pytest.raises(SettingsError) as error:
        load(Settings, {})
    assert str(error.value) == (
        "KLAVIYO_WORKER_DEAD_LETTER_MODE is malformed: Input should be 'policy' or 'direct' — policy: the queue "
        "dead-letters a message after its maximum number of attempts; direct: the worker dead-letters it immediately "
        "and adds the reason"
    )


def test_empty_variable_counts_as_not_set(environment: pytest.MonkeyPatch) -> None:
    """Compose files and manifests often set variables to empty values."""
    environment.setenv("KLAVIYO_API_URL", "")
    assert load(Settings, {}).klaviyo_api_url == "https://a.klaviyo.com"


def test_auth_url_can_be_the_token_endpoint(environment: pytest.MonkeyPatch) -> None:
    """CT_AUTH_URL names the host, with or without the path."""
    environment.setenv("CT_AUTH_URL", "https://auth.example.com/oauth/token/")
    assert load(Settings, {}).ct_token_url == "https://auth.example.com/oauth/token"


def test_default_queue_is_embedded() -> None:
    """The worker runs without a queue service."""
    assert load(QueueSettings, {}).queue_url.startswith("embedded://")


def test_environment_takes_precedence_over_the_mapping_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file takes precedence over the defaults."""
    file = tmp_path / "mapping.toml"
    file.write_text('locale = "de"\ncurrency = "EUR"\n[metrics]\nplaced_order = "Bestellung"\n')
    monkeypatch.setenv("PREFERRED_LOCALE", "fr-FR")
    mapping = load(MappingSettings, {"config": str(file)}).mapping()
    assert (mapping.locale, mapping.currency) == ("fr-FR", "EUR")
    assert mapping.metrics.placed_order == "Bestellung"
    assert mapping.metrics.ordered_product == "Ordered Product"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("locale = 5", "locale: "),
        ("colour = 'red'", "colour: "),
        ("[order]\nfulfilled_states = 'Complete'", "order.fulfilled_states: "),
        ("[category]\nmax_descendants = -1", "category.max_descendants: "),
        ("locale = ", "is not TOML"),
    ],
)
def test_mistake_in_the_mapping_file_names_the_key(text: str, expected: str, tmp_path: Path) -> None:
    """A misspelled key is not ignored."""
    file = tmp_path / "mapping.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as error:
        load_mapping(file)
    assert expected in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(("old", "new"), renamed.MAPPING_KEYS.items())
def test_former_mapping_key_is_an_error_that_names_the_new_one(old: str, new: str, tmp_path: Path) -> None:
    """The new key exists, and the former one does not."""
    file = tmp_path / "mapping.toml"
    file.write_text(f'{old} = ["Complete"]')
    with pytest.raises(SettingsError) as error:
        load_mapping(file)
    assert str(error.value) == f"{file}: {old} was renamed: use {new}"
    assert attrgetter(new)(MappingConfig()) is not None
    with pytest.raises(AttributeError):
        attrgetter(old)(MappingConfig())


def test_dead_letter_queue_url_is_an_option_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue needs the URL if it cannot find its dead letters."""
    monkeypatch.setenv("DEAD_LETTER_QUEUE_URL", "sqs://dead")
    assert load(QueueSettings, {}).queue_options.dead_letter_url == "sqs://dead"


def test_missing_mapping_file_is_an_error(tmp_path: Path) -> None:
    """The worker does not fall back to the defaults."""
    with pytest.raises(SettingsError, match="cannot read"):
        load_mapping(tmp_path / "missing.toml")
