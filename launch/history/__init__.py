"""What was launched, when, where, from which code, and what became of it."""
