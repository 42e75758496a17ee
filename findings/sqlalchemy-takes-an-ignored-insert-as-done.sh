#!/usr/bin/env bash
# SQLAlchemy 2.1.9 on SQLite: the ORM takes an INSERT that the database ignored as done, and the object may become that of another row.
#
# An UPDATE of no row raises StaleDataError, but the rows of an INSERT are not counted. With a key of one's own, commit() succeeds and the object is persistent,
# while its row is not there. With a key from the database, it is given SQLite's last one of that connection: that of whatever row was inserted before,
# in a session long closed. The object is then that row, and a change to it is saved there. Seen with RAISE(IGNORE) of a trigger and with SQLAlchemy's own
# sqlite_on_conflict_unique="IGNORE". (Told before of the latter, with a warning: SQLAlchemy's issue 5968. Here there is no warning.)
#
# Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet sqlalchemy==2.1.9
cat > "$folder/run.py" <<'PYTHON'
import sqlite3
import warnings

import sqlalchemy as sa
from sqlalchemy import orm

warnings.simplefilter("error")


class Base(orm.DeclarativeBase):
    pass


class Seat(Base):
    __tablename__ = "seat"
    number: orm.Mapped[int] = orm.mapped_column(primary_key=True, autoincrement=False)
    guest: orm.Mapped[str]


class Member(Base):
    __tablename__ = "member"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    email: orm.Mapped[str] = orm.mapped_column(sa.String(50), unique=True, sqlite_on_conflict_unique="IGNORE")
    points: orm.Mapped[int] = orm.mapped_column(default=0)


engine = sa.create_engine("sqlite://")
Base.metadata.create_all(engine)
with engine.begin() as connection:
    for event in ("INSERT", "UPDATE"):
        rule = f"BEFORE {event} ON seat WHEN NEW.guest = 'nobody' BEGIN SELECT RAISE(IGNORE); END"
        connection.exec_driver_sql(f"CREATE TRIGGER no_{event} {rule}")

with orm.Session(engine, expire_on_commit=False) as session:
    seat = Seat(number=1, guest="nobody")
    session.add(seat)
    session.commit()
    inserted = (sa.inspect(seat).persistent, session.scalars(sa.select(Seat.number)).all())
with orm.Session(engine) as session:
    session.add(seat := Seat(number=2, guest="Ann"))
    session.commit()
    seat.guest = "nobody"
    try:
        session.commit()
        updated = "committed"
    except orm.exc.StaleDataError as error:
        updated = type(error).__name__

for email in ("ann@example.org", "bob@example.org"):
    with orm.Session(engine) as session, session.begin():
        session.add(Member(email=email))
with orm.Session(engine) as session:
    session.add(again := Member(email="ann@example.org"))
    session.commit()
    again.points = 100
    session.commit()
    member = again.email
    saved = [tuple(row) for row in session.execute(sa.select(Member.email, Member.points).order_by(Member.id))]
print(f"SQLAlchemy {sa.__version__}, SQLite {sqlite3.sqlite_version}: ignored INSERT: (persistent, rows) {inserted}; ignored UPDATE: {updated}")
print(f"added a second ann@example.org and gave it 100 points: it is {member}, and the rows are {saved}")
assert (inserted, updated) == ((True, []), "StaleDataError"), (inserted, updated)
assert (member, saved) == ("bob@example.org", [("ann@example.org", 0), ("bob@example.org", 100)]), (member, saved)
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
