"""The engine: pulls messages, processes them in lanes, holds and retries them. Read runner.py first."""
