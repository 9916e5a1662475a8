"""What is to be done to a project's subscriptions: a pure function of what there is and what is wanted."""

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
from worker.commands.subscriptions.spec import required_spec, spec_of
from worker.errors import SettingsError
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


def desired(
    url: str = PUBSUB, disabled: tuple[str, ...] = (), key: str = "klaviyo-worker", kind: str = ""
) -> DesiredSubscription:
    return DesiredSubscription(key, parse(url, SECRETS[url]), required_spec(disabled), kind)


def held(*drafts: dict[str, Any]) -> Subscriptions:
    store = Subscriptions()
    for draft in drafts:
        store.create(deepcopy(draft))
    return store


def applied(store: Subscriptions, target: DesiredSubscription) -> None:
    """Carry a plan out as commercetools would."""
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
def test_what_was_applied_leaves_nothing_to_do(
    url: str, disabled: list[str], was: tuple[str, list[dict[str, Any]], list[dict[str, Any]]] | None
) -> None:
    """Whatever was there before, with secrets that commercetools hides; and it asks for just what is needed."""
    target = desired(url, tuple(disabled))
    store = held()
    if was:
        before = desired(was[0]).draft() | {"messages": was[1], "changes": was[2]}
        store = held(before)
    applied(store, target)
    again = plan(target, store.all())
    assert again.action == "none"
    assert not again.updates()
    (there,) = store.all()
    asked = spec_of(there)
    assert {resource: set(types) for resource, types in asked.messages.items()} == {
        resource: set(types) for resource, types in target.spec.messages.items()
    }
    assert set(asked.changes) == set(target.spec.changes)


@given(st.lists(st.fixed_dictionaries({}, optional=SHAPELESS)))
def test_answers_of_any_shape_make_a_plan(existing: list[dict[str, Any]]) -> None:
    """Odd data is no reason to fail: a plan, or what cannot be had."""
    target = desired()
    todo = plan(target, existing)
    assert todo.action in {"create", "change", "none"}
    assert list(todo.lines())
    json.dumps(todo.document())


def test_messages_and_changes_go_together() -> None:
    """A subscription must never be without any: commercetools refuses it."""
    store = held(desired().draft() | {"messages": [], "changes": [{"resourceTypeId": "cart"}]})
    assert [action["action"] for action in plan(desired(), store.all()).updates()] == ["setMessages", "setChanges"]
    more = desired().draft()
    more["messages"].append({"resourceTypeId": "review", "types": ["ReviewCreated"]})
    fewer = plan(desired(), held(more).all()).updates()
    assert [action["action"] for action in fewer] == ["setMessages", "setChanges"]
    moved = plan(desired(SQS), store.all()).updates()
    assert [action["action"] for action in moved] == ["changeDestination", "setMessages", "setChanges"]


def test_disabled_handlers_are_left_out() -> None:
    """And a resource type with none left is not asked for at all."""
    asked = required_spec(("OrderImported", "CategoryCreated", "ResourceUpdated", "ResourceCreated", "ResourceDeleted"))
    assert "OrderImported" not in asked.messages["order"]
    assert "category" not in asked.messages
    assert asked.changes == ()
    assert not required_spec(KINDS)
    assert required_spec(("ResourceUpdated",)).changes == ("customer", "category", "inventory-entry")


def test_all_types_of_a_resource_are_all_however_it_is_said() -> None:
    """Without types, with an empty list, and beside an entry that names some."""
    some: dict[str, Any] = {"resourceTypeId": "order", "types": ["OrderCreated"]}
    every: dict[str, Any] = {"resourceTypeId": "order"}
    for entries in ([every], [every | {"types": []}], [every, some], [some, every]):
        assert spec_of({"messages": entries}).messages == {"order": ()}


def test_a_plan_can_be_read() -> None:
    """What comes, what goes, where to; all types of a resource are more than those that are needed."""
    draft = desired(SQS).draft()
    draft["messages"] = [*draft["messages"][1:], {"resourceTypeId": "review"}, {"resourceTypeId": "order", "types": []}]
    draft["changes"] = [{"resourceTypeId": "product"}, *draft["changes"][1:]]
    assert list(plan(desired(), held(draft).all()).lines()) == [
        "~ change subscription klaviyo-worker, version 1",
        f"    - destination  {SQS}",
        f"    + destination  {PUBSUB}",
        "    - messages     review: all others",
        "    - messages     order: all others",
        "    - changes      product",
        "    + changes      customer",
    ]
    assert next(plan(desired(), held().all()).lines()) == "+ create subscription klaviyo-worker"
    assert list(plan(desired(), held(desired().draft()).all()).lines()) == [
        "= subscription klaviyo-worker is up to date"
    ]


@pytest.mark.parametrize("status", ["ConfigurationError", "ConfigurationErrorDeliveryStopped"])
def test_a_destination_that_could_not_be_reached_is_sent_again(status: str) -> None:
    """That is what makes commercetools try again; one that is only slow, or suspended, is left alone."""
    store = held(desired().draft())
    store.set_status("klaviyo-worker", status)
    assert [action["action"] for action in plan(desired(), store.all()).updates()] == ["changeDestination"]
    for harmless in ("TemporaryError", "ManuallySuspended", "Resting"):
        store.set_status("klaviyo-worker", harmless)
        assert plan(desired(), store.all()).action == "none"


@pytest.mark.parametrize("url", SECRETS)
def test_secrets_are_sent_and_never_shown(url: str) -> None:
    """Not in a plan, its JSON or a repr; and they can only be renewed, not compared."""
    target, secret = desired(url), SECRETS[url]
    store = held(target.draft())
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


def test_what_differs_beside_a_secret_is_seen() -> None:
    """Another key's name, another way to sign in."""
    store = held(desired(SERVICEBUS).draft())
    other = parse(SERVICEBUS, CONNECTION.replace("=commercetools", "=sender"))
    assert plan(DesiredSubscription("klaviyo-worker", other, required_spec()), store.all()).action == "change"
    assert plan(desired(f"{SQS}?access_key={KEY}"), held(desired(SQS).draft()).all()).action == "change"


def test_stale_is_only_what_sends_to_the_same_destination() -> None:
    """Others' subscriptions are none of our business; an event source of EventBridge belongs to one alone."""
    mine, other = desired().draft(), desired(SQS, key="other").draft()
    old = desired(key="old").draft()
    nameless = {name: value for name, value in old.items() if name != "key"}
    store = held(mine, other, old, nameless)
    todo = plan(desired(), store.all())
    assert [entry.get("key") for entry in todo.stale] == ["old", None]
    stale = [line for line in todo.lines() if line.startswith("- stale")]
    assert len(stale) == 2
    assert store.all()[3]["id"] in stale[1]
    bridged = held(desired(EVENTBRIDGE).draft(), desired(EVENTBRIDGE, key="old").draft())
    assert plan(desired(EVENTBRIDGE), bridged.all()).stale == ()


def test_a_format_cannot_be_changed() -> None:
    """There is no such action; what is not asked for is left as it is."""
    assert desired().draft()["format"] == {"type": "Platform"}
    assert desired(EVENTGRID).draft()["format"] == {"type": "CloudEvents", "cloudEventsVersion": "1.0"}
    store = held(desired(kind="CloudEvents").draft())
    assert plan(desired(), store.all()).action == "none"
    with pytest.raises(SettingsError, match="CloudEvents, which commercetools cannot change to Platform: use another"):
        plan(desired(kind="Platform"), store.all())
    with pytest.raises(SettingsError, match="cannot change to CloudEvents"):
        plan(desired(EVENTGRID), held(desired().draft()).all())


@pytest.mark.parametrize("url", SECRETS)
def test_destinations_are_those_of_the_sdk(url: str) -> None:
    """The models of commercetools' own SDK take every field, and give it back; of an update too."""
    from commercetools.platform.models import SubscriptionDraft, SubscriptionUpdate

    draft = desired(url).draft()
    assert SubscriptionDraft.deserialize(draft).serialize() == draft
    before = DesiredSubscription("klaviyo-worker", parse(url, SECRETS[url]), required_spec(("OrderCreated",)))
    actions = plan(desired(url), held(before.draft()).all(), renew=True).updates()
    assert len(actions) == 3
    update = {"version": 1, "actions": actions}
    assert SubscriptionUpdate.deserialize(update).serialize() == update


def test_the_queue_may_say_where_to_send_to() -> None:
    """Where its URL names more than what is read."""
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
def test_a_malformed_destination_is_named_not_quoted(url: str) -> None:
    """It may hold a secret by mistake."""
    with pytest.raises(SettingsError) as error:
        parse(url, "")
    assert str(error.value) == f"--destination is malformed: expected {EXPECTED}"


@pytest.mark.parametrize("url", [url for url, secret in SECRETS.items() if secret])
def test_a_missing_secret_is_named(url: str) -> None:
    with pytest.raises(SettingsError, match=f"{SECRET_VARIABLE} is missing: set it"):
        parse(url, "")


@pytest.mark.parametrize(
    ("secret", "why"),
    [
        ("s3cret", "is malformed: expected a connection string"),
        (CONNECTION.replace("my-shop", "other"), "is for another queue"),
        (f"{CONNECTION};EntityPath=other", "is for another queue"),
        ("Endpoint=sb://[;SharedAccessKey=s3cret", "is for another queue"),
    ],
)
def test_a_connection_string_must_fit(secret: str, why: str) -> None:
    """It is not quoted."""
    with pytest.raises(SettingsError, match=why) as error:
        parse(SERVICEBUS, secret)
    assert "s3cret" not in str(error.value)
    assert "c2Vj" not in str(error.value)


@given(st.dictionaries(st.sampled_from(["type", "connectionString", "uri", "queueUrl", "topicArn"]), ANYTHING))
def test_any_destination_has_a_name(fields: dict[str, Any]) -> None:
    """Also one of a kind that came later."""
    assert display_name(fields)
    assert display_name({"type": "ConfluentCloud", "apiSecret": "s3cret"}) == "ConfluentCloud"


def test_every_status_says_what_to_do() -> None:
    """Also one that came later."""
    for status in ("TemporaryError", "ConfigurationErrorDeliveryStopped", "ManuallySuspended", "Resting", ""):
        assert all(explain_status(status))
    assert explain_status("Healthy") == ("Healthy: commercetools delivers notifications", "")
