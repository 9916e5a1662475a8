"""servicebus."""
