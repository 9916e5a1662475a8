"""Emulators of commercetools and Klaviyo on loopback, with a sample shop, for tests, the demo and benchmarks."""

from __future__ import annotations

from worker.sandbox.commercetools.sample_shop import sample_shop
from worker.sandbox.commercetools.shop import Shop
from worker.sandbox.faults import Fault
from worker.sandbox.sandbox import Sandbox

__all__ = ["Fault", "Sandbox", "Shop", "sample_shop"]
