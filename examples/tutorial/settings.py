"""For both applications on Django."""

import os
from urllib.parse import parse_qs, urlsplit

_url = urlsplit(os.environ["DATABASE_URL"])

ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["geventbatch.integrations.django", "examples.tutorial.bank"]
MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    "geventbatch.integrations.django.middleware.ErrorAnswers",
]
ROOT_URLCONF = os.environ["ROOT_URLCONF"]
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.path[1:],
        "USER": _url.username or "",
        "PASSWORD": _url.password or "",
        "HOST": parse_qs(_url.query).get("host", [_url.hostname or ""])[0],
        "PORT": str(_url.port or ""),
        "OPTIONS": {"pool": {"min_size": 1, "max_size": 20, "timeout": 30}},  # a fair one for the plain view
    }
}
