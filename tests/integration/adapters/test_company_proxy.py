"""The clients of the queues, through a company's proxy."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from typing import TYPE_CHECKING

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.api_core.retry import Retry, if_exception_type

from adapters import QueueError, QueueOptions, open_queue
from adapters.push.oidc import KeysUnavailableError, TokenVerifier
from adapters.servicebus.queue import ServiceBusQueue
from tests.support import sqs_fakes as sqs
from tests.support.company_proxy import Authority, CompanyProxy
from worker import network

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.pubsub_emulator import Emulator

SQS = "sqs.eu-central-1.amazonaws.com"


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    made = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(made.bundle))
    return made


@pytest.fixture
def aws(moto: sqs.Server, monkeypatch: pytest.MonkeyPatch) -> sqs.Server:
    for name, value in sqs.environment(moto.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_SQS")
    return moto


def refusal(url: str) -> str:
    queue = open_queue(url)
    with closing(queue), pytest.raises(QueueError) as error:
        queue.check()
    return str(error.value)


def test_sqs(authority: Authority, aws: sqs.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 knows neither ALL_PROXY nor SSL_CERT_FILE."""
    with CompanyProxy(authority, {SQS: aws.port}) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url())
        network.configure(os.environ)
        text = refusal(f"https://{SQS}/123456789012/none")
        assert text.startswith("QUEUE_URL: none in eu-central-1 does not exist")
        assert set(proxy.statuses) == {(SQS, 200)}


@pytest.mark.usefixtures("aws")
def test_refused_password_for_sqs(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3's own error says only that the connection failed."""
    monkeypatch.setattr("adapters.sqs.client.RETRY_TIMEOUT", 0.0)
    with CompanyProxy(authority, {}) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url("worker:wr0ng"))
        network.configure(os.environ)
        text = refusal(f"https://{SQS}/123456789012/none")
    assert text == (
        "QUEUE_URL: cannot reach SQS for none in eu-central-1: the proxy refuses user and password (407): correct them "
        "in HTTPS_PROXY, and percent-encode special characters"
    )


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials with which Google's library signs its own tokens."""
    file = tmp_path / "account.json"
    file.write_text(json.dumps(service_account()))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))


@pytest.mark.usefixtures("google")
def test_pubsub(authority: Authority, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gRPC library knows only lower-case names, and no SSL_CERT_FILE.

    It reads the authorities that it trusts once per process, so the queue is opened in a process of its own.
    """
    with CompanyProxy(authority, {"pubsub.googleapis.com": emulator.port}) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url())
        network.configure(os.environ)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            text = pool.submit(refusal, "pubsub://demo/none").result()
        assert text.startswith("QUEUE_URL: projects/demo/subscriptions/none does not exist")
        assert set(proxy.statuses) == {("pubsub.googleapis.com", 200)}


@pytest.mark.usefixtures("google")
def test_refused_password_for_pubsub(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gRPC library reports a service that is not available."""
    monkeypatch.setattr("adapters.pubsub.queue._RETRY", Retry(predicate=if_exception_type(), timeout=1.0))
    with CompanyProxy(authority, {}) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url("worker:wr0ng"))
        network.configure(os.environ)
        text = refusal("pubsub://demo/none")
    assert text == (
        "QUEUE_URL: cannot reach Pub/Sub for projects/demo/subscriptions/none: the proxy refuses user and password "
        "(407): correct them in HTTPS_PROXY, and percent-encode special characters"
    )


def test_keys_of_google(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that fetches them does not know ALL_PROXY."""
    token = jwt.encode({}, PRIVATE, algorithm="RS256", headers={"kid": "1"})
    with CompanyProxy(authority, {"www.googleapis.com": 9}) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url())
        network.configure(os.environ)
        with pytest.raises(KeysUnavailableError):
            TokenVerifier("a", "b").verify(f"Bearer {token}")
        assert proxy.statuses == [("www.googleapis.com", 200)]


def test_service_bus(authority: Authority) -> None:
    """Azure's library reads no variable."""
    key = "Endpoint=sb://shop.servicebus.windows.net/;SharedAccessKeyName=k;SharedAccessKey=c2VjcmV0"
    queue = open_queue("servicebus://shop.servicebus.windows.net/q", QueueOptions(connection_string=key))
    with closing(queue):
        assert isinstance(queue, ServiceBusQueue)
        assert queue._client._connection_verify == str(authority.bundle)


PRIVATE = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def service_account() -> dict[str, str]:
    """Return a key file, with which Google's library signs tokens without a request."""
    key = PRIVATE.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {
        "type": "service_account",
        "project_id": "demo",
        "private_key_id": "1",
        "private_key": key.decode(),
        "client_email": "worker@demo.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }
