"""Breaks gunicorn, its workers, the server and the connections to it, and then counts what is there.

    python -m tests.support.chaos                                               # ten seconds for each store
    python -m tests.support.chaos --seconds 28800                               # a night
    python -m tests.support.chaos --store redis-version --seed 7 --seconds 60   # one round again
    python -m tests.support.chaos --store postgres-lock --mutant early          # has to fail

It plays rounds of a minute at most, each with workers and a database of its own. The seed decides what is thrown when;
it cannot decide what is hit. Exits with 1 at the first round in which a rule was broken.
"""

from gevent import monkey

monkey.patch_all()

import argparse
import random
import sys
from contextlib import suppress
from math import ceil
from shutil import which

from tests.support.chaos.places import STORES
from tests.support.chaos.round import Outcome, play
from tests.support.chaos.settings import MUTANTS

SHORT_ROUND = 10.0
LONGEST_ROUND = 60.0


def main() -> int:
    told = _arguments()
    if told.mutant == "no-conflicts" and "mapped" in told.store:
        sys.exit("this mutant is made for documents and for Redis")
    if told.mutant == "halves" and not told.store.startswith("transfers"):
        sys.exit("this mutant is made for transfers")
    if told.mutant == "trusting" and told.store != "postgres-reuse":
        sys.exit("this mutant is made for postgres-reuse")
    stores: tuple[str, ...] = STORES if told.store == "all" else (told.store,)
    if told.store == "all" and which("mariadbd") is None:
        print("left out: mariadbd is not here")
        stores = tuple(store for store in STORES if "mariadb" not in store)
    rounds = max(len(stores), ceil(told.seconds / LONGEST_ROUND))
    seconds = told.seconds / rounds
    sums: dict[str, Outcome] = {}
    with suppress(KeyboardInterrupt):  # at breakfast
        for number in range(rounds):
            store, seed = stores[number % len(stores)], told.seed + number
            options = {"mutant": told.mutant, "clients": told.clients, "idempotent": told.idempotency}
            outcome = play(store, str(seed), seconds, **options)
            print(f"{store}, seed {seed}, {seconds:.0f} s: {outcome.line()}", flush=True)
            sums[store] = sums.get(store, Outcome()) + outcome
            if outcome.broken:
                break
    for store, outcome in sums.items():
        print(f"\n{store}:\n{outcome.table()}")
    broken = [line for outcome in sums.values() for line in outcome.broken]
    for line in broken[:100]:
        print(line)
    print(f"\n{len(broken)} broken rules" if broken else "\nno rule was broken")
    return 1 if broken else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.support.chaos", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=SHORT_ROUND * len(STORES),
        help="of faults, all rounds together; 28800 is a night",
    )
    parser.add_argument("--store", choices=("all", *STORES), default="all")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--mutant", choices=MUTANTS, help="have the workers be wrong in this way")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument(
        "--idempotency",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="half of the entries come with idempotency keys",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
