"""isorun: distributed training whose result does not depend on where it runs."""
