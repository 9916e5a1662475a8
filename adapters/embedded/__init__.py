"""The embedded queue, in a SQLite file."""
