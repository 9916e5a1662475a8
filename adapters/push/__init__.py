"""A Pub/Sub push endpoint for serverless hosts. Read queue.py first."""
