"""The engine: pulls messages, runs the pipeline in lanes, holds what cannot be done yet. Read runner.py first."""
