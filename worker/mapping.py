"""The mapping: the rules that convert commercetools data to Klaviyo data.

It is a TOML file (`--config`). Every value has a default.
"""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from worker.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic_core import ErrorDetails


CountryCode = Annotated[str, StringConstraints(pattern=r"^[A-Z]{2}$")]  # ISO 3166-1 alpha-2, as in commercetools


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PropertyRules(_Section):
    """Rules that select and rename properties."""

    include: list[str] = Field([], description="Properties to send; empty: all.")
    exclude: list[str] = Field([], description="Properties not to send.")
    rename: dict[str, str] = Field({}, description="New names: commercetools name = Klaviyo name.")


class RawPropertyRules(PropertyRules):
    """Rules for raw order properties. By default, none of these properties is sent."""

    include: list[str] = Field([], description='Raw order properties to add; ["*"]: all; empty: none.')


# Klaviyo's limit is fewer than 128 characters: https://developers.klaviyo.com/en/reference/create_event
OptionalMetricName = Annotated[str, StringConstraints(max_length=127)]
MetricName = Annotated[str, StringConstraints(min_length=1, max_length=127)]


class MetricNames(_Section):
    """The names of the Klaviyo metrics."""

    placed_order: MetricName = Field("Placed Order", description="Metric of a new order.")
    ordered_product: MetricName = Field("Ordered Product", description="Metric of each line of a new order.")
    fulfilled_order: MetricName = Field("Fulfilled Order", description="Metric of a completed or shipped order.")
    cancelled_order: MetricName = Field("Cancelled Order", description="Metric of a cancelled order.")
    refunded_order: MetricName = Field("Refunded Order", description="Metric of each refund.")
    confirmed_shipment: OptionalMetricName = Field(
        "", description="Metric of each parcel, for example Confirmed Shipment; empty: no events."
    )
    returned_order: OptionalMetricName = Field(
        "", description="Metric of each return, for example Returned Order; empty: no events."
    )
    started_checkout: OptionalMetricName = Field(
        "", description="Metric of a cart that reaches checkout, for example Started Checkout; empty: no events."
    )
    added_to_cart: OptionalMetricName = Field(
        "", description="Metric of each line item of a cart, for example Added to Cart; empty: no events."
    )


class OrderMapping(_Section):
    """The mapping of orders."""

    value: Literal["gross", "total"] = Field(
        "gross",
        description='Amounts of orders, lines and shipping: "gross" with tax, "total" as commercetools shows them, '
        "which is without tax in a shop with net prices.",
    )
    texts: Literal["order", "shop"] = Field(
        "order",
        description='Locale of product names and URLs: "order" the locale of the order if it has one, "shop" always '
        "`locale`.",
    )
    imports: Literal["auto", "live", "backfill"] = Field(
        "auto",
        description='Whether the events of imported orders start flows: "live" yes, "backfill" no, "auto" only if '
        "`completedAt` is at most a day before the import.",
    )
    buyer: Literal["guests", "all", "none"] = Field(
        "guests",
        description='Whose profiles get name, place and locale of an order\'s billing address: "guests" those without '
        'external_id, "all" also customers\', "none" no profiles.',
    )
    buyer_phone: bool = Field(
        default=False,
        description="Also send the phone number of the billing address. A guest can state any number, and Klaviyo "
        "merges profiles by it.",
    )
    fulfilled_states: list[str] = Field(["Complete"], description="Order states that mean fulfilled.")
    cancelled_states: list[str] = Field(["Cancelled"], description="Order states that mean cancelled.")
    fulfilled_shipment_states: list[str] = Field(
        ["Shipped", "Delivered"], description="Shipment states that mean fulfilled."
    )
    fulfilled_workflow_states: list[str] = Field(
        [], description="Keys of the workflow states that mean fulfilled. Needs the scope `view_states`."
    )
    cancelled_workflow_states: list[str] = Field(
        [], description="Keys of the workflow states that mean cancelled. Needs the scope `view_states`."
    )
    fulfilled_by_delivery: bool = Field(
        default=False, description="The first delivery means fulfilled, whatever the state of the order."
    )
    tracking_urls: dict[str, str] = Field(
        {}, description="URLs of tracking pages: carrier = template with {{trackingId}}."
    )
    brand_attribute: str = Field(
        "brand", description="Attribute that holds the brand: of the variant, else of the product."
    )
    raw_line_item: bool = Field(default=False, description="Add the raw line item to Ordered Product.")
    properties: RawPropertyRules = Field(RawPropertyRules(), description="Raw order properties on order events.")
    custom_fields: PropertyRules = Field(PropertyRules(), description="Custom fields on order events.")


class CustomerMapping(_Section):
    """The mapping of customers."""

    custom_fields: PropertyRules = Field(PropertyRules(), description="Custom fields on profiles.")
    clear_phone: bool = Field(
        default=False, description="Clear the profile's phone number when the customer has no valid phone number."
    )
    merge_guests: bool = Field(
        default=True,
        description="When a customer takes over an email address that has a profile without external_id, merge that "
        "profile into the customer's. A merge cannot be undone.",
    )
    erasure: bool = Field(
        default=False,
        description="Request the deletion of the profile in Klaviyo when commercetools deletes a customer with "
        "dataErasure.",
    )


class CartMapping(_Section):
    """The mapping of carts."""

    checkout_when: list[Literal["shippingAddress", "paymentInfo", "customerEmail"]] = Field(
        ["shippingAddress", "paymentInfo", "customerEmail"],
        description="Fields of a cart that has reached checkout: one of them is enough.",
    )
    checkout_url: str = Field(
        "",
        description="URL of the checkout page, with {{cartId}} {{locale}}; empty: the events have no CheckoutURL.",
    )


class ConsentMapping(_Section):
    """The custom fields of customers that hold their consent to marketing."""

    email: str = Field(
        "",
        description="Custom field of customers whose value true is the consent to email marketing; empty: the worker "
        "subscribes no person.",
    )
    sms: str = Field("", description="Custom field of customers whose value true is the consent to SMS marketing.")
    date: str = Field(
        "",
        description="Custom field of customers with the date of the consent. With a date, Klaviyo skips double opt-in.",
    )
    resubscribe: bool = Field(
        default=False, description="Also subscribe a person who has unsubscribed or is suppressed in Klaviyo."
    )


class PaymentMapping(_Section):
    """The mapping of payments."""

    refund_types: list[str] = Field(
        ["Refund"], description='Transaction types that are refunds; "Chargeback" can be one too.'
    )
    refund_states: list[str] = Field(["Success"], description="Transaction states in which a refund counts.")
    reason_field: str = Field("reason", description="Custom field of a transaction that holds the refund's reason.")


class CategoryMapping(_Section):
    """The mapping of categories."""

    max_descendants: int = Field(
        500, ge=0, le=10_000, description="Maximum number of descendants sent again when a category changes."
    )
    max_products: int = Field(
        500, ge=0, le=500, description="Maximum number of products sent again when a category moves to another parent."
    )


class PriceMapping(_Section):
    """The rules that select the price of a catalog entry."""

    channel: str = Field(
        "", description="Id of the distribution channel whose prices take precedence; empty: only prices without one."
    )
    country: str = Field("", description="Country whose prices take precedence; empty: only prices without a country.")


class InventoryMapping(_Section):
    """The rules that select the stock of a variant."""

    channel: str | list[str] = Field(
        "",
        description='Id of the supply channel whose stock counts, or a list of ids; "*": the stock of all channels and '
        "without a channel; empty: the stock without a channel, or of all channels if a sku has none without.",
    )


class MappingConfig(_Section):
    """The whole mapping file."""

    locale: str = Field("en-US", description="Preferred locale of texts; PREFERRED_LOCALE takes precedence.")
    currency: str = Field(
        "", description="Preferred currency of prices; PREFERRED_CURRENCY takes precedence; empty: any."
    )
    product_url_template: str = Field(
        "",
        description="URL of the product page, with {{productSlug}} {{productId}} {{sku}} {{locale}}; "
        "PRODUCT_URL_TEMPLATE takes precedence; empty: the url in the catalog is the text None.",
    )
    stores: list[str] = Field(
        [],
        description="Keys of the stores whose orders, payments and customers are sent; empty: all, and those without a "
        "store.",
    )
    countries: list[CountryCode] = Field(
        [],
        description='Countries whose orders, payments and customers are sent, like ["DE", "AT"]; empty: all.',
    )
    disabled_types: list[str] = Field([], description="Message types to ignore; `klaviyo-worker handlers` lists them.")
    metrics: MetricNames = MetricNames()
    order: OrderMapping = OrderMapping()
    customer: CustomerMapping = CustomerMapping()
    cart: CartMapping = CartMapping()
    consent: ConsentMapping = ConsentMapping()
    payment: PaymentMapping = PaymentMapping()
    category: CategoryMapping = CategoryMapping()
    price: PriceMapping = PriceMapping()
    inventory: InventoryMapping = InventoryMapping()


def load_mapping(path: Path | None, **overrides: str) -> MappingConfig:
    """Return the mapping in the file, or the default mapping. `overrides` (from the environment) take precedence.

    Raises SettingsError with one line per mistake. Each line names the file and the key.
    """
    document = {} if path is None else _read(path)
    try:
        return MappingConfig.model_validate(document | {name: value for name, value in overrides.items() if value})
    except ValidationError as errors:
        raise SettingsError.joined([_problem(path, error) for error in errors.errors()]) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"KLAVIYO_WORKER_CONFIG: cannot read {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"KLAVIYO_WORKER_CONFIG: {path} is not TOML: {error}") from None


def _problem(path: Path | None, error: ErrorDetails) -> SettingsError:
    key = ".".join(map(str, error["loc"]))
    return SettingsError(f"{path or 'mapping'}: {key}: {error['msg']}")
