"""Google Pub/Sub by streaming pull. Read queue.py first."""
