"""A commercetools and a Klaviyo on loopback, with a sample shop: for tests, the demo and the benchmark."""

from __future__ import annotations

from worker.sandbox.sandbox import Sandbox
from worker.sandbox.server import Fault
from worker.sandbox.shop import Shop, sample_shop

__all__ = ["Fault", "Sandbox", "Shop", "sample_shop"]
