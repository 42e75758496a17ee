"""A role of PostgreSQL's for whom a policy of row-level security hides some rows from statements that write."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def hidden_for_writing(owner: sa.Engine, table: str, writable: str, **options: Any) -> Iterator[sa.Engine]:
    """An engine for whom all rows of *table* are there, but only those that are *writable* to change."""
    with owner.begin() as connection:
        schema = connection.exec_driver_sql("SELECT current_schema()").scalar_one()
        role = f"{schema}_clerk"
        for statement in (
            f"CREATE ROLE {role} LOGIN",
            f"GRANT USAGE ON SCHEMA {schema} TO {role}",
            f"GRANT ALL ON {table} TO {role}",
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            f"CREATE POLICY reading ON {table} FOR SELECT USING (true)",
            f"CREATE POLICY writing ON {table} FOR UPDATE USING ({writable})",
        ):
            connection.exec_driver_sql(statement)
    engine = sa.create_engine(owner.url, **options)

    def connects(_: object, __: object, ___: object, given: dict[str, Any]) -> None:
        given.update(user=role, options=f"-csearch_path={schema}")

    sa.event.listen(engine, "do_connect", connects)
    try:
        yield engine
    finally:
        engine.dispose()
        with owner.begin() as connection:
            for statement in (
                f"DROP POLICY reading ON {table}",
                f"DROP POLICY writing ON {table}",
                f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
                f"DROP OWNED BY {role}",
                f"DROP ROLE {role}",
            ):
                connection.exec_driver_sql(statement)
