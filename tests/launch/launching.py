"""Asks TorchX, as its command does, what it would start, without starting it."""

import functools

import torchx
from torchx.runner import get_runner

from tests.support.runs import TINY

NIGHTLY = not torchx.__version__.startswith("0.")  # versions of the nightly are dates


@functools.cache
def runner():
    """TorchX's runner. It reads the entry points of all installed packages."""
    return get_runner()


def dryrun(component, *words, scheduler="local_cwd", **cfg):
    """TorchX's dry-run information."""
    return runner().dryrun_component(component, list(words), scheduler, cfg=cfg)


def app(component, *words, **kwargs):
    """The app that is given to the scheduler."""
    info = dryrun(component, *words, **kwargs)
    return getattr(info, "app", None) or info._app


def role(component, *words, **kwargs):
    """The only role of the app."""
    (only,) = app(component, *words, **kwargs).roles
    return only


def fit(*words, overrides=(), **kwargs):
    """The role of a fit of the tiny task."""
    return role("isorun.fit", *words, *TINY, *overrides, **kwargs)
