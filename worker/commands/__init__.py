"""The work of the commands. Their options and exit codes are in worker/cli."""
