"""Logs and metrics. message_log.py writes the canonical log line of each message."""
