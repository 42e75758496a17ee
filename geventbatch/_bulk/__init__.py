"""Batches of many keys that are loaded and saved together."""
