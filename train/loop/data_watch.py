"""What a run can notice of its data without reading more of it: samples that a task leaves out, and
a dataset whose length changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any


class DataWatch:
    """Warns once of each. Not collective; costs no exchange and no wait for the device.

    ``datasets`` are by the name of the method that returned them, None for none; ``batch_size`` is
    the global one, ``warn`` shows a warning.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        *,
        unit: str,
        batch_size: int,
        warn: Callable[[str], None],
    ) -> None:
        self._datasets = {name: data for name, data in datasets.items() if data is not None}
        self._lengths = {name: len(dataset) for name, dataset in self._datasets.items()}
        self._counts_samples, self._batch_size = unit == "samples", batch_size
        self._warn = warn

    def step(self, step: int, count: int) -> None:
        """Compares the global count of a step with the samples that it was given. A task that
        counts another unit cannot be compared."""
        if self._counts_samples and count < self._batch_size:
            self._counts_samples = False
            self._warn(
                f"Step {step} counts {count} of its {self._batch_size} samples. If collate() "
                "leaves some out, they are not trained on, although the ledger has them as used; "
                "remove them from the dataset."
            )

    def lengths(self) -> None:
        """Compares the lengths of the datasets with those at the start, in this process."""
        for name, before in list(self._lengths.items()):
            now = before
            with suppress(Exception):  # an error of __len__ would have ended the start
                now = len(self._datasets[name])
            if now != before:
                del self._lengths[name]
                self._warn(
                    f"The dataset of {name}() has {now} samples now, but had {before} at the start "
                    "of this attempt, by which their order is computed; a restart is refused with "
                    "another number. Let its __len__ stay the same."
                )
