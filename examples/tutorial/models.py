"""The one table, for Flask."""

import os

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

engine = sa.create_engine(os.environ["DATABASE_URL"], pool_size=20, max_overflow=0)


class Base(DeclarativeBase):
    """Of the mapped classes."""


class Account(Base):
    """Somebody's money."""

    __tablename__ = "bank_account"

    number: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]
