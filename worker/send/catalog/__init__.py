"""The sender for catalog entries, and its parts."""
