#!/usr/bin/env bash
# Django 5.2.19 on MariaDB: the IntegrityError of a CHECK has no __cause__, the one of a duplicate key has.
#
# "raise … from" is how Django wraps the errors of a driver, so whoever wants the driver's code follows __cause__. For four codes that MySQL's drivers tell
# as OperationalError (1048, 1690, 3819, 4025), its MySQL backend raises an IntegrityError of its own inside an except block. That is then wrapped
# by nobody: only __context__ leads to the driver's error, and its args are a copy of the driver's.
#
# Needs mariadbd and mariadb-install-db (Debian: mariadb-server). Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
export PATH="$PATH:/usr/sbin"
stop() {
    [ -z "${server:-}" ] || { kill "$server" && wait "$server" || true; }
    rm -rf "$folder"
}
trap stop EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet django==5.2.19 pymysql==1.2.4
user=$(id -un)
mariadb-install-db --no-defaults --user="$user" --datadir="$folder/d" --auth-root-authentication-method=normal > "$folder/log" 2>&1
mariadbd --no-defaults --user="$user" --datadir="$folder/d" --socket="$folder/s" --skip-networking >> "$folder/log" 2>&1 &
server=$!
cat > "$folder/run.py" <<'PYTHON'
import sys
import time
from importlib.metadata import version

import pymysql

pymysql.install_as_MySQLdb()

import django
from django.conf import settings

where = sys.argv[1]
for _ in range(300):
    try:
        pymysql.connect(unix_socket=where, user="root").cursor().execute("CREATE DATABASE t")
        break
    except pymysql.Error:
        time.sleep(0.1)
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.mysql", "NAME": "t", "USER": "root", "HOST": where}})
django.setup()
from django.db import IntegrityError, connection, models


class Stock(models.Model):
    name = models.CharField(max_length=20, unique=True)
    n = models.IntegerField()

    class Meta:
        app_label = "shop"
        constraints = [models.CheckConstraint(condition=models.Q(n__lte=100), name="enough")]


with connection.schema_editor() as editor:
    editor.create_model(Stock)
Stock.objects.create(name="tea", n=1)
found = {}
for what, values in (("duplicate key", {"name": "tea", "n": 1}), ("check", {"name": "milk", "n": 1000})):
    try:
        Stock.objects.create(**values)
    except IntegrityError as error:
        found[what] = (type(error.__cause__).__name__, type(error.__context__).__name__, error.args[0])
server = ".".join(map(str, connection.mysql_version))
print(f"Django {django.__version__}, PyMySQL {version('pymysql')}, MariaDB {server}: (cause, context, code) {found}")
assert found["duplicate key"] == ("IntegrityError", "IntegrityError", 1062), found
assert found["check"][0] == "NoneType" and found["check"][1] == "OperationalError" and found["check"][2] == 4025, found
connection.close()
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/s"
