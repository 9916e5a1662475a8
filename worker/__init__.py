"""Keep Klaviyo in step with commercetools: parse, enrich, transform, send."""
