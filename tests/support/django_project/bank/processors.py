"""Found by the app, as every `processors` module of a project."""

from geventbatch import Processor
from geventbatch.stores import DjangoStore
from tests.support.django_project.bank.models import Account

accounts = Processor(open_resource=DjangoStore(Account, by="name"), min_duration=0, max_duration=5, max_batches=4)
