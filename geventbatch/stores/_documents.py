"""The path by which migrations of earlier releases name the column types of documents."""

from geventbatch.stores.sqlalchemy import KeyText, StateText

__all__ = ["KeyText", "StateText"]
