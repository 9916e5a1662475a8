"""The checks of `klaviyo-worker check`. Read checks.py first."""
