"""A client of AWS SQS, and what the errors of its calls mean."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from adapters.base import QueueError
from adapters.shared.loopback import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_boto3_sqs import SQSClient

    P = ParamSpec("P")
    T = TypeVar("T")

CONNECT_TIMEOUT, READ_TIMEOUT = 3, 10  # seconds; a long poll must end before, a lease long after
ATTEMPTS = 2  # of a call; all that insists is our own, as it must end when the worker does
CONNECTIONS = 48  # that are kept: receivers, settlement, and a call of each lane
PATIENCE = 10.0  # seconds to reach SQS for a call that nothing depends on but its caller
_THEIRS = (boto.BotoCoreError, boto.ClientError, ResponseParserError)
# All that a call raises, and the reading of its answer: boto3 trips over what a proxy says, or we do.
ERRORS = (*_THEIRS, AttributeError, LookupError, TypeError, ValueError)
_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
)
_IN_VAIN = (*_NO_CREDENTIALS, boto.ParamValidationError)
_BUSY = frozenset({"OverLimit", "TooManyRequestsException", "RequestTimeout"})
_PASSING = frozenset({408, 429})  # answers of 4xx, also of a proxy, that are over by themselves
_DENIED = frozenset({"AccessDenied", "AccessDeniedException"})
_ENCRYPTED = "expected an https:// URL (http:// for this machine only)"
_SET_REGION = "write sqs://NAME?region=REGION, or set AWS_DEFAULT_REGION"
_SET_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run under a role"


def connect(region: str = "") -> SQSClient:
    """Return a client, for any number of threads. Raises QueueError where AWS's own settings are incomplete.

    Credentials come by boto3's chain, the endpoint by AWS_ENDPOINT_URL_SQS where it is set. boto3 itself does not
    read AWS_REGION, which containers have.
    """
    config = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
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
    except (boto.BotoCoreError, ValueError) as error:  # a profile that is not there, an endpoint that is no URL
        raise QueueError(f"QUEUE_URL: AWS's own settings are no use: {error}") from None
    endpoint = urlsplit(client.meta.endpoint_url)
    if endpoint.scheme != "https" and not is_loopback(endpoint.hostname or ""):
        raise QueueError(f"AWS_ENDPOINT_URL_SQS: {endpoint.netloc}", todo=_ENCRYPTED)
    return client


def insist(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Make a call, again and again for `PATIENCE` seconds while it may still succeed. Raises one of `ERRORS`."""
    retrying = Retrying(
        stop=stop_after_delay(PATIENCE),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        retry=retry_if_exception(lambda error: isinstance(error, ERRORS) and not is_refusal(error)),
        reraise=True,
    )
    return retrying(call, *arguments, **named)


def is_refusal(error: BaseException) -> bool:
    """Tell whether a call will fail until somebody mends something: an answer of 4xx, or no credentials."""
    if not isinstance(error, boto.ClientError):
        return isinstance(error, _IN_VAIN)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    passes = status in _PASSING or is_throttling(code(error))
    return 400 <= status < 500 and not passes  # noqa: PLR2004


def is_throttling(name: str) -> bool:
    """Tell whether a code asks for fewer calls, or the same one again."""
    return "Throttl" in name or name in _BUSY


def is_denied(error: BaseException) -> bool:
    """Tell whether a permission is missing."""
    return code(error) in _DENIED


def is_missing(error: BaseException) -> bool:
    """Tell whether there is no such queue: AWS has two names for that."""
    return code(error).endswith(("NonExistentQueue", "QueueDoesNotExist"))


def code(error: BaseException) -> str:
    """Return what AWS calls the error, or its class."""
    answered = error.response.get("Error", {}) if isinstance(error, boto.ClientError) else {}
    return answered.get("Code", type(error).__name__)


def reason(error: BaseException) -> str:
    """Describe the error in one line: the next ones of a refused signature quote the headers, with their token."""
    if not isinstance(error, _THEIRS):
        return f"the answer is not one of SQS ({type(error).__name__})"
    return str(error).partition("\n")[0]


def explain(error: BaseException, queue: str) -> tuple[str, str]:
    """Return what is wrong with `queue`, and what to do about it ("" if that is not known)."""
    if is_missing(error):
        return f"{queue} does not exist", "create it, or correct name or region"
    if isinstance(error, _NO_CREDENTIALS):
        return f"no AWS credentials ({type(error).__name__})", _SET_CREDENTIALS
    if is_denied(error):
        return f"not permitted on {queue}: {reason(error)}", ""
    if is_refusal(error):
        return f"SQS refuses {queue}: {reason(error)}", ""
    return f"cannot reach SQS for {queue}: {reason(error)}", ""


def queue_error(error: BaseException, queue: str, about: str = "QUEUE_URL") -> QueueError:
    """Return an error that explains `error`; `about` is the setting that names `queue`."""
    reason, todo = explain(error, queue)
    return QueueError(f"{about}: {reason}", todo=todo)
