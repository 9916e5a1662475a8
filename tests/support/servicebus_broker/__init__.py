"""A small Service Bus broker on loopback for the unmodified azure-servicebus SDK, and its client for tests."""
