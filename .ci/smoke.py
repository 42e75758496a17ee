"""What somebody gets who installs the wheel and nothing else: it imports, it is typed, and it runs an operation.

With an argument, "compiled" or "pure", it has to be of that form.
"""

from gevent import monkey

monkey.patch_all()

import importlib.util
import sys
from importlib.resources import files

import geventbatch
from geventbatch import stores

NOT_NEEDED = (
    "celery",
    "django",
    "dramatiq",
    "flask",
    "gunicorn",
    "huey",
    "hypothesis",
    "psycopg",
    "pytest",
    "redis",
    "sqlalchemy",
)

present = [name for name in NOT_NEEDED if importlib.util.find_spec(name)]
assert not present, f"this environment holds more than the wheel: {present}"
assert files(geventbatch).joinpath("py.typed").is_file(), "type checkers will ignore the annotations"

saved: dict[str, list[str]] = {}
with geventbatch.Processor(
    load_resource=lambda key: saved.get(key, []),
    save_resource=saved.__setitem__,
    min_duration=0,
) as processor:
    processor.run("ICE 1", list.append, "Ann")
assert saved == {"ICE 1": ["Ann"]}, f"not what was run: {saved}"

for name in ("DjangoStore", "RedisStore", "SQLAlchemyStore"):
    try:
        told = repr(getattr(stores, name))
    except ImportError as error:
        told = str(error)
    assert "pip install 'geventbatch[" in told, told
for name in ("gunicorn", "pywsgi", "uwsgi", "wsgi"):
    importlib.import_module(f"geventbatch.integrations.{name}")

form = "compiled" if geventbatch.COMPILED else "pure"
assert form in sys.argv[1:] or not sys.argv[1:], f"it is {form}, and was to be {sys.argv[1]}"

print(f"{geventbatch.__file__}, {form}, ran an operation and saved it")
