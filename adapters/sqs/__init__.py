"""AWS SQS, polled by the worker or delivered to a Lambda function. Read queue.py first."""
