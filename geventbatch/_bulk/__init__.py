"""Bulks: batches of many keys that one worker loads and saves together."""
