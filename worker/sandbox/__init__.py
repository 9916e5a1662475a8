"""Emulators of commercetools and Klaviyo on loopback, with a sample shop, for tests, the demo and benchmarks."""

from __future__ import annotations

from worker.sandbox.commercetools.shop import Shop, sample_shop
from worker.sandbox.sandbox import Sandbox
from worker.sandbox.server import Fault

__all__ = ["Fault", "Sandbox", "Shop", "sample_shop"]
