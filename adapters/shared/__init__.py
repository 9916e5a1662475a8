"""Helpers that two or more adapters use."""
