"""The processor of this application. `geventbatch.integrations.django` imports this module when Django starts."""

from __future__ import annotations

from django.conf import settings

from examples.wallet.models import Account
from examples.wallet.refusals import Refused
from geventbatch import Processor
from geventbatch.stores import DjangoStore

accounts: Processor[Account] = Processor(
    open_resource=DjangoStore(Account),
    # No window: an operation that comes alone waits for nobody, and those that come during a save share the next.
    min_duration=0,
    max_duration=5,
    # Each has a connection while it runs.
    max_batches=10,
    # Where the database locks no rows, processes that change the same one meet often, and whoever lost replays.
    max_attempts=30,
    max_pending=1000,
    # What checks first and changes then. Anything else is not saved, whatever it has changed.
    clean_errors=(Refused,),
    batching=settings.BATCHING,
)
