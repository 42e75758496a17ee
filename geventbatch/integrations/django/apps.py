"""The app."""

from django.apps import AppConfig


class GeventbatchConfig(AppConfig):
    """Finds the processors of the project."""

    name = "geventbatch.integrations.django"
    label = "geventbatch"
    verbose_name = "geventbatch"
