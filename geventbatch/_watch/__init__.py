"""Watching processors: metrics, log lines, and checks of the set-up. Nothing here can hurt a batch."""
