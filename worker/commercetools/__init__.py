"""The commercetools client. Read queries.py for what is asked, client.py for how."""
