"""The commercetools client. queries.py lists the queries, client.py sends them."""
