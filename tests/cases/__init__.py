"""Cases of whole runs: the content of commercetools and Klaviyo, messages, and what Klaviyo has afterwards."""
