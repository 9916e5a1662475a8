"""AWS Lambda: an SQS event source brings the messages, and takes back those that are not done.

The event source mapping must have `FunctionResponseTypes: [ReportBatchItemFailures]`. Without it Lambda ignores the
answer and deletes all messages, those too that failed. docs/sqs.md has a template.
"""

from __future__ import annotations

from functools import cache
from threading import Timer
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from adapters.sqs.lambda_event import SQSEvent
from worker.errors import Misconfigured, SettingsError
from worker.pipeline import Pipeline
from worker.runtime.runner import Runner, ShutdownTimeoutError
from worker.service import Components
from worker.settings import Settings, load
from worker.telemetry.log import configure_logging, log
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

STOP_BEFORE = 5.0  # seconds before Lambda ends the function; nothing is begun any more
GRACE_SECONDS = 4.0  # of them for what is in work


class Context(Protocol):
    """What Lambda tells of an invocation."""

    def get_remaining_time_in_millis(self) -> int:
        """Return the milliseconds until Lambda ends the function."""


def sqs_handler(event: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Handle the records of an SQS event. Returns which of them must come again: `{"batchItemFailures": […]}`.

    What cannot be handled yet is tried again until the function's time is nearly over. Raises SettingsError, and
    QueueError when the event is of something else; the whole batch comes again then.
    """
    batch = SQSEvent(event, _left(context))
    if batch.lease_seconds <= STOP_BEFORE:  # Lambda's default; nothing would ever be done, and all be buried
        found = f"the function has {batch.lease_seconds:.0f} s, expected more than {STOP_BEFORE:.0f}"
        raise SettingsError(f"Timeout: {found}", todo="set 60")
    warm = _warm()
    stages = warm.stages
    pipeline = Pipeline(batch, stages.enricher.enrich, stages.sender.send, stages.mapping, warm.telemetry)
    runner = Runner(batch, pipeline, warm.settings, warm.telemetry, stages.stopping)
    timer = Timer(_left(context) - STOP_BEFORE, runner.stop)  # asked again: a cold start takes its time
    timer.start()
    try:
        runner.run(once=True, max_wait=batch.lease_seconds)
    except (Misconfigured, ShutdownTimeoutError) as error:
        log.error("batch_incomplete", extra={"reason": str(error), "returned": len(batch.left())})
    finally:
        timer.cancel()
        if stages.stopping.is_set():  # its clients have given up for good
            stages.sender.close()
            _warm.cache_clear()
    return {"batchItemFailures": [{"itemIdentifier": name} for name in batch.left()]}


def _left(context: Context) -> float:
    """Return the seconds until Lambda ends the function."""
    return context.get_remaining_time_in_millis() / 1000


class _Warm(NamedTuple):
    """What is kept from one invocation to the next: connections, tokens, limits, what is remembered of the catalog."""

    settings: Settings
    telemetry: Telemetry
    stages: Components


@cache
def _warm() -> _Warm:
    settings = load(Settings, {"shutdown_grace_period": GRACE_SECONDS})
    configure_logging(settings.log_level, settings.log_format)
    telemetry = Telemetry(Metrics("sqs"))
    return _Warm(settings, telemetry, Components(settings, telemetry))
