"""isorun's named resources for TorchX versions that find them by this namespace package.

Those that are registered as entry points as well are left to these, or TorchX would warn of each;
unless it was told not to read entry points (TORCHX_PLUGINS_SOURCE=1). The user's own are
registered here in any case.
"""

import logging
import os
from importlib.metadata import entry_points

from torchx.plugins import register

from launch import resources
from launch.contract import UsageError

log = logging.getLogger(__name__)


def _register() -> None:
    taken = {point.name for point in entry_points(group="torchx.named_resources")}
    if os.environ.get("TORCHX_PLUGINS_SOURCE") == "1":
        taken = set()
    try:
        own = resources.own()
    except UsageError as error:  # an exception would hide the others as well
        log.error("%s", error)
        own = {}
    for name, shape in {**resources.BUILT_IN, **own}.items():
        if name not in taken:

            def factory(shape: resources.Shape = shape) -> object:
                return shape.resource()

            register.named_resource(name=name)(factory)


_register()
