"""The start of an attempt: ranks join, find their run, and build what it computes with."""
