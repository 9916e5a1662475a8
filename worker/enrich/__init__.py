"""The enrich stage: adds commercetools data to notifications. No other stage reads commercetools.

Each resource type has a plan: a generator that is written for a single notification. It yields the lookups that it
needs next, and continues when their results have been fetched. All plans of a batch run in step, and the lookups of
each step are merged. A batch therefore needs about as many queries as a single message.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from worker.budget import check_lookups
from worker.enrich import carts, payments, plans, products
from worker.enrich.plans import PlanContext
from worker.enrich.related import with_related
from worker.errors import WorkerError
from worker.json_access import MAX_ID_LENGTH
from worker.model import Enriched
from worker.telemetry.defects import describe_defect, report_defect

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from worker.commercetools import queries
    from worker.enrich.plans import Plan
    from worker.mapping import MappingConfig
    from worker.model import Notification

Result = Enriched | WorkerError

MESSAGE_PLANS: dict[str, Callable[[Enriched, PlanContext], Plan]] = {
    "OrderPaymentAdded": payments.order_payment_plan,
}  # instead of the plan of the resource type
PLANS: dict[str, Callable[[Enriched, PlanContext], Plan]] = defaultdict(
    lambda: plans.empty_plan,
    {
        "order": plans.order_plan,
        "payment": payments.payment_plan,
        "cart": carts.cart_plan,
        "customer": plans.customer_plan,
        "category": with_related(plans.category_plan),
        "product": with_related(products.product_plan),
        "inventory-entry": with_related(products.inventory_entry_plan),
        "standalone-price": with_related(products.standalone_price_plan),
    },
)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Enricher:
    """Adds commercetools data to the notifications of a batch.

    With an executor, the queries of a step are concurrent.
    """

    def __init__(
        self,
        reader: queries.Reader,
        mapping: MappingConfig,
        executor: Executor | None = None,
        *,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._reader = reader
        self._mapping = mapping
        self._executor = executor
        self._now = now

    def enrich(self, notifications: Sequence[Notification]) -> list[Result]:
        """Return, for each notification in order, the notification with its data or the error that prevented it."""
        context = PlanContext(self._mapping)
        now = self._now()
        running = [_plan_of(n)(Enriched(n, now), context) for n in notifications]
        results: list[Result | None] = [None] * len(running)
        while pending := [index for index, result in enumerate(results) if result is None]:
            lookups: dict[queries.Query, set[str]] = defaultdict(set)
            for index in pending:
                results[index] = _advance(running[index], lookups)
            self._fetch(lookups, context)
        return [result for result in results if result is not None]

    def _fetch(self, lookups: dict[queries.Query, set[str]], context: PlanContext) -> None:
        wanted = {query: missing for query, values in lookups.items() if (missing := context.missing(query, values))}
        run = self._executor.map if self._executor and len(wanted) > 1 else map
        for query, result in zip(wanted, run(self._reader.find, wanted, wanted.values()), strict=True):
            context.add(query, result)


def _plan_of(notification: Notification) -> Callable[[Enriched, PlanContext], Plan]:
    return MESSAGE_PLANS.get(notification.type) or PLANS[notification.resource_type]


def _advance(plan: Plan, lookups: dict[queries.Query, set[str]]) -> Result | None:
    """Advance a plan by one step. Return its result if it has ended; otherwise add its lookups and return None."""
    try:
        for query, values in next(plan):
            # A longer value is the id of nothing in commercetools.
            ids = {value for value in values if 0 < len(value) <= MAX_ID_LENGTH}
            check_lookups(len(ids))
            lookups[query] |= ids
    except StopIteration as end:
        enriched: Enriched = end.value
        return enriched
    except WorkerError as error:
        return error
    except Exception as defect:  # noqa: BLE001 - a defect must not affect the other messages
        return report_defect("enrich", describe_defect(defect))
    return None
