"""AWS SQS, polled by the worker or delivered to a Lambda function. Start with queue.py."""
