"""Azure Service Bus queues and subscriptions. Read queue.py first."""
