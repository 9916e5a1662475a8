"""The Klaviyo client and its rate limits. Read client.py first."""
