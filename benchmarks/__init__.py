"""What the installed worker does in a second, and what a message costs, on the sandbox: `make bench`."""
