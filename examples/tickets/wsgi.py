"""The application as gunicorn loads it."""

from examples.tickets.settings import Settings
from examples.tickets.web import create_app

app = create_app(Settings.from_environment())
