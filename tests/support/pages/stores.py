"""For docs/stores.md."""

from contextvars import ContextVar

import redis
import sqlalchemy as sa

from geventbatch import Processor, current_batch
from tests.support.pages.trains import DJANGO_TRAIN as REPLACED
from tests.support.pages.trains import Train, TrainModel, engine

client = redis.Redis()

current_tenant: ContextVar[str] = ContextVar("current_tenant")
SCHEMAS = {"north": "north", "south": "south"}
