"""The Klaviyo client and its rate limits. Start with client.py."""
