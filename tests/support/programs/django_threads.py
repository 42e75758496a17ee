"""A Django project for servers with threads, without gevent's patch. Operations meet, so two are in two threads."""

import os
import sys
from threading import Barrier

from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from gevent import monkey

assert not monkey.is_module_patched("threading")
settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["DATABASE"]}},
    INSTALLED_APPS=["geventbatch.integrations.django", "tests.support.django_project.bank"],
    ROOT_URLCONF=__name__,
)
application = get_wsgi_application()

from django.db import connection

from tests.support.django_project.bank.models import Account
from tests.support.django_project.bank.processors import accounts

if Account._meta.db_table not in connection.introspection.table_names():
    with connection.schema_editor() as editor:
        editor.create_model(Account)
    Account.objects.bulk_create([Account(name=str(number)) for number in range(1, 4)])

meeting = Barrier(int(os.environ["MEETING"]))
met: set[str] = set()


def deposit(account: Account) -> int:
    if account.name not in met:  # not again in a replay
        met.add(account.name)
        meeting.wait(30)
    account.balance += 1
    return account.balance


def view(request: HttpRequest, number: int) -> HttpResponse:
    return HttpResponse(str(accounts.run(str(number), deposit)))


urlpatterns = [path("<int:number>", view)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
