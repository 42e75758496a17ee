"""Applications that run."""
