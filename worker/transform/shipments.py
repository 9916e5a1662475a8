"""Parcels of an order -> Confirmed Shipment, and the tracking properties of fulfilment and shipment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worker.errors import Ignored
from worker.json_access import as_dict, as_dicts, as_id, as_text, unique
from worker.transform import fields
from worker.transform.order_events import order_event, order_of, order_omissions, shared_properties
from worker.transform.order_totals import shipping_infos
from worker.transform.registry import handles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.mapping import MappingConfig
    from worker.model import Enriched, Json, Notification, Operation

_SHIPMENT = "Confirmed Shipment, per parcel"
_SWITCH = ("metrics.confirmed_shipment",)


def _check_added(notification: Notification, _mapping: MappingConfig) -> None:
    if _is_return(as_dict(notification.payload.get("parcel"))):
        raise Ignored("the parcel is on its way back to the shop")


@handles(
    "ParcelAddedToDelivery",
    resource="order",
    effect=_SHIPMENT,
    precheck=_check_added,
    omissions=order_omissions,
    switches=_SWITCH,
)
def parcel_added(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Confirmed Shipment event for the parcel in the message, or for all parcels if it contains none.

    The unique_id is the parcel's id.
    """
    added = as_dict(enriched.notification.payload.get("parcel"))
    parcels = [added] if added else parcels_of(order_of(enriched))
    by_id = {parcel_id: parcel for parcel in parcels if (parcel_id := as_id(parcel.get("id")))}
    return _shipments(by_id, enriched, mapping)


def _check_tracking(notification: Notification, _mapping: MappingConfig) -> None:
    parcel_id, parcel = as_id(notification.payload.get("parcelId")), notification.payload
    if not parcel_id or not _tracking(parcel, "trackingId"):
        raise Ignored("the message contains no tracking id of a parcel")
    if _is_return(parcel):
        raise Ignored("the parcel is on its way back to the shop")


@handles(
    "ParcelTrackingDataUpdated",
    resource="order",
    effect=f"{_SHIPMENT} with new tracking data",
    precheck=_check_tracking,
    omissions=order_omissions,
    switches=_SWITCH,
)
def parcel_tracking_updated(enriched: Enriched, mapping: MappingConfig) -> Iterable[Operation]:
    """Create a Confirmed Shipment event for new tracking data. The unique_id is the ids of parcel and tracking."""
    payload = enriched.notification.payload
    unique_id = f"{as_id(payload.get('parcelId'))}:{_tracking(payload, 'trackingId')}"
    return _shipments({unique_id: payload}, enriched, mapping)


def _shipments(parcels: dict[str, Json], enriched: Enriched, mapping: MappingConfig) -> Iterator[Operation]:
    """Create an event for each of the parcels, which have a unique_id as their key."""
    properties = shared_properties(enriched, mapping, len(parcels))
    for unique_id, parcel in parcels.items():
        yield order_event(
            enriched,
            mapping,
            metric=mapping.metrics.confirmed_shipment,
            unique_id=unique_id,
            properties=properties,
            more=tracking_properties([parcel], mapping),
        )


def parcels_of(order: Json) -> list[Json]:
    """Return the parcels on their way to the buyer, of all deliveries and shipping methods."""
    deliveries = [delivery for info in shipping_infos(order) for delivery in as_dicts(info.get("deliveries"))]
    parcels = [parcel for delivery in deliveries for parcel in as_dicts(delivery.get("parcels"))]
    return [parcel for parcel in parcels if not _is_return(parcel)]


def _is_return(parcel: Json) -> bool:
    """Return whether a parcel is on its way back to the shop."""
    return as_dict(parcel.get("trackingData")).get("isReturn") is True


def tracking_properties(parcels: list[Json], mapping: MappingConfig) -> Json:
    """Return the tracking numbers and carriers of parcels, and the URL of the first parcel with a tracking number.

    `order.tracking_urls` has the URL of each carrier. The case of a carrier's name does not matter.
    """
    templates = {carrier.casefold(): template for carrier, template in mapping.order.tracking_urls.items()}
    first = next((parcel for parcel in parcels if _tracking(parcel, "trackingId")), {})
    template = templates.get(_tracking(first, "carrier").casefold(), "")
    return fields.compact(
        {
            "TrackingNumbers": unique(_tracking(parcel, "trackingId") for parcel in parcels),
            "Carriers": unique(_tracking(parcel, "carrier") for parcel in parcels),
            "TrackingURL": fields.fill_template(template, {"trackingId": _tracking(first, "trackingId")}),
        }
    )


def _tracking(parcel: Json, name: str) -> str:
    return as_text(as_dict(parcel.get("trackingData")).get(name))
