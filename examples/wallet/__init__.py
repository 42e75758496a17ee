"""Move money between accounts: a Django application in which one change spans several records.

Read in the order of a transfer:

- `models`: accounts, one line of the audit per operation.
- `processors`: whose operations are batched, and by what; found by the app `geventbatch.integrations.django`.
- three ways to change two accounts: `transfers` (what the views use), `ordering` without batches, and `outbox`, which
  `finish` finishes.
- `views`, `refusals`, `urls`, `settings`: the same as in any Django application.
- `gunicorn.conf.py` runs it in gevent workers, and `__main__` does so in one command.

`python -m examples.wallet.compare` measures what the three ways cost; docs/keys.md tells what each is good for.
"""
