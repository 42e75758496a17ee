"""A Django project for the tests. Its default database is a file of SQLite; tests add others as they need them."""

import tempfile
from pathlib import Path

SECRET_KEY = "none"  # noqa: S105 - nothing is signed here
INSTALLED_APPS = ["geventbatch.integrations.django", "tests.support.django_project.bank"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": str(Path(tempfile.mkdtemp(prefix="django-")) / "default.sqlite"),
    },
}
ROOT_URLCONF = "tests.support.django_project.urls"
ALLOWED_HOSTS = ["*"]
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
