"""The simulation of operations across keys: a world as in `simulation`, whose store saves all of a bulk or nothing.

Each call names one key (`run`) or up to five (`run_across`). What has to hold: an operation is saved at all its keys or
at none, as its caller was told; in the order of admission on each key; no two running bulks have a key in common; each
is applied to what those before it have left, and to nothing of one that has raised; nobody waits for nobody; and
nothing is left over. `reached` counts what the examples have come to, so that a test can tell that nothing is missing.
"""
