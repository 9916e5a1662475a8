"""HTTP for both clients: transport, backoff and circuit breakers."""
