"""Stores written by hand, which docs/own-stores.md shows whole: each is a file of its own, and passes the contract."""
