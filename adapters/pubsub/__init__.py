"""Google Pub/Sub by streaming pull. Start with queue.py."""
