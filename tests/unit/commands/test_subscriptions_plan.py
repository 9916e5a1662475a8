"""The plan for a project's subscriptions, a pure function of the existing ones and the desired one."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.commands.subscriptions.destination import EXPECTED, SECRET_VARIABLE, display_name, from_queue_url, parse
from worker.commands.subscriptions.health import explain_status
from worker.commands.subscriptions.plan import DesiredSubscription, plan
from worker.commands.subscriptions.spec import SubscriptionSpec, required_spec, spec_of
from worker.errors import SettingsError
from worker.mapping import MappingConfig
from worker.sandbox.commercetools.subscriptions import Subscriptions
from worker.transform import HANDLERS

PUBSUB = "pubsub://my-project/klaviyo-worker"
SQS = "https://sqs.eu-central-1.amazonaws.com/123456789012/klaviyo-worker"
SNS = "sns://arn:aws:sns:eu-central-1:123456789012:klaviyo-worker"
EVENTBRIDGE = "eventbridge://123456789012/eu-central-1"
SERVICEBUS = "servicebus://my-shop.servicebus.windows.net/klaviyo-worker"
EVENTGRID = "eventgrid://my-shop.westeurope-1.eventgrid.azure.net"
CONNECTION = (
    "Endpoint=sb://my-shop.servicebus.windows.net/;SharedAccessKeyName=commercetools;SharedAccessKey=c2VjcmV0czNjcmV0="
)
KEY = "AKIAIOSFODNN7EXAMPLE"
SECRETS = {
    PUBSUB: "",
    SQS: "",
    f"{SQS}?access_key={KEY}": "aws/s3cret",
    SNS: "",
    f"{SNS}?access_key={KEY}": "aws/s3cret",
    EVENTBRIDGE: "",
    SERVICEBUS: CONNECTION,
    EVENTGRID: "grid-s3cret",
}
KINDS = sorted({kind for _, kind in HANDLERS})
RESOURCES = [*sorted({resource for resource, _ in HANDLERS}), "review"]
TYPES = st.lists(st.sampled_from([*KINDS, "OrderDeleted"]), unique=True)
MESSAGES = st.fixed_dictionaries({"resourceTypeId": st.sampled_from(RESOURCES)}, optional={"types": TYPES})
CHANGES = st.fixed_dictionaries({"resourceTypeId": st.sampled_from(RESOURCES)})
ODD: tuple[Any, ...] = (
    None,
    True,
    17,
    "",
    "x",
    [],
    {},
    [None],
    [{}],
    {"type": None},
    {"type": []},
    {"type": "SQS", "queueUrl": 17},
)
ANYTHING = st.sampled_from([*ODD, [{"resourceTypeId": ["order"]}], [{"resourceTypeId": "order", "types": [None, 17]}]])
SHAPELESS = dict.fromkeys(("id", "version", "destination", "messages", "changes", "format", "status"), ANYTHING) | {
    "key": ANYTHING | st.just("klaviyo-worker")
}


def spec_without(*disabled: str) -> SubscriptionSpec:
    return required_spec(MappingConfig(disabled_types=list(disabled)))


def desired(
    url: str = PUBSUB, disabled: tuple[str, ...] = (), key: str = "klaviyo-worker", kind: str = ""
) -> DesiredSubscription:
    return DesiredSubscription(key, parse(url, SECRETS[url]), spec_without(*disabled), kind)


def store_of(*drafts: dict[str, Any]) -> Subscriptions:
    store = Subscriptions()
    for draft in drafts:
        store.create(deepcopy(draft))
    return store


def apply_plan(store: Subscriptions, target: DesiredSubscription) -> None:
    """Apply a plan like commercetools."""
    todo = plan(target, store.all())
    if todo.current is None:
        store.create(todo.desired.draft())
    else:
        store.update(todo.current["id"], {"version": todo.current["version"], "actions": todo.updates()})


@given(
    url=st.sampled_from([url for url in SECRETS if url != EVENTGRID]),
    disabled=st.lists(st.sampled_from(KINDS), max_size=8, unique=True),
    was=st.none()
    | st.tuples(st.sampled_from([PUBSUB, SQS, SERVICEBUS]), st.lists(MESSAGES), st.lists(CHANGES, min_size=1)),
)
def test_second_plan_changes_nothing(
    url: str, disabled: list[str], was: tuple[str, list[dict[str, Any]], list[dict[str, Any]]] | None
) -> None:
    """This holds for any previous subscription, and for hidden secrets. The subscription requests what is needed."""
    target = desired(url, tuple(disabled))
    store = store_of()
    if was:
        before = desired(was[0]).draft() | {"messages": was[1], "changes": was[2]}
        store = store_of(before)
    apply_plan(store, target)
    again = plan(target, store.all())
    assert again.action == "none"
    assert not again.updates()
    (existing,) = store.all()
    spec = spec_of(existing)
    assert {resource: set(types) for resource, types in spec.messages.items()} == {
        resource: set(types) for resource, types in target.spec.messages.items()
    }
    assert set(spec.changes) == set(target.spec.changes)


@given(st.lists(st.fixed_dictionaries({}, optional=SHAPELESS)))
def test_malformed_subscriptions_do_not_fail_the_plan(existing: list[dict[str, Any]]) -> None:
    """Existing subscriptions of any shape lead to a plan."""
    target = desired()
    todo = plan(target, existing)
    assert todo.action in {"create", "change", "none"}
    assert list(todo.lines())
    json.dumps(todo.document())


def test_messages_and_changes_are_set_together() -> None:
    """Commercetools refuses a subscription without any message or change."""
    store = store_of(desired().draft() | {"messages": [], "changes": [{"resourceTypeId": "cart"}]})
    assert [action["action"] for action in plan(desired(), store.all()).updates()] == ["setMessages", "setChanges"]
    more = desired().draft()
    more["messages"].append({"resourceTypeId": "review", "types": ["ReviewCreated"]})
    fewer = plan(desired(), store_of(more).all()).updates()
    assert [action["action"] for action in fewer] == ["setMessages", "setChanges"]
    moved = plan(desired(SQS), store.all()).updates()
    assert [action["action"] for action in moved] == ["changeDestination", "setMessages", "setChanges"]


def test_disabled_handlers_are_left_out() -> None:
    """A resource type without enabled handlers is not requested."""
    spec = spec_without("OrderImported", "CategoryCreated", "ResourceUpdated", "ResourceCreated", "ResourceDeleted")
    assert "OrderImported" not in spec.messages["order"]
    assert "category" not in spec.messages
    assert spec.changes == ()
    assert not spec_without(*KINDS)
    assert spec_without("ResourceUpdated").changes == ("customer", "category", "inventory-entry")


def test_carts_are_requested_once_a_metric_is_named() -> None:
    """Each change of each cart is a notification."""
    assert "cart" not in spec_without().changes
    for metric in ("started_checkout", "added_to_cart"):
        mapping = MappingConfig.model_validate({"metrics": {metric: "Any name"}})
        assert "cart" in required_spec(mapping).changes
        assert "cart" not in required_spec(mapping).messages


def test_all_forms_of_all_types_are_equal() -> None:
    """All types: without a list, with an empty list, and next to an entry with some types."""
    some: dict[str, Any] = {"resourceTypeId": "order", "types": ["OrderCreated"]}
    every: dict[str, Any] = {"resourceTypeId": "order"}
    for entries in ([every], [every | {"types": []}], [every, some], [some, every]):
        assert spec_of({"messages": entries}).messages == {"order": ()}


def test_plan_as_text() -> None:
    """The text lists additions, removals and destinations. "All others" are types that the worker does not need."""
    draft = desired(SQS).draft()
    draft["messages"] = [*draft["messages"][1:], {"resourceTypeId": "review"}, {"resourceTypeId": "order", "types": []}]
    draft["changes"] = [{"resourceTypeId": "product"}, *draft["changes"][1:]]
    assert list(plan(desired(), store_of(draft).all()).lines()) == [
        "~ change subscription klaviyo-worker, version 1",
        f"    - destination  {SQS}",
        f"    + destination  {PUBSUB}",
        "    - messages     review: all others",
        "    - messages     order: all others",
        "    - changes      product",
        "    + changes      customer",
    ]
    assert next(plan(desired(), store_of().all()).lines()) == "+ create subscription klaviyo-worker"
    assert list(plan(desired(), store_of(desired().draft()).all()).lines()) == [
        "= subscription klaviyo-worker is up to date"
    ]


@pytest.mark.parametrize("status", ["ConfigurationError", "ConfigurationErrorDeliveryStopped"])
def test_destination_is_sent_again_after_a_configuration_error(status: str) -> None:
    """This makes commercetools deliver again. With other statuses, it is not necessary."""
    store = store_of(desired().draft())
    store.set_status("klaviyo-worker", status)
    assert [action["action"] for action in plan(desired(), store.all()).updates()] == ["changeDestination"]
    for harmless in ("TemporaryError", "ManuallySuspended", "Resting"):
        store.set_status("klaviyo-worker", harmless)
        assert plan(desired(), store.all()).action == "none"


@pytest.mark.parametrize("url", SECRETS)
def test_secrets_are_sent_and_never_shown(url: str) -> None:
    """Secrets are not in a plan, its JSON or a repr. They can be sent again but not compared."""
    target, secret = desired(url), SECRETS[url]
    store = store_of(target.draft())
    todo = plan(target, store.all(), renew=True)
    assert [action["action"] for action in todo.updates()] == ["changeDestination"]
    unchanged = plan(target, store.all())
    assert any("--renew" in line for line in unchanged.lines()) == bool(secret)
    if secret:
        assert secret in json.dumps(target.draft())
        said = "\n".join([*todo.lines(), *unchanged.lines(), json.dumps(todo.document()), repr(todo), repr(target)])
        for part in (secret, "c2VjcmV0", "s3cret"):
            assert part not in said
            assert part not in target.destination.redact(f"not delivered to {target.draft()}")
            assert part not in target.destination.redact(f"not with {secret.rpartition('SharedAccessKey=')[2]}")


def test_other_differences_of_a_destination_are_detected() -> None:
    """Examples are another key name and another way to authenticate."""
    store = store_of(desired(SERVICEBUS).draft())
    other = parse(SERVICEBUS, CONNECTION.replace("=commercetools", "=sender"))
    assert plan(DesiredSubscription("klaviyo-worker", other, spec_without()), store.all()).action == "change"
    assert plan(desired(f"{SQS}?access_key={KEY}"), store_of(desired(SQS).draft()).all()).action == "change"


def test_stale_subscriptions_have_the_same_destination() -> None:
    """Other subscriptions are left alone. On EventBridge each subscription has its own event source."""
    mine, other = desired().draft(), desired(SQS, key="other").draft()
    old = desired(key="old").draft()
    nameless = {name: value for name, value in old.items() if name != "key"}
    store = store_of(mine, other, old, nameless)
    todo = plan(desired(), store.all())
    assert [entry.get("key") for entry in todo.stale] == ["old", None]
    stale = [line for line in todo.lines() if line.startswith("- stale")]
    assert len(stale) == 2
    assert store.all()[3]["id"] in stale[1]
    bridged = store_of(desired(EVENTBRIDGE).draft(), desired(EVENTBRIDGE, key="old").draft())
    assert plan(desired(EVENTBRIDGE), bridged.all()).stale == ()


def test_format_cannot_be_changed() -> None:
    """Commercetools has no such update action. Without --format the existing format is kept."""
    assert desired().draft()["format"] == {"type": "Platform"}
    assert desired(EVENTGRID).draft()["format"] == {"type": "CloudEvents", "cloudEventsVersion": "1.0"}
    store = store_of(desired(kind="CloudEvents").draft())
    assert plan(desired(), store.all()).action == "none"
    with pytest.raises(SettingsError, match="CloudEvents, which commercetools cannot change to Platform: use another"):
        plan(desired(kind="Platform"), store.all())
    with pytest.raises(SettingsError, match="cannot change to CloudEvents"):
        plan(desired(EVENTGRID), store_of(desired().draft()).all())


@pytest.mark.parametrize("url", SECRETS)
def test_sdk_accepts_the_destinations(url: str) -> None:
    """The models of commercetools' SDK serialize every field, in drafts and in updates."""
    from commercetools.platform.models import SubscriptionDraft, SubscriptionUpdate

    draft = desired(url).draft()
    assert SubscriptionDraft.deserialize(draft).serialize() == draft
    before = DesiredSubscription("klaviyo-worker", parse(url, SECRETS[url]), spec_without("OrderCreated"))
    actions = plan(desired(url), store_of(before.draft()).all(), renew=True).updates()
    assert len(actions) == 3
    update = {"version": 1, "actions": actions}
    assert SubscriptionUpdate.deserialize(update).serialize() == update


def test_destination_from_queue_url() -> None:
    """Some queue URLs name a destination, others only a source."""
    assert from_queue_url(SQS) == SQS
    assert from_queue_url(SERVICEBUS) == SERVICEBUS
    assert from_queue_url(f"{SERVICEBUS}/subscription") == SERVICEBUS
    for url in ("pubsub://p/subscription", "sqs://name?region=eu-central-1", "embedded://q", "push://h:1", ""):
        with pytest.raises(SettingsError, match="--destination is missing: QUEUE_URL does not name one: set it to "):
            from_queue_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "pubsub://p",
        "pubsub://p/s/t",
        "kafka://x",
        f"{SQS}.fifo",
        SQS.replace("https", "http"),
        f"{SQS}?access_key=",
        "sns://topic",
        "eventbridge://eu-central-1/123456789012",
        "servicebus://localhost/queue",
        f"{EVENTGRID}?key=s3cret",
        f" {PUBSUB}",
    ],
)
def test_malformed_destination_is_not_quoted(url: str) -> None:
    """It could contain a secret by mistake."""
    with pytest.raises(SettingsError) as error:
        parse(url, "")
    assert str(error.value) == f"--destination is malformed: expected {EXPECTED}"


@pytest.mark.parametrize("url", [url for url, secret in SECRETS.items() if secret])
def test_missing_secret_is_named(url: str) -> None:
    """The error names the variable."""
    with pytest.raises(SettingsError, match=f"{SECRET_VARIABLE} is missing: set it"):
        parse(url, "")


@pytest.mark.parametrize(
    ("secret", "why"),
    [
        ("s3cret", "is malformed: expected a connection string"),
        (CONNECTION.replace("my-shop", "other"), "is not for the queue"),
        (f"{CONNECTION};EntityPath=other", "is not for the queue"),
        ("Endpoint=sb://[;SharedAccessKey=s3cret", "is not for the queue"),
    ],
)
def test_connection_string_must_match_the_destination(secret: str, why: str) -> None:
    """The error does not quote it."""
    with pytest.raises(SettingsError, match=why) as error:
        parse(SERVICEBUS, secret)
    assert "s3cret" not in str(error.value)
    assert "c2Vj" not in str(error.value)


@given(st.dictionaries(st.sampled_from(["type", "connectionString", "uri", "queueUrl", "topicArn"]), ANYTHING))
def test_every_destination_has_a_display_name(fields: dict[str, Any]) -> None:
    """Unknown types of destinations have one too."""
    assert display_name(fields)
    assert display_name({"type": "ConfluentCloud", "apiSecret": "s3cret"}) == "ConfluentCloud"


def test_every_status_has_advice() -> None:
    """Unknown statuses have it too."""
    for status in ("TemporaryError", "ConfigurationErrorDeliveryStopped", "ManuallySuspended", "Resting", ""):
        assert all(explain_status(status))
    assert explain_status("Healthy") == ("Healthy: commercetools delivers notifications", "")
