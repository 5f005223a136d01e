"""Which sample is seen when: order, batch plan, loading, and the ledger that proves it."""
