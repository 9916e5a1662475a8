"""What both clients share: the HTTP transport, retries with backoff and circuit breakers."""
