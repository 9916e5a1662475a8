"""Azure Service Bus queues and subscriptions. Start with queue.py."""
