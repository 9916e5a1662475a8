"""The work of `klaviyo-worker transform`: traces of notifications, and their explanations."""
