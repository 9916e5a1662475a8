"""Notifications as bodies of messages, in the envelopes of the queues."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import orjson

from worker.sandbox.notifications import AT, PROJECT

if TYPE_CHECKING:
    from worker.sandbox.http import Json


def bare(notification: Json) -> bytes:
    """Return the notification without an envelope: the body on Pub/Sub pull, SQS and Service Bus."""
    return orjson.dumps(notification)


def cloudevent(notification: Json) -> bytes:
    """Return a CloudEvent in structured mode."""
    resource = notification.get("resource", {})
    resource_type, is_message = resource.get("typeId"), notification["notificationType"] == "Message"
    name = f"message.{_kind(notification)}" if is_message else f"change.{_kind(notification)}"
    envelope = {
        "specversion": "1.0",
        "id": notification.get("id", "0c7f0b0e-0000-4000-8000-000000000001"),
        "type": f"com.commercetools.{resource_type}.{name}",
        "source": f"/{PROJECT}/{resource_type}s",
        "subject": resource.get("id"),
        "time": AT,
    }
    if is_message:
        envelope["dataref"] = f"/{PROJECT}/messages/{notification['id']}"
        envelope |= {"sequence": str(notification["sequenceNumber"]), "sequencetype": "Integer"}
    return orjson.dumps(envelope | {"data": notification})


def event_grid(notification: Json) -> bytes:
    """Return the body that Event Grid delivers with the CloudEvents schema: the CloudEvent."""
    return cloudevent(notification)


def pubsub_push(notification: Json) -> bytes:
    """Return the body of a Pub/Sub push request."""
    data = base64.b64encode(bare(notification)).decode()
    envelope = {"data": data, "messageId": "136969346945", "publishTime": AT, "attributes": {}}
    return orjson.dumps({"message": envelope, "subscription": "projects/p/subscriptions/ct"})


def sqs(notification: Json) -> bytes:
    """Return an SQS message in the format of its API."""
    return _sqs(bare(notification))


def sns(notification: Json) -> bytes:
    """Return an SNS notification inside an SQS message."""
    envelope = {
        "Type": "Notification",
        "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
        "TopicArn": "arn:aws:sns:eu-central-1:123456789012:ct",
        "Message": bare(notification).decode(),
        "Timestamp": AT,
    }
    return _sqs(orjson.dumps(envelope))


def sns_raw(notification: Json) -> bytes:
    """Return an SQS message from SNS with raw delivery, which adds no envelope."""
    return _sqs(bare(notification))


def eventbridge(notification: Json) -> bytes:
    """Return an EventBridge event inside an SQS message."""
    envelope = {
        "version": "0",
        "id": "aaaaaaaa-8888-00ee-aaaa-aaaaaaaaaaaa",
        "detail-type": _kind(notification),
        "source": f"aws.partner/commercetools.com/{PROJECT}/klaviyo",
        "time": AT,
        "region": "eu-central-1",
        "resources": [],
        "detail": notification,
    }
    return _sqs(orjson.dumps(envelope))


def _kind(notification: Json) -> str:
    absent = notification.get("payloadNotIncluded", {})
    return str(absent.get("payloadType") or notification.get("type") or notification["notificationType"])


def _sqs(body: bytes) -> bytes:
    attributes = {"ApproximateReceiveCount": "1", "SentTimestamp": "1795514400123"}
    return orjson.dumps({"MessageId": "m-1", "ReceiptHandle": "rh", "Body": body.decode(), "Attributes": attributes})
