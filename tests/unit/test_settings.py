"""Settings and the mapping file."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

import orjson
import pytest

from tests.support.company_proxy import Authority
from worker.errors import SettingsError
from worker.mapping import load_mapping
from worker.setting_sources import load
from worker.settings import MappingSettings, QueueSettings, Settings, unknown_variables

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
        ("CT_AUTH_URL", "ftp://auth.example.com"),
        ("CT_PROJECT_ID", "   "),
        ("CT_API_CLIENT", "id:s3cret"),
        ("CT_API_CLIENT", '{"clientId": "id", "s3cret": 1}'),
        ("CT_API_CLIENT", '{"clientId": "id", "secret": 53}'),
        ("CT_API_CLIENT", '["id", "s3cret"]'),
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


REGION = "europe-west1.gcp.commercetools.com"
CLIENT = '{"clientId": "id", "secret": "s3cret"}'


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("KLAVIYO_AUTH_KEY", " pk_s3cret", "has a blank or a line break at its start or end: remove it"),
        ("KLAVIYO_AUTH_KEY", "pk_s3cret\n", "has a blank or a line break at its start or end: remove it"),
        ("KLAVIYO_AUTH_KEY", "pk_ s3cret", "contains a blank or another character that no key contains: copy the "),
        ("KLAVIYO_AUTH_KEY", "pk_s3cret\nx", "contains a blank or another character that no key contains: copy the "),
        ("KLAVIYO_AUTH_KEY", "pk_s3crét", "contains a blank or another character that no key contains: copy the "),
        ("KLAVIYO_AUTH_KEY", "s3cret", "is a public key: use a private key, which starts with pk_"),
        ("KLAVIYO_AUTH_KEY", "0123456789s3cret", "does not start with pk_: copy the whole private key"),
        ("KLAVIYO_AUTH_KEY", '"pk_s3cret"', "is enclosed in quotes: remove them: they are a part of the value"),
        ("KLAVIYO_AUTH_KEY", "Klaviyo-API-Key pk_s3cret", "contains Klaviyo-API-Key: write only the key, like pk_…"),
        ("CT_API_CLIENT", orjson.dumps(CLIENT).decode(), "is quoted twice: it is a JSON text that contains JSON: "),
        ("CT_API_CLIENT", f"'{CLIENT}'", "is enclosed in quotes: remove them: they are a part of the value"),
        ("CT_API_CLIENT", CLIENT.replace('"', '\\"'), 'contains \\" instead of ": remove the backslashes'),
        ("CT_API_CLIENT", CLIENT.replace('"', "'"), "uses single quotes: JSON requires double quotes, {"),
        ("CT_API_CLIENT", CLIENT.replace('"', ""), "has lost its double quotes: enclose the JSON in single quotes in "),
        ("CT_API_CLIENT", b64encode(CLIENT.encode()).decode(), "is encoded as base64: decode it"),
        ("CT_API_CLIENT", '{"client_id": "id", "client_secret": "s3cret"}', "contains client_id and client_secret: "),
        ("CT_API_CLIENT", CLIENT.replace("id", "id "), "has a blank at the start or the end of clientId or secret: "),
        ("CT_API_URL", "user:s3cret@api.example.com", "does not start with https://: add it"),
        ("CT_API_URL", "http://api.example.com", "starts with http://: write https://; http:// is accepted only for "),
        ("CT_API_URL", "https://user:s3cret@api.example.com", "contains a user: remove USER:PASSWORD@"),
        ("CT_API_URL", "'https://api.example.com'", "is enclosed in quotes: remove them: they are a part of the value"),
        (
            "CT_API_URL",
            "https://api.example.com/shop/",
            "ends with the project key: remove it, CT_PROJECT_ID contains ",
        ),
        ("CT_API_URL", f"https://mc.{REGION}", f"is the URL of another service, mc: write https://api.{REGION}"),
        ("CT_AUTH_URL", f"https://api.{REGION}", f"is the URL of another service, api: write https://auth.{REGION}"),
        ("CT_SCOPE", "manage_my_orders view_orders:other", "is for the project other, but CT_PROJECT_ID is shop: "),
        ("KLAVIYO_API_URL", "https://a.klaviyo.com/api/", "ends with /api: remove it, the worker adds it"),
        ("QUEUE_URL", '"embedded://"', "is enclosed in quotes: remove them: they are a part of the value"),
    ],
)
def test_frequent_mistake_is_named_in_one_line(
    name: str, value: str, expected: str, environment: pytest.MonkeyPatch
) -> None:
    """The line contains no secret."""
    environment.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        load(Settings, {})
    assert str(error.value).startswith(f"{name} {expected}")
    assert "\n" not in str(error.value)
    assert "s3cr" not in str(error.value)


def test_regions_of_both_urls_are_compared(environment: pytest.MonkeyPatch) -> None:
    """A client of commercetools exists only in the region of its project."""
    environment.setenv("CT_API_URL", f"https://api.{REGION}")
    environment.setenv("CT_AUTH_URL", "https://auth.us-central1.gcp.commercetools.com/oauth/token")
    with pytest.raises(SettingsError) as error:
        load(Settings, {})
    assert str(error.value) == (
        f"CT_AUTH_URL is in us-central1.gcp.commercetools.com, but CT_API_URL is in {REGION}: use the URLs of the "
        "region in which the project is"
    )
    environment.setenv("CT_AUTH_URL", f"https://auth.{REGION}/oauth/token")
    environment.setenv("CT_SCOPE", "view_orders:shop manage_my_orders:shop introspect_oauth_tokens")
    assert load(Settings, {}).ct_token_url == f"https://auth.{REGION}/oauth/token"


def test_unknown_variables_are_named() -> None:
    """The closest setting is named. Variables that Kubernetes adds for a Service are not mistakes."""
    kubernetes = (
        "SERVICE_HOST",
        "SERVICE_PORT_HTTP",
        "PORT",
        "PORT_9090_TCP",
        "PORT_9090_TCP_ADDR",
        "API_SERVICE_HOST",
    )
    known = ("KLAVIYO_WORKER_LANES", "KLAVIYO_WORKER_DESTINATION_SECRET_FILE", "PATH")
    names = [*(f"KLAVIYO_WORKER_{name}" for name in kubernetes), *known]
    assert list(unknown_variables(names)) == []
    assert list(unknown_variables([*names, "KLAVIYO_WORKER_LANE", "KLAVIYO_WORKER_X"])) == [
        "KLAVIYO_WORKER_LANE is not a setting: is KLAVIYO_WORKER_LANES meant?",
        "KLAVIYO_WORKER_X is not a setting: remove it",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\xef\xbb\xbfpk_file\r\n", "pk_file"), (b"\n pk_file \n", "pk_file"), ("pk_file".encode("utf-16"), "")],
)
def test_file_of_a_windows_editor(
    content: bytes, expected: str, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A byte order mark and line breaks are not a part of the secret."""
    file = tmp_path / "key"
    file.write_bytes(content)
    environment.delenv("KLAVIYO_AUTH_KEY")
    environment.setenv("KLAVIYO_AUTH_KEY_FILE", str(file))
    if expected:
        assert load(Settings, {}).klaviyo_auth_key.get_secret_value() == expected
    else:
        with pytest.raises(SettingsError, match=r"^KLAVIYO_AUTH_KEY_FILE: .* is not UTF-8: save it as UTF-8$"):
            load(Settings, {})


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1.nip.io",
        "http://localhost.example.com",
        "http://localhost@example.com",
        "http://example.com#@127.0.0.1",
        "http://127.0.0.1\\@example.com",
        "http://[::ffff:10.0.0.1]",
        "http://0.0.0.0",
        "http://2130706433",
        "http://127.1",
        "HTTP://example.com",
        "https://",
        "//a",
    ],
)
@pytest.mark.parametrize("name", ["CT_API_URL", "CT_AUTH_URL", "KLAVIYO_API_URL"])
def test_other_machine_cannot_pass_for_this_one(name: str, url: str, environment: pytest.MonkeyPatch) -> None:
    """Forms that some libraries resolve to this machine, and hosts that only look like it."""
    environment.setenv(name, url)
    with pytest.raises(SettingsError, match=name):
        load(Settings, {})


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


def test_error_for_a_value_that_is_not_a_choice_lists_the_choices(environment: pytest.MonkeyPatch) -> None:
    """The description of the setting explains them."""
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
        ('[metrics]\nplaced_order = ""', "metrics.placed_order: String should have at least 1 character"),
        (f'[metrics]\nreturned_order = "{"x" * 128}"', "metrics.returned_order: String should have at most 127"),
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


def test_dead_letter_queue_url_is_an_option_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue needs the URL if it cannot find its dead letters."""
    monkeypatch.setenv("DEAD_LETTER_QUEUE_URL", "sqs://dead")
    assert load(QueueSettings, {}).queue_options.dead_letter_url == "sqs://dead"


def test_missing_mapping_file_is_an_error(tmp_path: Path) -> None:
    """The worker does not fall back to the defaults."""
    with pytest.raises(SettingsError, match="cannot read"):
        load_mapping(tmp_path / "missing.toml")


@pytest.mark.usefixtures("environment")
def test_certificate_and_key_of_the_http_port_belong_together(tmp_path: Path) -> None:
    """The worker would otherwise refuse every probe, and be restarted again and again."""
    authority = Authority(tmp_path)
    good, other = (str(authority.certificate(name)) for name in ("localhost", "other"))
    (tmp_path / "empty.pem").write_bytes(b"")

    def error(certificate: str, key: str) -> str:
        options = {"http_tls_certificate": certificate or None, "http_tls_key": key or None}
        with pytest.raises(SettingsError) as raised:
            load(Settings, options)
        return str(raised.value).removeprefix("KLAVIYO_WORKER_HTTP_TLS_KEY and KLAVIYO_WORKER_HTTP_TLS_CERTIFICATE ")

    assert load(Settings, {"http_tls_certificate": good, "http_tls_key": good}).http_tls_key == Path(good)
    assert error(good, "") == error("", good) == "belong together: set both, or neither"
    todo = "check both files, which must be PEM"
    assert error(good, other) == f"cannot be used: they are not a certificate and its key: {todo}"
    assert error(good, str(tmp_path / "empty.pem")) == f"cannot be used: they are not a certificate and its key: {todo}"
    assert error(good, str(tmp_path / "none.pem")) == f"cannot be used: No such file or directory: {todo}"
