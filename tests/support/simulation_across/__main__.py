"""Runs examples of the simulation without pytest, and prints how far it is, what failed and what was reached.

    nice python -m tests.support.simulation_across 20000

A part that fails is printed (with ``--shrink`` the shortest example of it), and the next one is run all the same.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import traceback
import warnings

from tests.guarantees.test_simulation_across import PART, run_examples
from tests.support.simulation_across.reached import ALL, REACHED


def main() -> int:
    """Run as many examples as the command line says. Return the number of parts that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("examples", type=int)
    parser.add_argument("--shrink", action="store_true", help="look for the shortest example that fails")
    given = parser.parse_args()
    examples = given.examples
    logging.getLogger("geventbatch").disabled = True
    warnings.simplefilter("ignore")
    sys.setswitchinterval(1000.0)  # nothing that happens by real time may change an example
    gc.disable()
    failed = 0
    for begun in range(0, examples, PART):
        part = min(PART, examples - begun)
        try:
            run_examples(part, shrink=given.shrink)
        except Exception:
            failed += 1
            traceback.print_exc(file=sys.stdout)
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {begun + part:,} examples, {failed} parts failed\n")
        sys.stdout.flush()
    sys.stdout.writelines(f"{REACHED[what]:>10,} {what}\n" for what in ALL)
    return failed


if __name__ == "__main__":
    sys.exit(main())
