"""The library as an app of Django: put ``geventbatch.integrations.django`` into ``INSTALLED_APPS``."""
