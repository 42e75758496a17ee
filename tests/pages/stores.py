"""For docs/stores.md."""

import redis

from geventbatch import Processor, current_batch
from tests.pages.trains import DJANGO_TRAIN as REPLACED
from tests.pages.trains import Train, TrainModel, engine

client = redis.Redis()
