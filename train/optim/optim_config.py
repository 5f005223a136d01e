"""The config section ``optim``."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from train.optim.spikes import SpikeConfig
from train.section import Section, name_or_path, names_for_editors, non_semantic

Kind = Literal["norm", "bias", "embedding"]
_OVERRIDES = ("betas", "eps", "momentum")
_ONLY_IN_EXPRESSIONS = re.compile(r"[\\^$|(+{]|^\.")
NAMES = {
    "adamw": "torch.optim:AdamW",
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
    "adagrad": "torch.optim:Adagrad",
    "rmsprop": "torch.optim:RMSprop",
    "nadam": "torch.optim:NAdam",
    "radam": "torch.optim:RAdam",
    "adafactor": "torch.optim:Adafactor",
}


class GroupConfig(Section):
    """Settings of the parameters whose names match a pattern, in place of those of ``optim``."""

    pattern: str = Field(min_length=1)
    """Name of a parameter or module as in ``head`` or ``blocks.0``, which includes all that is in
    the module; or a shell pattern of whole names as in ``*.bias`` or ``blocks.[0-3].*``; or, with
    one of the characters ``^ $ \\ | ( + {`` or a dot in front, a regular expression that is
    searched for in the names."""

    lr: float | None = Field(None, ge=0.0)
    """Base learning rate, in place of ``optim.lr``; the schedule multiplies it too."""

    lr_factor: float | None = Field(None, ge=0.0)
    """Factor on ``optim.lr``, in place of ``lr``."""

    weight_decay: float | None = Field(None, ge=0.0)
    """Weight decay of all parameters of the group, also of the kinds in ``optim.no_decay``."""

    betas: list[float] | None = Field(None, min_length=2, max_length=2)
    """Adam's two decay rates."""

    eps: float | None = Field(None, gt=0.0)
    """Adam's epsilon."""

    momentum: float | None = Field(None, ge=0.0)
    """SGD's momentum."""

    @model_validator(mode="after")
    def _check(self) -> GroupConfig:
        if self.lr is not None and self.lr_factor is not None:
            raise ValueError("has both lr and lr_factor; remove one of them")
        if self.model_dump(exclude={"pattern"}, exclude_none=True) == {}:
            raise ValueError(
                f"has the pattern {self.pattern!r}, but no setting; add lr, lr_factor, "
                "weight_decay, betas, eps or momentum"
            )
        try:
            _matcher(self.pattern)
        except re.error as error:
            raise ValueError(
                f"has the pattern {self.pattern!r}, which is no regular expression ({error}); "
                "correct it"
            ) from None
        return self

    def overrides(self) -> dict[str, Any]:
        """The optimiser's arguments that it sets, except learning rate and weight decay."""
        values = {name: getattr(self, name) for name in _OVERRIDES}
        found = {name: value for name, value in values.items() if value is not None}
        if "betas" in found:
            found["betas"] = tuple(found["betas"])
        return found

    def matches(self, name: str) -> bool:
        """Whether the parameter of this name belongs to the group."""
        return bool(_matcher(self.pattern)(name))


def _matcher(pattern: str) -> Any:
    if _ONLY_IN_EXPRESSIONS.search(pattern):
        return re.compile(pattern).search
    if any(character in pattern for character in "*?["):
        return lambda name: fnmatchcase(name, pattern)
    return lambda name: f".{pattern}." in f".{name}."


class OptimConfig(Section):
    """The optimiser and gradient clipping."""

    use: str = Field("adamw", json_schema_extra=names_for_editors(tuple(NAMES)))
    """A name (adamw, adam, sgd, adagrad, rmsprop, nadam, radam, adafactor) or the dotted path
    of a torch.optim.Optimizer class, such as my_project.optim:Lion."""

    lr: float = Field(1e-3, gt=0.0)
    """Base learning rate; the schedule multiplies it by a factor."""

    weight_decay: float = Field(0.0, ge=0.0)
    """Weight decay of all parameters except the kinds in ``no_decay``."""

    no_decay: list[Kind] = ["norm", "bias", "embedding"]
    """Kinds of parameters without weight decay: norm, those of normalisation layers and all other
    vectors and scalars; bias; embedding, embedding tables (a head tied to an embedding counts as
    the embedding)."""

    groups: list[GroupConfig] = []
    """Other settings for parameters by name; the first entry that matches a parameter counts."""

    layer_decay: float | None = Field(None, gt=0.0, le=1.0)
    """Layer-wise decay (Clark et al., 2020): the learning rate of each of the model's blocks is
    this times that of the next one; what is before the first block, and embeddings, count as one
    more block, and what comes after the last block has the full rate. null for none."""

    betas: list[float] | None = Field(None, min_length=2, max_length=2)
    """Adam's two decay rates; null for the optimiser's own default."""

    eps: float | None = Field(None, gt=0.0)
    """Adam's epsilon; null for the optimiser's own default."""

    momentum: float | None = Field(None, ge=0.0)
    """SGD's momentum; null for the optimiser's own default."""

    options: dict[str, Any] = {}
    """Further keyword arguments for the optimiser's constructor."""

    clip_norm: float | None = Field(None, gt=0.0)
    """Clip gradients to this global L2 norm; null for no clipping."""

    spike: SpikeConfig | None = None
    """What to do at a step whose loss or gradient norm is far above that of the steps before; null
    for nothing."""

    max_skipped_steps: int = non_semantic(10, ge=0)
    """A step with a non-finite loss or gradient norm is skipped; more skipped steps in a row than
    this, spikes included, end the run with exit code 78."""

    @field_validator("use")
    @classmethod
    def _check_use(cls, use: str) -> str:
        return name_or_path(use, tuple(NAMES), "module.path:Class")
