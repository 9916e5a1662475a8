"""Former names of settings, options and mapping keys. The use of one is an error that names its replacement."""

from __future__ import annotations

SETTINGS = {
    "KLAVIYO_WORKER_CATALOG_TTL": "KLAVIYO_WORKER_CACHE_TTL",
    "KLAVIYO_WORKER_CONCURRENCY": "KLAVIYO_WORKER_MAX_REQUESTS",
    "KLAVIYO_WORKER_DEAD_LETTER": "KLAVIYO_WORKER_DEAD_LETTER_MODE",
    "KLAVIYO_WORKER_GRACE_PERIOD": "KLAVIYO_WORKER_SHUTDOWN_GRACE_PERIOD",
    "KLAVIYO_WORKER_METRICS_PORT": "KLAVIYO_WORKER_HTTP_PORT",
    "KLAVIYO_WORKER_PARK_SECONDS": "KLAVIYO_WORKER_PARK_RETRY_INTERVAL",
    "KLAVIYO_WORKER_RATE_SHARE": "KLAVIYO_WORKER_RATE_LIMIT_SHARE",
    "KLAVIYO_WORKER_RETRY_SECONDS": "KLAVIYO_WORKER_RETRY_TIMEOUT",
}

OPTIONS = {
    "--catalog-ttl": "--cache-ttl",
    "--concurrency": "--max-requests",
    "--dead-letter": "--dead-letter-mode",
    "--enriched": "--commercetools",
    "--failures": "--failures-file",
    "--grace-period": "--shutdown-grace-period",
    "--metrics-port": "--http-port",
    "--park-seconds": "--park-retry-interval",
    "--rate-share": "--rate-limit-share",
    "--resume": "--checkpoint",
    "--retry-seconds": "--retry-timeout",
}

MAPPING_KEYS = {
    "category.descendants": "category.max_descendants",
    "customer.custom_fields.map": "customer.custom_fields.rename",
    "disabled": "disabled_types",
    "order.cancelled_order": "order.cancelled_states",
    "order.custom_fields.map": "order.custom_fields.rename",
    "order.fulfilled_order": "order.fulfilled_states",
    "order.fulfilled_shipment": "order.fulfilled_shipment_states",
    "order.properties.map": "order.properties.rename",
}
