"""Any history of changes, messages, workers and failures ends with Klaviyo as commercetools is."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, currently_in_test_context, note, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.model.shop import Change, ShopModel
from tests.model.simulation import Process, Simulation, simulated
from tests.model.world import COMMERCETOOLS, KLAVIYO, LEASE, Pool, World
from worker import service
from worker.http import transport
from worker.klaviyo import client
from worker.runtime.runner import ShutdownTimeoutError
from worker.sandbox.commercetools.api import CLIENT_ID, CLIENT_SECRET
from worker.sandbox.envelopes import bare
from worker.sandbox.faults import Fault
from worker.sandbox.klaviyo.account import BULK_REPEATS
from worker.sandbox.klaviyo.api import KEY
from worker.sandbox.klaviyo.catalog import PREFIX
from worker.sandbox.notifications import change
from worker.send.bulk_verdict import IGNORED, PROBE_PROFILE, REPEATS
from worker.setting_sources import load
from worker.settings import Settings
from worker.telemetry.log import log
from worker.telemetry.message_log import Telemetry
from worker.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "60"))
OPTIONS = {
    "ct_api_url": f"https://{COMMERCETOOLS}",
    "ct_auth_url": f"https://{COMMERCETOOLS}",
    "ct_project_id": "sandbox-shop",
    "ct_api_client": f'{{"clientId": "{CLIENT_ID}", "secret": "{CLIENT_SECRET}"}}',
    "klaviyo_api_url": f"https://{KLAVIYO}",
    "klaviyo_auth_key": KEY,
    "dead_letter_mode": "direct",
    "lanes": 1,
    "outage_hold": 60.0,
    "park_retry_interval": 5.0,
    "shutdown_grace_period": 10.0,
    "http_port": 0,
}
SETTINGS = settings(
    max_examples=EXAMPLES, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
END = 4 * 3600.0  # seconds of simulated time after the last failure within which everything must be settled
MAX_STEPS = 20_000

numbers = st.integers(0, 7)
steps = st.lists(numbers, max_size=8)
lags = st.sampled_from([0.0, 0.0, 0.5, 4.0])
delays = st.sampled_from([0.0, 0.0, 0.0, 1.0, 30.0, 300.0])
DAY = 86_400.0
how_event = st.builds(Change, lags, delays, st.sampled_from([0.0, -DAY, DAY]), steps)
how_state = st.builds(Change, lags, delays, st.sampled_from([0.0, -DAY, DAY, 26_000 * DAY]), steps)
services = st.sampled_from(["commercetools", "klaviyo"])

PAGE = b"<html><body>Please wait</body></html>"
OUTAGES = [
    *(Fault(status) for status in (429, 500, 503)),
    *(Fault(status, body=PAGE) for status in (200, 404, 502)),
    *(Fault(action=action) for action in ("reset", "lose_response")),
    Fault(action="hang", seconds=30.0),
]
ENDPOINTS = [
    "POST /api/events",
    "POST /api/event-bulk",
    "POST /api/profile",
    "GET /api/profiles",
    "POST /api/catalog-",
    "PATCH /api/",
]


class RunningWorker:
    """A worker, and its process in the simulation."""

    def __init__(self, world: World, options: Settings, telemetry: Telemetry) -> None:
        self.process = Process("worker")
        self.is_stopping = False
        self._simulation = world.simulation
        self._worker = service.Worker(options, telemetry=telemetry)
        self._task = world.simulation.start(self.process, self._run)

    @property
    def has_ended(self) -> bool:
        return self._task.is_done

    def kill(self) -> None:
        self._simulation.kill(self.process)

    def stop(self) -> None:
        self.is_stopping = True
        self._simulation.start(self.process, self._worker.stop)

    def _run(self) -> None:
        try:
            self._worker.run(once=False, max_wait=0.0)
        finally:
            self.process.is_killed = True  # the other threads end with the process


class Model(RuleBasedStateMachine):
    """The shop, the services, and up to two workers. The rules are everything that can happen."""

    options: Settings
    telemetry: Telemetry

    def __init__(self) -> None:
        super().__init__()
        self.simulation = Simulation()
        self.workers: list[RunningWorker] = []

    @initialize(
        repeats=st.sampled_from(BULK_REPEATS),
        max_messages=st.sampled_from([1, 3, 50]),
        bulk_threshold=st.sampled_from([0, 1, 10]),
        seed=st.integers(0, 1_000),
    )
    def begin(self, repeats: str, max_messages: int, bulk_threshold: int, seed: int) -> None:
        """Create an account, with a verdict on repeated events if it ignores them. Start two workers.

        `max_messages` is per delivery. `seed` determines the order in which the threads continue at the end.
        """
        self.random = Random(seed)
        self.options = self.options.model_copy(update={"bulk_threshold": bulk_threshold})
        self.world = World(self.simulation, repeats, max_messages)
        if repeats == "ignore":
            probe = {"external_id": PROBE_PROFILE, "properties": {REPEATS: IGNORED}}
            self.world.account.create_profile({"attributes": probe})
        self.shop = ShopModel(self.world.shop, self.world.queue, self._proceed)
        self._start()
        self._start()

    def _start(self) -> None:
        self.workers.append(RunningWorker(self.world, self.options, self.telemetry))

    # Time, and who runs next

    @rule(choices=st.lists(numbers, min_size=1, max_size=20))
    def proceed(self, choices: list[int]) -> None:
        self._proceed(choices)

    def _proceed(self, choices: Sequence[int]) -> None:
        for choice in choices:
            self.simulation.step(choice, until=self.simulation.now + 20.0)
        self._forget_ended_workers()

    @rule(seconds=st.sampled_from([0.3, 3.0, 20.0, 100.0]))
    def suspend_machine(self, seconds: float) -> None:
        self.simulation.now += seconds

    # Workers

    @precondition(lambda self: self.workers and self._jobs_end_before_leases())
    @rule(number=numbers)
    def kill(self, number: int) -> None:
        self.workers.pop(number % len(self.workers)).kill()

    @precondition(lambda self: self.workers)
    @rule(number=numbers)
    def stop(self, number: int) -> None:
        """Send a signal. A second one ends the worker at once."""
        self.workers[number % len(self.workers)].stop()

    def _jobs_end_before_leases(self) -> bool:
        """Return whether the jobs of a killed worker end before the queue redelivers its messages.

        No other worker knows these jobs. If they end later, they can overwrite newer states.
        """
        return self.world.jobs.ends_at < self.simulation.now + LEASE / 2

    @precondition(lambda self: len(self.workers) < 2)
    @rule()
    def start(self) -> None:
        self._start()

    def _forget_ended_workers(self) -> None:
        for worker in self.workers:
            unexpected = [error for error in worker.process.errors if not isinstance(error, ShutdownTimeoutError)]
            assert not unexpected, unexpected
        self.workers = [worker for worker in self.workers if not worker.has_ended]

    # Services

    @rule(name=services, fault=st.sampled_from(OUTAGES), times=st.sampled_from([1, 2, 6, None]))
    def fail(self, name: str, fault: Fault, times: int | None) -> None:
        getattr(self.world, name).faults.add(replace(fault, times=times))

    @rule(name=services, status=st.sampled_from([401, 403]))
    def refuse_credentials(self, name: str, status: int) -> None:
        getattr(self.world, name).faults.add(Fault(status, None))

    @rule(endpoint=st.sampled_from(ENDPOINTS))
    def refuse_endpoint(self, endpoint: str) -> None:
        self.world.klaviyo.faults.add(Fault(403, None, match=endpoint))

    @rule()
    def repair(self) -> None:
        self.world.klaviyo.faults.clear()
        self.world.commercetools.faults.clear()

    @rule(seconds=st.sampled_from([0.0, 1.0, 20.0, 90.0]))
    def set_job_duration(self, seconds: float) -> None:
        self.world.jobs.duration = seconds

    # Messages

    @precondition(lambda self: self.shop.bodies)
    @rule(number=st.integers(0, 100), how=how_event)
    def repeat(self, number: int, how: Change) -> None:
        self.shop.repeat(number, how)

    @rule(body=st.sampled_from([b"", b"{", b"[]", b'{"hello": "world"}']), how=how_event)
    def publish_unreadable(self, body: bytes, how: Change) -> None:
        self.shop.publish_bad(body, how)

    @rule(kind=st.sampled_from(["email", "buyer"]), how=how_event)
    def publish_bad_order(self, kind: str, how: Change) -> None:
        self.shop.bad_order(kind, how)

    # The shop

    @precondition(lambda self: len(self.shop.customers) < 2)
    @rule(how=how_state)
    def create_customer(self, how: Change) -> None:
        self.shop.create_customer(how)

    @precondition(lambda self: self.shop.customers)
    @rule(number=numbers, how=how_state)
    def update_customer(self, number: int, how: Change) -> None:
        self.shop.update_customer(pick(self.shop.customers, number), how)

    @precondition(lambda self: self.shop.customers)
    @rule(number=numbers, how=how_state)
    def delete_customer(self, number: int, how: Change) -> None:
        self.shop.delete_customer(pick(self.shop.customers, number), how)

    @precondition(lambda self: len(self.shop.categories) < 3)
    @rule(number=numbers, how=how_state)
    def create_category(self, number: int, how: Change) -> None:
        parents = [None, *self.shop.categories]
        self.shop.create_category(parents[number % len(parents)], how)

    @precondition(lambda self: self.shop.categories)
    @rule(number=numbers, how=how_state)
    def rename_category(self, number: int, how: Change) -> None:
        self.shop.rename_category(pick(self.shop.categories, number), how)

    @precondition(lambda self: self.shop.categories)
    @rule(number=numbers, parent=numbers, how=how_state)
    def move_category(self, number: int, parent: int, how: Change) -> None:
        moved = pick(self.shop.categories, number)
        below = [category["id"] for category in self.shop.below(moved)]
        parents = [None, *(each for each in self.shop.categories if each not in {moved, *below})]
        self.shop.move_category(moved, parents[parent % len(parents)], how)

    @precondition(lambda self: self.shop.categories)
    @rule(number=numbers, how=how_state)
    def delete_category(self, number: int, how: Change) -> None:
        self.shop.delete_category(pick(self.shop.leaves(), number), how)

    @rule(number=numbers, how=how_state)
    def publish_product(self, number: int, how: Change) -> None:
        known: list[str | None] = [*self.shop.products, *self.shop.unpublished]
        known += [None] * (len(known) < 2)
        categories: list[str | None] = [None, *self.shop.categories]
        category = categories[number // 2 % len(categories)]
        self.shop.publish_product(known[number % len(known)], category, how)

    @precondition(lambda self: self.shop.products)
    @rule(number=numbers, how=how_state)
    def move_sku(self, number: int, how: Change) -> None:
        self.shop.move_sku(pick(self.shop.products, number), how)

    @precondition(lambda self: self.shop.unstocked())
    @rule(number=numbers, how=how_state)
    def stock_product(self, number: int, how: Change) -> None:
        self.shop.stock_product(pick(self.shop.unstocked(), number), how)

    @precondition(lambda self: self.shop.products)
    @rule(number=numbers, how=how_state)
    def unpublish_product(self, number: int, how: Change) -> None:
        self.shop.unpublish_product(pick(self.shop.products, number), how)

    @precondition(lambda self: len(self.shop.stock) < 2)
    @rule(how=how_state)
    def create_stock(self, how: Change) -> None:
        self.shop.create_stock(how)

    @precondition(lambda self: self.shop.stock)
    @rule(number=numbers, how=how_state)
    def change_stock(self, number: int, how: Change) -> None:
        self.shop.change_stock(pick(self.shop.stock, number), how)

    @precondition(lambda self: len(self.shop.orders) < 4)
    @rule(number=numbers, with_payload=st.booleans(), how=how_event)
    def create_order(self, number: int, with_payload: bool, how: Change) -> None:
        buyers = [None, *self.shop.customers]
        self.shop.create_order(buyers[number % len(buyers)], with_payload=with_payload, how=how)

    @precondition(lambda self: self.shop.open_orders())
    @rule(number=numbers, state=st.sampled_from(["Complete", "Cancelled"]), how=how_event)
    def end_order(self, number: int, state: str, how: Change) -> None:
        orders = self.shop.open_orders()
        self.shop.end_order(orders[number % len(orders)], state, how)

    @precondition(lambda self: self.shop.orders)
    @rule(number=numbers, how=how_event)
    def refund(self, number: int, how: Change) -> None:
        self.shop.refund(pick(self.shop.orders, number), how)

    # The end

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self._settle()
                self._check()
        finally:
            self.simulation.close()

    def _settle(self) -> None:
        """Repair the services and let two workers run until nothing is left to do."""
        self.repair()
        until = self.simulation.now + END
        for _ in range(MAX_STEPS):
            self._forget_ended_workers()
            if not self.world.queue.bodies() and not self.world.jobs.in_progress:
                return
            while len(self.workers) < 2:
                self._start()
            if self.simulation.now > until:
                break
            self.simulation.step(self.random.randrange(8), until)
        _note(self.world.trace[-40:])
        raise AssertionError(f"left on the queue: {[body[:300] for body in self.world.queue.bodies()]}")

    def _check(self) -> None:
        account, shop = self.world.account, self.shop
        _note(self.world.trace)
        names = {p["attributes"].get("external_id"): p["attributes"].get("first_name") for p in account.profiles}
        ends: dict[str, tuple[dict[Any, Any], dict[Any, Any]]] = {
            "dead letters": (Counter(body for body, _ in self.world.queue.dead_letters), shop.bad),
            "events": (Counter((e["metric"], e["unique_id"], e["value"]) for e in account.events), shop.events),
            "profiles": ({key: names.get(key) for key in shop.customers}, shop.names()),
            "categories": (_attributes(account.categories, "name") | shop.constant_breadcrumb(), shop.breadcrumbs()),
            "items": ({key: _item(entry) for key, entry in account.items.items()}, shop.items()),
            "variants": ({key: _variant(entry) for key, entry in account.variants.items()}, shop.variants()),
        }
        wrong = {name: _differences(*pair) for name, pair in ends.items() if pair[0] != pair[1]}
        assert not wrong, wrong


NO_RULE: Any = None


class CatalogModel(Model):
    """The model without customers and orders, so that more happens to the same products and categories."""

    create_customer = update_customer = delete_customer = NO_RULE
    create_order = end_order = refund = NO_RULE
    publish_bad_order = publish_unreadable = NO_RULE


def _note(lines: Sequence[str]) -> None:
    """Add lines to the report of a random history."""
    if currently_in_test_context():
        note("\n".join(lines))


def _attributes(entries: dict[str, Any], *names: str) -> dict[str, tuple[Any, ...]]:
    """Return these attributes of each catalog entry."""
    return {key: tuple(entry["attributes"][name] for name in names) for key, entry in entries.items()}


def _item(entry: dict[str, Any]) -> tuple[Any, ...]:
    categories = sorted(each.removeprefix(PREFIX) for each in entry["categories"])
    return entry["attributes"]["title"], entry["attributes"]["price"], categories


def _variant(entry: dict[str, Any]) -> tuple[Any, ...]:
    attributes = entry["attributes"]
    item = entry["item"].removeprefix(PREFIX)
    return attributes["title"], attributes["price"], attributes["inventory_quantity"], item


def _differences(actual: dict[Any, Any], expected: dict[Any, Any]) -> dict[Any, tuple[Any, Any]]:
    """Return the actual and the expected value of each key that has a wrong one."""
    keys = {**actual, **expected}
    return {key: (actual.get(key), expected.get(key)) for key in keys if actual.get(key) != expected.get(key)}


def pick(resources: Any, number: int) -> Any:
    """Return one of the resources."""
    names = list(resources)
    return names[number % len(names)]


@pytest.fixture
def simulated_workers() -> Iterator[None]:
    """Let the workers run in a simulation, without a network."""
    Model.options = load(Settings, OPTIONS)
    Model.telemetry = Telemetry(Metrics("embedded"))
    log.setLevel(logging.CRITICAL)
    with simulated() as patch:
        patch.setattr(service, "_collect_garbage_less_often", lambda: None)
        patch.setattr(service, "version", lambda _: "0")
        patch.setattr(Metrics, "observe_worker", lambda *_: None)  # the metrics would keep all workers in memory
        patch.setattr(service, "open_queue", lambda *_: World.current.queue.adapter())
        patch.setattr(transport, "pool", lambda *_: Pool(World.current))
        patch.setattr(client, "RESTClientObject", lambda _: SimpleNamespace(pool_manager=Pool(World.current)))
        yield


@pytest.fixture
def model(simulated_workers: None) -> Iterator[Model]:
    """A history that a test writes. Its end is checked as that of a random one."""
    model = Model()
    model.begin("drop", max_messages=1, bulk_threshold=0, seed=0)
    yield model
    model.teardown()


@pytest.mark.timeout(0)  # MODEL_EXAMPLES determines the duration
def test_any_history_ends_with_klaviyo_as_commercetools_is(simulated_workers: None) -> None:
    """Every event is there once, the mirror is equal, dead letters are exactly the bad messages, the queue is empty."""
    run_state_machine_as_test(Model, settings=SETTINGS)


@pytest.mark.timeout(0)
def test_any_history_of_the_catalog_ends_with_klaviyo_as_commercetools_is(simulated_workers: None) -> None:
    """SKUs and categories move, stock changes while its product does, and messages arrive in any order."""
    run_state_machine_as_test(CatalogModel, settings=settings(SETTINGS, max_examples=max(EXAMPLES // 4, 1)))


@pytest.mark.parametrize("below", [False, True])
def test_category_with_a_product_moves(model: Model, below: bool) -> None:
    """The product is in its new ancestors and no longer in the old ones. No message about the product says so."""
    for parent in (0, 0, 1):  # two at the top, and one below the first
        model.create_category(number=parent, how=Change())
    if below:
        model.shop.move_category("category-1", "category-2", Change())
    model.shop.publish_product(None, "category-3", Change())
    model._settle()
    model.shop.move_category("category-1" if below else "category-3", None if below else "category-2", Change())


@pytest.mark.parametrize("first", ["product-1", "product-2"])
def test_sku_moves(model: Model, first: str) -> None:
    """The messages of the two products arrive in any order."""
    for _ in range(2):
        model.shop.publish_product(None, None, Change())
    model.shop.move_sku("product-1", Change())
    model._settle()
    delays = {first: Change(), "product-1" if first == "product-2" else "product-2": Change(delay=60.0)}
    model.shop.owner = "product-2"
    for product_id, how in delays.items():
        model.shop._change_product(model.shop.products[product_id], how, "ProductPublished")


def test_stock_of_a_new_product_writes_it_once(model: Model) -> None:
    """Sixty stock messages arrive before the product's own. Klaviyo gets ten requests at most."""
    skus = [f"new-{number}" for number in range(60)]
    product = {"id": "new", "version": 1, "name": {"en": "New"}, "slug": {"en": "new"}, "categories": []}
    variants = [{"id": number, "sku": sku} for number, sku in enumerate(skus, 1)]
    model.world.shop.write(
        "product-projections", "new", product | {"masterVariant": variants[0], "variants": variants[1:]}, 0.0
    )
    model.world.queue._max_messages = 100
    for sku in skus:
        entry = {"id": sku, "version": 1, "sku": sku, "availableQuantity": 3}
        model.world.shop.write("inventory", sku, entry, 0.0)
        model.world.queue.publish(bare(change("ResourceCreated", "inventory-entry", sku)))
    model.stop(number=1)
    model._settle()
    stock = {sku: entry["attributes"]["inventory_quantity"] for sku, entry in model.world.account.variants.items()}
    assert stock == dict.fromkeys(skus, 3)
    calls = [line for line in model.world.trace if "/api/catalog" in line]
    assert len(calls) <= 10, calls
    model.world.account.delete_entry("catalog-item", f"{PREFIX}new")  # for the check of the shop


def test_category_is_shown_before_its_parent(model: Model) -> None:
    """Its name in Klaviyo contains that of the parent."""
    model.create_category(number=0, how=Change(lag=4.0))
    model.create_category(number=1, how=Change())


def test_product_is_unpublished_before_its_publication_is_shown(model: Model) -> None:
    """One worker can see the product never, and the other one only while it is published."""
    model.publish_product(number=0, how=Change(lag=0.5, steps=[0] * 4))
    model.unpublish_product(number=0, how=Change(lag=4.0, steps=[1] * 8))


def test_worker_pauses_before_it_writes_an_old_state(model: Model) -> None:
    """Another worker writes the new state in the meantime. The first one reads again after its write."""
    model.create_customer(how=Change(steps=[1] * 9))
    model.update_customer(number=0, how=Change(steps=[0] * 26))
    model.proceed([0] * 9)


def test_worker_stops_during_a_job(model: Model) -> None:
    """The job writes an old state after another worker has written the new one."""
    model.set_job_duration(90.0)
    model.create_customer(how=Change())
    while not model.world.jobs.in_progress:
        model.proceed([0])
    model.set_job_duration(0.0)
    model.stop(number=0)
    model.stop(number=1)
    model.update_customer(number=0, how=Change())


def test_person_is_erased_during_the_job_of_a_stopped_worker(model: Model, tmp_path: Path) -> None:
    """The job creates the profile after the erasure. The message that started it says so, on any queue."""
    (tmp_path / "mapping.toml").write_text("[customer]\nerasure = true\n")
    model.options = model.options.model_copy(update={"config": tmp_path / "mapping.toml"})
    model.set_job_duration(90.0)
    model.create_customer(how=Change())
    while not model.world.jobs.in_progress:
        model.proceed([0])
    model.stop(number=0)
    model.stop(number=1)
    while model.workers:
        model.proceed([0])
    (customer,) = model.shop.customers
    model.shop.erase_customer(customer, Change())
    model._settle()
    ((body, failure),) = model.world.queue.dead_letters
    assert failure.resource_id == customer
    assert "delete the profile with this external_id in Klaviyo" in failure.reason
    model.shop.bad[body] += 1


def test_response_of_a_job_is_lost(model: Model) -> None:
    """The job has started, so another job must not run in the meantime."""
    model.set_job_duration(90.0)
    fault = Fault(action="lose_response", match="POST /api/profile-bulk-import-jobs")
    model.world.klaviyo.faults.add(fault)
    model.create_customer(how=Change())
    while not model.world.jobs.in_progress:
        model.proceed([0])
    model.set_job_duration(0.0)
    model.update_customer(number=0, how=Change())
