"""Where the time of a run goes: a clock per process, the ledger of all attempts, and its reader."""
