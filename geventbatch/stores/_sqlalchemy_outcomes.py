"""The path by which migrations of earlier releases name the column type of an outcome's id."""

from geventbatch.stores.sqlalchemy import OutcomeId

__all__ = ["OutcomeId"]
