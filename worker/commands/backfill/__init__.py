"""Sends what commercetools holds already: the worker's own stages, fed with records instead of a queue's messages.

docs/decisions/0023-backfill.md
"""
