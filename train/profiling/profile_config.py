"""The config section ``profile``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from train.section import Section


class ProfileConfig(Section):
    """Traces of some steps by torch.profiler, in profile/ of the run directory."""

    wait: int = Field(5, ge=0)
    """Steps without recording before each trace; the first ones of an attempt are slower."""

    warmup: int = Field(1, ge=0)
    """Steps before each trace in which the profiler runs and its results are dropped."""

    active: int = Field(3, ge=1, le=1000)
    """Steps in each trace."""

    repeat: int = Field(1, ge=1)
    """Traces per attempt."""

    ranks: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    """Ranks that record. Each has files of its own."""

    record_shapes: bool = False
    """Record the shapes of the operators' inputs."""

    with_stack: bool = False
    """Record the source lines that call the operators; slower, and much larger files."""

    memory: bool = False
    """Record allocations in the traces. On a GPU also keep a history of them, which is written
    when the memory runs out."""
