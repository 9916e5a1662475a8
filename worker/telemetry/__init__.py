"""Logs and metrics. Read message_log.py for the line that every message gets."""
