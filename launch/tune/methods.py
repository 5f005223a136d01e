"""Samplers and pruners as ``NAME[:option=value,...]``, with the options of Optuna's classes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from launch.contract import UsageError, did_you_mean, first_line
from launch.tune.halving import HalvingPruner
from launch.tune.sweep_config import METHODS

SAMPLERS = {
    "tpe": "TPESampler",
    "random": "RandomSampler",
    "grid": "",
    "gp": "GPSampler",
    "nsgaii": "NSGAIISampler",
    "wandb": "",
}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
    "threshold": "ThresholdPruner",
    "halving": "",
}


class GridSampler(BaseSampler):
    """Trial N gets the Nth combination of a list."""

    def __init__(self, combinations: Sequence[Mapping[str, Any]]) -> None:
        self.combinations = combinations

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """No keys are sampled together."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The value of this key in the combination of the trial's number."""
        return self.combinations[trial.number][param_name]


def check_method(option: str, word: str) -> str:
    """The name in ``word``, the value of ``--sampler`` or ``--pruner``. Raises UsageError for an
    unknown name or options that do not suit it."""
    names = SAMPLERS if option == "sampler" else PRUNERS
    name = word.partition(":")[0]
    if name not in names:
        raise UsageError(
            f"--{option} is {name!r}, but must be one of {', '.join(names)}"
            f"{did_you_mean(name, names)}"
        )
    options = _options(option, word)
    if name == "wandb":
        wandb_method(word)
    elif name == "grid":
        if options:
            raise UsageError(f"--{option} is {word!r}, but grid takes no options; remove them.")
    elif option == "sampler":
        sampler(word, seed=0)
    else:
        pruner(word)
    return name


def wandb_method(word: str) -> str:
    """The method of W&B's sweep, with which its server samples; empty for another sampler than
    wandb. Raises UsageError."""
    if word.partition(":")[0] != "wandb":
        return ""
    options = {"method": METHODS[0], **_options("sampler", word)}
    for option in options.keys() - {"method"}:
        raise UsageError(
            f"--sampler is {word!r}, but {option} is not an option of wandb; it has method."
        )
    if options["method"] not in METHODS:
        raise UsageError(
            f"--sampler is {word!r}, but the method of a W&B sweep must be one of "
            f"{', '.join(METHODS)}{did_you_mean(str(options['method']), METHODS)}"
        )
    return str(options["method"])


def is_grid(word: str) -> bool:
    """Whether a sampler takes each combination of the space, here or at W&B."""
    return "grid" in (word.partition(":")[0], wandb_method(word))


def sampler(word: str, seed: int) -> BaseSampler:
    """A new sampler, other than grid and wandb, with this seed."""
    name = word.partition(":")[0]
    cls = getattr(optuna.samplers, SAMPLERS[name])
    made: BaseSampler = _made("sampler", word, cls, {"seed": seed})
    return made


def pruner(word: str) -> BasePruner:
    """A new pruner."""
    name = word.partition(":")[0]
    cls = getattr(optuna.pruners, PRUNERS[name]) if PRUNERS[name] else HalvingPruner
    made: BasePruner = _made("pruner", word, cls, {})
    return made


def _made(option: str, word: str, cls: Any, fixed: Mapping[str, Any]) -> Any:
    options = _options(option, word)
    owner = f"Optuna's {cls.__name__}" if cls.__module__.startswith("optuna.") else "halving"
    accepted = [
        name for name, p in inspect.signature(cls).parameters.items()
        if name not in fixed and name[0] != "_" and p.kind is not p.VAR_KEYWORD
    ]  # fmt: skip
    for name in options:
        if name not in accepted:
            hint = did_you_mean(name, accepted)
            hint = f"; it has {', '.join(accepted) or 'none'}." if hint == "." else hint
            raise UsageError(
                f"--{option} is {word!r}, but {name} is not an option of {owner}{hint}"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an option is experimental
            return cls(**options, **fixed)
    except ImportError as error:
        raise UsageError(
            f"--{option} is {word!r}, which needs a library that cannot be imported "
            f"({first_line(error)}); install isorun[tune], or choose another one."
        ) from None
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"--{option} is {word!r}, which {owner} refuses ({first_line(error)}); "
            f"set its options as {word.partition(':')[0]}:option=value,..."
        ) from None


def _options(option: str, word: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, word.partition(":")[2].split(",")):
        name, equals, text = (each.strip() for each in part.partition("="))
        if not equals or not name or not text:
            raise UsageError(
                f"--{option} is {word!r}, but {part!r} is not of the form option=value; write it "
                "as NAME:option=value,option=value."
            )
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--{option} is {word!r}, but {text!r} is not a value.") from None
    return found
