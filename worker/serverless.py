"""The AWS Lambda entry point, for an SQS event source.

The event source mapping must have `FunctionResponseTypes: [ReportBatchItemFailures]`. Without it Lambda ignores the
response and deletes all messages, even those that failed. docs/sqs.md has a template. `CT_API_CLIENT_SECRET` and
`KLAVIYO_AUTH_KEY_SECRET` name secrets in AWS Secrets Manager.
"""

from __future__ import annotations

import os
from functools import cache
from threading import Timer
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from adapters.sqs.lambda_event import LambdaQueue
from worker.errors import Misconfigured, SettingsError
from worker.pipeline import Pipeline
from worker.runtime.runner import Runner, ShutdownTimeoutError
from worker.service import Components
from worker.setting_sources import load
from worker.settings import Settings
from worker.telemetry.log import configure_logging, log
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECRETS = {"ct_api_client": "CT_API_CLIENT", "klaviyo_auth_key": "KLAVIYO_AUTH_KEY"}
STOP_BEFORE = 5.0  # seconds; when Lambda ends the function in less than this time, no more messages are started
GRACE_SECONDS = 4.0  # the part of STOP_BEFORE in which messages in progress can be finished


class Context(Protocol):
    """The part of Lambda's context object that the handler uses."""

    def get_remaining_time_in_millis(self) -> int:
        """Return the milliseconds until Lambda ends the function."""


def sqs_handler(event: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Process the messages of an SQS event. Return the ids of those to redeliver: `{"batchItemFailures": […]}`.

    Held messages are retried until STOP_BEFORE. Raises SettingsError if a setting is invalid and QueueError if the
    event is not from SQS. SQS then redelivers the whole batch.
    """
    batch = LambdaQueue(event, _seconds_left(context))
    # Lambda's default timeout is 3 s. The queue would dead-letter every message unprocessed.
    if batch.lease_seconds <= STOP_BEFORE:
        found = f"the function has {batch.lease_seconds:.0f} s, expected more than {STOP_BEFORE:.0f}"
        raise SettingsError(f"Timeout: {found}", todo="set 60")
    settings, telemetry, components = _warm_state()
    pipeline = Pipeline(
        batch,
        components.enricher.enrich,
        components.sender.send,
        components.mapping,
        telemetry,
        project=settings.ct_project_id,
    )
    runner = Runner(batch, pipeline, components, settings, telemetry, components.stopping)
    # The remaining time is read again, because a cold start takes seconds.
    timer = Timer(_seconds_left(context) - STOP_BEFORE, runner.stop)
    timer.start()
    is_refused = False
    try:
        runner.run(once=True, max_wait=batch.lease_seconds)
    except (Misconfigured, ShutdownTimeoutError) as error:
        is_refused = isinstance(error, Misconfigured)
        log.error("batch_incomplete", extra={"reason": str(error), "returned": len(batch.failed_ids())})
    finally:
        timer.cancel()
        # Stopped clients cannot be started again, and a secret that is refused has possibly been replaced.
        if is_refused or components.stopping.is_set():
            components.close()
            _warm_state.cache_clear()
    return {"batchItemFailures": [{"itemIdentifier": name} for name in batch.failed_ids()]}


def _seconds_left(context: Context) -> float:
    """Return the seconds until Lambda ends the function."""
    return context.get_remaining_time_in_millis() / 1000


class _WarmState(NamedTuple):
    """State that is kept between invocations: connections, tokens, rate limits, the commercetools cache."""

    settings: Settings
    telemetry: Telemetry
    components: Components


@cache
def _warm_state() -> _WarmState:
    settings = load(Settings, {"shutdown_grace_period": GRACE_SECONDS, **_secrets()})
    configure_logging(settings.log_level, settings.log_format)
    telemetry = Telemetry(Metrics("sqs"))
    return _WarmState(settings, telemetry, Components(settings, telemetry))


def _secrets() -> dict[str, str]:
    """Return the secrets that are in AWS Secrets Manager, by field of the settings. Raises SettingsError."""
    found = {}
    for field, name in _SECRETS.items():
        secret = os.environ.get(f"{name}_SECRET", "")
        if not secret:
            continue
        try:
            found[field] = boto3.client("secretsmanager").get_secret_value(SecretId=secret)["SecretString"].strip()
        except KeyError:
            raise SettingsError(f"{name}_SECRET: the secret is binary", todo="store it as text") from None
        except (BotoCoreError, ClientError) as error:
            code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
            todo = "allow the function's role secretsmanager:GetSecretValue, and check the name"
            raise SettingsError(f"{name}_SECRET: cannot read the secret ({code})", todo=todo) from None
    return found
