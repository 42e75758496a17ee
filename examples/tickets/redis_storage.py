"""The trains in Redis: a hash each. Nothing is locked; whoever saves second loads again and replays."""

from collections.abc import Callable, Mapping
from typing import Literal

from redis import Redis

from examples.tickets.domain import Train, UnknownTrain
from examples.tickets.storage import SeatMap, add, decode, encode
from geventbatch.stores import RedisStore

PREFIX = "train:"


class RedisTrains:
    """What `storage.Store` is, on one Redis server."""

    def __init__(self, url: str) -> None:
        self._client = Redis.from_url(url)
        self.open_train = self._trains()

    def seat_map(self, name: str) -> SeatMap:
        """The train as it was last saved, without waiting for any batch."""
        state, version = self._client.hmget(PREFIX + name, "value", "version")
        if state is None or version is None:
            raise UnknownTrain(f"there is no train {name}")
        # The first version was saved to have the train there.
        return SeatMap(decode(state), saves=int(version) - 1)

    def names(self) -> list[str]:
        """All trains, in the order of the alphabet."""
        return sorted(key.decode().removeprefix(PREFIX) for key in self._client.scan_iter(f"{PREFIX}*"))

    def create(self, trains: Mapping[str, int]) -> None:
        """Add the trains (names and numbers of seats) that are not there yet."""
        add(trains, self._trains(missing=lambda name: Train.empty(name, trains[name])))

    def close(self) -> None:
        """Close the connections that no batch is using."""
        self._client.close()

    def _trains(self, missing: Literal["raise"] | Callable[[str], Train] = "raise") -> RedisStore[Train]:
        return RedisStore(self._client, prefix=PREFIX, encode=encode, decode=decode, missing=missing)
