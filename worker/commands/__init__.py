"""What the commands do. Their options and exit codes are in worker/cli."""
