"""The engine: pulls messages, processes them in lanes, and holds and retries them. Read runner.py first."""
