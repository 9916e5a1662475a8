"""`make bench`: the throughput of the installed worker, and its cost per message, on the sandbox."""
