#!/usr/bin/env bash
# peewee 4.5.3: two models of one class name (of two modules) share the names of their indexes, and the second one's unique
# index is never made.
#
# An index is named after the class, not after the table, and create_tables() sends CREATE UNIQUE INDEX IF NOT EXISTS. In SQLite (and within a
# schema of PostgreSQL) the name of an index is unique in the database, so that the second one is taken to be there. Nobody is told: duplicates are
# stored. A table name of its own does not help, since only the name of the class counts.
#
# Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet peewee==4.5.3
cat > "$folder/run.py" <<'PYTHON'
import peewee

database = peewee.SqliteDatabase(":memory:")


def model(table):
    class Account(peewee.Model):
        number = peewee.CharField(unique=True)

        class Meta:
            database = None
            table_name = table

    Account._meta.set_database(database)
    return Account


shop, bank = model("shop_account"), model("bank_account")
database.create_tables([shop, bank])
names = {one: [index.name for index in database.get_indexes(one)] for one in ("shop_account", "bank_account")}
print(f"peewee {peewee.__version__}: indexes {names}")
with_index, without = (bank, shop) if names["bank_account"] else (shop, bank)
without.create(number="1")
without.create(number="1")
with_index.create(number="1")
try:
    with_index.create(number="1")
    refused = False
except peewee.IntegrityError:
    refused = True
print(f"{with_index._meta.table_name} refuses a duplicate: {refused}; {without._meta.table_name} holds {without.select().count()} of one number")
assert sorted(names.values()) == [[], ["account_number"]] and refused and without.select().count() == 2
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
