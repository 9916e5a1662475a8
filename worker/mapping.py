"""What a merchant may change about the mapping. Defaults are good; the TOML file (`--config`) is optional."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worker.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Properties(_Section):
    """Which properties to send, under which name."""

    include: list[str] = Field([], description="Send only these; empty: all.")
    exclude: list[str] = Field([], description="Never send these.")
    map: dict[str, str] = Field({}, description="Rename: commercetools name = Klaviyo name.")


class RawProperties(Properties):
    """Raw order properties to add to order events: none unless included."""

    include: list[str] = Field([], description='Raw order properties to add; ["*"]: all; empty: none.')


class Metrics(_Section):
    """The names of the Klaviyo metrics."""

    placed_order: str = Field("Placed Order", description="Metric of a new order.")
    ordered_product: str = Field("Ordered Product", description="Metric of each line of a new order.")
    fulfilled_order: str = Field("Fulfilled Order", description="Metric of a completed or shipped order.")
    cancelled_order: str = Field("Cancelled Order", description="Metric of a cancelled order.")
    refunded_order: str = Field("Refunded Order", description="Metric of each refund.")


class Order(_Section):
    """Orders."""

    fulfilled_order: list[str] = Field(["Complete"], description="Order states that mean fulfilled.")
    cancelled_order: list[str] = Field(["Cancelled"], description="Order states that mean cancelled.")
    fulfilled_shipment: list[str] = Field(["Shipped"], description="Shipment states that mean fulfilled.")
    brand_attribute: str = Field("brand", description="Product attribute that holds the brand.")
    raw_line_item: bool = Field(default=False, description="Add the raw line item to Ordered Product.")
    properties: RawProperties = Field(RawProperties(), description="Raw order properties on order events.")
    custom_fields: Properties = Field(Properties(), description="Custom fields on order events.")


class Customer(_Section):
    """Customers."""

    custom_fields: Properties = Field(Properties(), description="Custom fields on profiles.")
    erasure: bool = Field(
        default=False,
        description="Request deletion in Klaviyo when commercetools deletes a customer with dataErasure.",
    )


class Payment(_Section):
    """Payments."""

    refund_states: list[str] = Field(["Success"], description="Transaction states in which a refund counts.")
    reason_field: str = Field("reason", description="Custom field of a transaction that holds the refund's reason.")


class Category(_Section):
    """Categories."""

    descendants: int = Field(
        500, ge=0, le=10_000, description="Descendants sent again when a category changes, at the most."
    )


class Price(_Section):
    """Which price of a variant is the catalog's."""

    channel: str = Field("", description="Id of the distribution channel whose prices count; empty: none.")
    country: str = Field("", description="Country whose prices are preferred; empty: none.")


class Inventory(_Section):
    """Which stock is the catalog's."""

    channel: str = Field("", description="Id of the supply channel whose stock counts; empty: stock without one.")


class Mapping(_Section):
    """How commercetools data becomes Klaviyo data."""

    locale: str = Field("en-US", description="Preferred locale of texts (PREFERRED_LOCALE wins).")
    currency: str = Field("", description="Preferred currency of prices (PREFERRED_CURRENCY wins); empty: any.")
    product_url_template: str = Field(
        "",
        description="Product page, with {{productSlug}} {{productId}} {{sku}} {{locale}} "
        "(PRODUCT_URL_TEMPLATE wins); empty: url is the text None.",
    )
    disabled: list[str] = Field([], description="Message types to leave alone, as `klaviyo-worker handlers` names.")
    metrics: Metrics = Metrics()
    order: Order = Order()
    customer: Customer = Customer()
    payment: Payment = Payment()
    category: Category = Category()
    price: Price = Price()
    inventory: Inventory = Inventory()


def load_mapping(path: Path | None, **overrides: str) -> Mapping:
    """Read the mapping file, if any, with `overrides` (environment) on top.

    Raises SettingsError with one line per mistake, each naming the file and the key.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"KLAVIYO_WORKER_CONFIG: cannot read {path}: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"KLAVIYO_WORKER_CONFIG: {path} is not TOML: {error}") from None
    try:
        return Mapping.model_validate(document | {name: value for name, value in overrides.items() if value})
    except ValidationError as errors:
        where = path or "mapping"
        problems = [SettingsError(f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}") for e in errors.errors()]
        raise SettingsError.joined(problems) from None
