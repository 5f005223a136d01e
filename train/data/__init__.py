"""Sample order, batch plan, data loading, and the ledger of used samples."""
