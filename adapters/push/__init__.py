"""A Pub/Sub push endpoint for serverless hosts. Start with queue.py."""
