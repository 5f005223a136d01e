"""From files and overrides to one validated config in which each value knows its origin."""
