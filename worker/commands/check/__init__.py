"""`klaviyo-worker check`. Read checks.py first."""
