"""An application of a certain age: each request is a transaction, unless its view says otherwise."""

import os

from examples.wallet.database import database

SECRET_KEY = os.environ.get("SECRET_KEY", "nothing is signed here")
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["geventbatch.integrations.django", "examples.wallet"]
MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    # The last one is asked first when a view raises.
    "geventbatch.integrations.django.middleware.ErrorAnswers",
    "examples.wallet.refusals.Refusals",
]
ROOT_URLCONF = "examples.wallet.urls"
DATABASES = {
    "default": {**database(os.environ.get("DATABASE_URL", "sqlite:///wallet.sqlite")), "ATOMIC_REQUESTS": True}
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
TIME_ZONE = "UTC"
USE_TZ = True
# Without it, nothing reaches the console where DEBUG is off, not even the traceback behind a 500.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(process)d %(levelname)s %(name)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "INFO"},
    # At WARNING, Django has a line for each 404 and 409.
    "loggers": {"django.request": {"level": "ERROR"}},
}

BATCHING = os.environ.get("BATCHING", "on") != "off"
"""False: each operation in a transaction of its own."""
