"""Shared by all stores in SQL databases. Imports no vendor."""
