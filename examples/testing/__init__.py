"""Tests of an application on SQLAlchemy, which docs/testing.md shows whole."""
