"""Sync commercetools to Klaviyo: parse, enrich, transform, send."""
