"""`klaviyo-worker transform`: a trace of one notification, and its explanation."""
