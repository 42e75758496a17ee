"""Operations that are applied once for an idempotency key, and the record of their outcomes."""
