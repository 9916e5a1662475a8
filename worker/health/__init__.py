"""Health: probes, the status page and systemd notifications. server.py serves the port."""
