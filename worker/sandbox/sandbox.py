"""The two emulators together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import orjson

from worker.sandbox.commercetools import api as commercetools
from worker.sandbox.commercetools.sample_shop import sample_shop
from worker.sandbox.klaviyo import api as klaviyo
from worker.sandbox.klaviyo.account import Account
from worker.sandbox.server import Server

if TYPE_CHECKING:
    from worker.sandbox.commercetools.shop import Shop


class Sandbox:
    """An emulator of commercetools with a shop, and one of Klaviyo with an empty account, each on its own port.

    `copies`: the number of additional orders, customers, products and inventory entries, see copies.IDS.
    `latency`: seconds before each response. `rate_limits`: a multiple of Klaviyo's documented rate limits; 0: none.
    `token_lifetime`: seconds until an access token of commercetools expires. `project`: the key of the shop's project.
    """

    def __init__(  # noqa: PLR0913 - keyword arguments with defaults
        self,
        *,
        shop: Shop | None = None,
        account: Account | None = None,
        copies: int = 0,
        latency: float = 0.0,
        rate_limits: float = 0.0,
        token_lifetime: int = 172_800,
        seed: int = 0,
        project: str = commercetools.PROJECT,
        commercetools_port: int = 0,
        klaviyo_port: int = 0,
    ) -> None:
        self.project = project
        self.shop = shop or sample_shop()
        self.account = account or Account()
        self.commercetools_api = commercetools.CommercetoolsApi(self.shop, token_lifetime, copies, project)
        self.commercetools = Server(
            self.commercetools_api.handle,
            commercetools.error_document,
            dict,
            dict,
            port=commercetools_port,
            latency=latency,
            seed=seed,
        )
        self.klaviyo = Server(
            klaviyo.KlaviyoApi(self.account, rate_limits=rate_limits).handle,
            klaviyo.error_document,
            self.account.state,
            self.account.counts,
            port=klaviyo_port,
            latency=latency,
            seed=seed + 1,
        )

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that connect a worker to the sandbox."""
        client = {"clientId": commercetools.CLIENT_ID, "secret": commercetools.CLIENT_SECRET}
        return {
            "CT_API_URL": self.commercetools.url,
            "CT_AUTH_URL": self.commercetools.url,
            "CT_PROJECT_ID": self.project,
            "CT_API_CLIENT": orjson.dumps(client).decode(),
            "CT_SCOPE": f"view_orders:{self.project}",
            "KLAVIYO_API_URL": self.klaviyo.url,
            "KLAVIYO_AUTH_KEY": klaviyo.KEY,
        }

    def __enter__(self) -> Self:
        self.commercetools.start()
        self.klaviyo.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.commercetools.close()
        self.klaviyo.close()
