"""What two or more queues use."""
