"""Probes, the status page and systemd notifications. Read server.py first."""
