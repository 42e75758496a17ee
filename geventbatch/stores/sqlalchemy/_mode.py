"""The option ``mode``: whether a lock or a comparison keeps other writers from a batch's row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    import sqlalchemy as sa

Mode = Literal["lock", "version"]


def mode_of(engine: sa.Engine, mode: Mode | None) -> Mode:
    """Return the chosen mode, or the database's default. Raises a `ValueError` if *engine* cannot have it."""
    own = vars(engine.dialect).get("_on_connect_isolation_level")  # the argument of `create_engine`
    levels = {own, engine.get_execution_options().get("isolation_level")}
    if "AUTOCOMMIT" in levels:
        raise ValueError("an engine in AUTOCOMMIT has no transactions, and a batch is one")
    has_locks = on_server(engine)
    if mode is None:
        mode = "lock" if has_locks else "version"
    if mode not in ("lock", "version"):
        raise ValueError(f"mode={shown(mode)}: pass 'lock', 'version' or None")
    if mode == "lock" and not has_locks:
        raise ValueError("mode='lock': SQLite has no row locks; pass 'version' or None")
    insisted = levels & {"REPEATABLE READ", "SERIALIZABLE"}
    if mode == "lock" and insisted:
        raise ValueError(
            f"mode='lock' is for READ COMMITTED, but the engine has isolation_level={shown(insisted.pop())}: a "
            "batch that has waited for a locked row would get an error. Pass mode='version', or an engine without it"
        )
    return mode


def on_server(engine: sa.Engine) -> bool:
    """Return whether *engine* is of a database server, so that a query takes a round trip."""
    return engine.dialect.name != "sqlite"
