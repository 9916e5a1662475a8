"""Conversions from commercetools JSON to Klaviyo values. Malformed data gives None, "" or {}, but never an error."""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from worker.json_access import as_dict, as_dicts, as_key, as_text, parse_time, unique

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from worker.mapping import PropertyRules
    from worker.model import Json

MAX_FRACTION_DIGITS = 20  # commercetools' limit for highPrecision money
MAX_MINOR_UNITS = 2**63
_DIGITS = {  # ISO 4217: the digits of the currencies whose minor unit is not a hundredth
    code: digits
    for digits, codes in (
        (0, "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"),
        (3, "BHD IQD JOD KWD LYD OMR TND"),
        (4, "CLF UYW"),
    )
    for code in codes.split()
}
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


def first_nonempty(*values: str) -> str:
    """Return the first text that is not empty, or ""."""
    for value in values:  # much faster than a generator
        if value:
            return value
    return ""


def compact(values: Json) -> Json:
    """Return the values without empty ones. 0 and false are not empty."""
    return {name: value for name, value in values.items() if value or value == 0}


def report_empty(values: Json) -> Iterator[str]:
    """Describe the values that `compact` leaves out."""
    compacted = compact(values)
    if names := [name for name in values if name not in compacted]:
        yield f"without a value: {', '.join(names)}"


def amount(money: Any) -> Decimal | None:
    """Return the exact amount of a centPrecision or highPrecision money in major units, or None."""
    minor = _minor_units(money)
    return None if minor is None else Decimal(minor[0]).scaleb(-minor[1])


def _minor_units(money: Any) -> tuple[int, int] | None:
    """Return minor units and fraction digits of a money: https://docs.commercetools.com/api/types#typedmoney.

    A money without fractionDigits has those of its currency.
    """
    if not isinstance(money, dict):
        return None
    units = money.get("preciseAmount")
    if type(units) is not int:
        units = money.get("centAmount")
    digits = money["fractionDigits"] if "fractionDigits" in money else _DIGITS.get(currency(money), 2)
    if type(units) is not int or type(digits) is not int:  # a boolean is no number
        return None
    return (units, digits) if abs(units) < MAX_MINOR_UNITS and 0 <= digits <= MAX_FRACTION_DIGITS else None


def number(value: Decimal | None) -> float | None:
    """Return an exact amount as a JSON number, or None."""
    return None if value is None else float(value)


def money(value: Any) -> float | None:
    """Return a money as a JSON number in major units, or None."""
    minor = _minor_units(value)
    return None if minor is None else minor[0] / 10 ** minor[1]  # the same float as with a Decimal


def total(values: Iterable[Any]) -> Decimal | None:
    """Return the exact sum of moneys, or None if there are none."""
    amounts = [part for part in map(amount, values) if part is not None]
    return sum(amounts, Decimal(0)) if amounts else None


def currency(money: Any) -> str:
    """Return the ISO 4217 code of a money, or ""."""
    return as_text(as_dict(money).get("currencyCode"))


def localized(value: Any, locale: str) -> str:
    """Return the best text of a LocalizedString for a locale, or "".

    The order of preference is: the locale, its language, a regional variant of that language, the first text. `value`
    can also be a plain text, because attributes can have either type.
    """
    if isinstance(value, str):
        return value.strip()
    texts = as_dict(value)
    if text := as_text(texts.get(locale)):
        return text
    language = locale.partition("-")[0]
    if text := as_text(texts.get(language)):
        return text
    regional = (key for key in texts if key.partition("-")[0] == language)
    return next(filter(None, (as_text(texts[key]) for key in chain(regional, texts))), "")


def attribute_text(value: Any, locale: str) -> str:
    """Return the text of a product attribute: a text, a localized text, an enum `{key, label}`, or a set of these.

    For a set, return the first text that is not empty.
    """
    entries = value if isinstance(value, list) else [value]
    return next(filter(None, (_entry_text(entry, locale) for entry in entries)), "")


def _entry_text(value: Any, locale: str) -> str:
    if isinstance(value, dict) and "label" in value:
        return first_nonempty(localized(value["label"], locale), as_text(value.get("key")))
    return localized(value, locale)


def attribute(variant: Json, name: str) -> Any:
    """Return the value of a variant's attribute, or None."""
    found = (entry.get("value") for entry in as_dicts(variant.get("attributes")) if entry.get("name") == name)
    return next(found, None)


def image_urls(variant: Any) -> list[str]:
    """Return the URLs of the variant's images, in order."""
    return unique(as_text(image.get("url")) for image in as_dicts(as_dict(variant).get("images")))


def image_url(variant: Any) -> str:
    """Return the URL of the variant's first image, or ""."""
    images = as_dicts(as_dict(variant).get("images"))
    return next((url for image in images if (url := as_text(image.get("url")))), "")


def breadcrumb(category: Json, categories: Mapping[str, Json], locale: str) -> str:
    """Return the names from the root to the category: `Women > Pants > Jeans`."""
    return breadcrumbs(category, categories, locale)[-1]


def breadcrumbs(category: Json, categories: Mapping[str, Json], locale: str) -> list[str]:
    """Return the breadcrumbs of all ancestors, starting at the root, and of the category."""
    ids = [as_text(ancestor.get("id")) for ancestor in as_dicts(category.get("ancestors"))]
    crumbs: list[str] = []
    above = ""
    for entry in [*(categories[ancestor] for ancestor in ids if ancestor in categories), category]:
        name = localized(entry.get("name"), locale)
        above = f"{above} > {name}" if above and name else above or name
        crumbs.append(above)
    return crumbs


def filter_properties(values: Any, rules: PropertyRules) -> Json:
    """Return the non-empty properties that the rules include, renamed by the rules."""
    selected = {
        rules.rename.get(name, name): value for name, value in as_dict(values).items() if _is_included(name, rules)
    }
    return compact(selected)


def custom_properties(resource: Json, rules: PropertyRules, locale: str) -> Json:
    """Return the resource's non-empty custom fields that the rules include, as values that a segment can use."""
    values = as_dict(as_dict(resource.get("custom")).get("fields"))
    return filter_properties({name: custom_value(value, locale) for name, value in values.items()}, rules)


def custom_value(value: Any, locale: str) -> Any:
    """Return the value of a custom field: https://docs.commercetools.com/api/projects/types.

    A money becomes a number in major units, a reference its id (else its key), an enum its label (else its key), a
    localized text the text for the locale, and a set a list of these. Every other value stays as it is.
    """
    if isinstance(value, list):
        return [entry for entry in (_single_value(each, locale) for each in value) if entry not in (None, "")]
    return _single_value(value, locale)


def _single_value(value: Any, locale: str) -> Any:
    if not isinstance(value, dict):
        return value
    if "centAmount" in value or "preciseAmount" in value:
        return money(value)
    if "typeId" in value:
        return first_nonempty(as_text(value.get("id")), as_text(value.get("key")))
    if "label" in value:
        return _entry_text(value, locale)
    is_localized = all(isinstance(text, str) for text in value.values())
    return localized(value, locale) if is_localized else value


def report_filtered(values: Any, rules: PropertyRules, section: str) -> Iterator[str]:
    """Describe the properties that `filter_properties` leaves out or renames.

    `section` is the key of `rules` in the mapping.
    """
    names = list(as_dict(values))
    excluded = [name for name in names if name in rules.exclude]
    others = [name for name in names if name not in excluded and not _is_included(name, rules)]
    if excluded:
        yield f"{', '.join(excluded)}: listed in {section}.exclude"
    if others:
        yield f"{', '.join(others)}: not listed in {section}.include"
    for name in names:
        if name in rules.rename and _is_included(name, rules):
            yield f"the name {name}: renamed to {rules.rename[name]} by {section}.rename"


def _is_included(name: str, rules: PropertyRules) -> bool:
    return (not rules.include or "*" in rules.include or name in rules.include) and name not in rules.exclude


def add_seconds(value: Any, seconds: int) -> str:
    """Return an RFC 3339 time plus `seconds`, or "" if the value is not a time."""
    moment = parse_time(value)
    try:
        return "" if moment is None else (moment + timedelta(seconds=seconds)).isoformat()
    except OverflowError:
        return ""


def product_url(slug: Any, product_id: str, variant: Json, locale: str, template: str) -> str:
    """Return the URL of a product page, or "" if there is no template or a placeholder has no value."""
    values = {
        "productSlug": localized(slug, locale),
        "productId": product_id,
        "sku": as_key(variant.get("sku")),
        "locale": locale,
    }
    return fill_template(template, values)


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """Return a URL: the template with percent-encoded values in place of its placeholders; "" if one has no value.

    An unknown placeholder stays as it is.
    """
    filled = []
    for index, part in enumerate(_split_template(template)):
        if index % 2 == 0:
            filled.append(part)
        elif value := values.get(part, ""):
            filled.append(quote(value, safe=""))
        elif part in values:
            return ""
        else:
            filled.append(f"{{{{{part}}}}}")
    return "".join(filled)


@lru_cache(maxsize=64)  # the templates of the mapping
def _split_template(template: str) -> list[str]:
    """Return the texts between the placeholders, and between them the names of the placeholders."""
    return _PLACEHOLDER.split(template)
