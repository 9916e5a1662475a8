"""The client of AWS SQS, its retries, and the classification of its errors."""

from __future__ import annotations

import os
from http import HTTPStatus
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from adapters.base import QueueError
from adapters.shared import proxy
from adapters.shared.loopback import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_boto3_sqs import SQSClient

    P = ParamSpec("P")
    T = TypeVar("T")

CONNECT_TIMEOUT, READ_TIMEOUT = 3, 10  # seconds; longer than a long poll, much shorter than a lease
BOTO_ATTEMPTS = 2  # per call; the adapter makes further retries itself, because they must end when the worker stops
CONNECTIONS = 48  # in boto3's pool: for receivers, settlement, and a call of each lane
RETRY_TIMEOUT = 10.0  # seconds for which `with_retries` repeats a call
_SDK_ERRORS = (boto.BotoCoreError, boto.ClientError, ResponseParserError)
# Errors of a call and of parsing its response. A proxy can send a response that boto3 or the adapter cannot parse.
ERRORS = (*_SDK_ERRORS, AttributeError, LookupError, TypeError, ValueError)
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
)
_PERMANENT = (*_NO_CREDENTIALS, boto.ParamValidationError)
_THROTTLING = frozenset({"OverLimit", "TooManyRequestsException", "RequestTimeout"})
_TRANSIENT_STATUSES = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})  # also of a proxy
_DENIED = frozenset({"AccessDenied", "AccessDeniedException"})
_ENCRYPTED = "expected an https:// URL (http:// for this machine only)"
_SET_REGION = "write sqs://NAME?region=REGION, or set AWS_DEFAULT_REGION"
_SKEWED = ("Signature expired", "Signature not yet current")  # of the code SignatureDoesNotMatch
_CREDENTIALS_ADVICE = {
    "InvalidClientTokenId": "check AWS_ACCESS_KEY_ID, and AWS_SESSION_TOKEN if the key is temporary",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "renew the temporary credentials",
}
_SET_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run under a role"


def connect(region: str = "") -> SQSClient:
    """Return a thread-safe client. Raises QueueError if AWS's own settings are incomplete or invalid.

    Credentials come from boto3's chain, and the endpoint from AWS_ENDPOINT_URL_SQS if it is set. Containers set
    AWS_REGION, which boto3 does not read, so this function reads it.
    """
    config = Config(
        retries={"mode": "standard", "total_max_attempts": BOTO_ATTEMPTS},
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        tcp_keepalive=True,
    )
    try:
        session = boto3.Session(region_name=region or None)
        client = session.client("sqs", region_name=session.region_name or os.environ.get("AWS_REGION"), config=config)
    except boto.NoRegionError:
        raise QueueError("QUEUE_URL: no AWS region", todo=_SET_REGION) from None
    except (boto.BotoCoreError, ValueError) as error:  # a missing profile, an invalid endpoint
        raise QueueError(f"QUEUE_URL: AWS's own settings are invalid: {error}") from None
    endpoint = urlsplit(client.meta.endpoint_url)
    if endpoint.scheme != "https" and not is_loopback(endpoint.hostname or ""):
        raise QueueError(f"AWS_ENDPOINT_URL_SQS: {endpoint.netloc}", todo=_ENCRYPTED)
    return client


def label(client: SQSClient, name: str) -> str:
    """Return a queue's name with its region, because each region has its own queues."""
    return f"{name} in {client.meta.region_name}"


def with_retries(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Make a call, and retry it for `RETRY_TIMEOUT` seconds after transient errors. Raises one of `ERRORS`."""
    retrying = Retrying(
        stop=stop_after_delay(RETRY_TIMEOUT),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        retry=retry_if_exception(lambda error: isinstance(error, ERRORS) and not is_refusal(error)),
        reraise=True,
    )
    return retrying(call, *arguments, **named)


def is_refusal(error: BaseException) -> bool:
    """Return whether the call fails until an operator fixes the cause: a 4xx response, or missing credentials."""
    if not isinstance(error, boto.ClientError):
        return isinstance(error, _PERMANENT)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    is_transient = status in _TRANSIENT_STATUSES or is_throttling(error_code(error))
    return HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and not is_transient


def is_throttling(code: str) -> bool:
    """Return whether an error code asks the client to retry later."""
    return "Throttl" in code or code in _THROTTLING


def is_denied(error: BaseException) -> bool:
    """Return whether a permission is missing."""
    return error_code(error) in _DENIED


def is_missing(error: BaseException) -> bool:
    """Return whether the queue does not exist. AWS has two error codes for that."""
    return error_code(error).endswith(("NonExistentQueue", "QueueDoesNotExist"))


def error_code(error: BaseException) -> str:
    """Return AWS's error code, or the class name of the error if it has none."""
    details = error.response.get("Error", {}) if isinstance(error, boto.ClientError) else {}
    return details.get("Code", type(error).__name__)


def first_line(error: BaseException) -> str:
    """Return the error text as one line. If AWS refused the signature, the other lines quote headers with the token."""
    if not isinstance(error, _SDK_ERRORS):
        return f"the response is not from SQS ({type(error).__name__})"
    return str(error).partition("\n")[0]


def explain(error: BaseException, queue: str) -> tuple[str, str]:
    """Return what is wrong with `queue`, a label, and what to do about it ("" if there is no advice)."""
    if is_missing(error):
        return f"{queue} does not exist", "create it, or correct its name or region in the URL"
    if isinstance(error, boto.ProxyConnectionError) and proxy.is_refusal(str(error.kwargs["error"])):
        return f"cannot reach SQS for {queue}: {proxy.REFUSED}", proxy.ADVICE
    if _is_clock_skew(error):
        return (
            f"SQS refuses the signature because of its time: {first_line(error)}",
            "synchronize the clock of this machine",
        )
    if advice := _CREDENTIALS_ADVICE.get(error_code(error)):
        return f"SQS refuses the credentials ({error_code(error)})", advice
    if isinstance(error, _NO_CREDENTIALS):
        return f"no AWS credentials ({type(error).__name__})", _SET_CREDENTIALS
    if is_denied(error):
        return f"not permitted to use {queue}: {first_line(error)}", ""
    if is_refusal(error):
        return f"SQS refuses requests for {queue}: {first_line(error)}", ""
    return f"cannot reach SQS for {queue}: {first_line(error)}", ""


def _is_clock_skew(error: BaseException) -> bool:
    """Return whether the time of the signature is too far from AWS's."""
    text = str(error)
    return error_code(error) == "RequestTimeTooSkewed" or any(phrase in text for phrase in _SKEWED)


def queue_error(error: BaseException, queue: str, setting: str = "QUEUE_URL") -> QueueError:
    """Return an error that explains `error`; `setting` names the setting of `queue`."""
    reason, todo = explain(error, queue)
    return QueueError(f"{setting}: {reason}", todo=todo)
