"""The status page: how a worker is, for a person. worker/health.py serves it."""
