"""The commercetools client. queries.py defines the queries, and client.py sends them."""
