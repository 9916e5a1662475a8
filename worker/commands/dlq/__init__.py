"""`klaviyo-worker dlq`: list, show, replay and drop dead letters. Read dead_letters.py first."""
