"""`klaviyo-worker dlq`: list, show, replay and drop dead letters. Start with dead_letters.py."""
