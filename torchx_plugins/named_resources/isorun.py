"""isorun's named resources, for TorchX versions that search this namespace package.

Resources that are also registered as entry points are skipped, since TorchX would warn about each
of them, unless TorchX is told to ignore entry points (TORCHX_PLUGINS_SOURCE=1). The user's own
resources are always registered here.
"""

import logging
import os
from importlib.metadata import entry_points

from torchx.plugins import register

from launch.contract import UsageError
from launch.torchx.resources import BUILT_IN, NamedResource, user_resources

log = logging.getLogger(__name__)


def _register() -> None:
    registered = {point.name for point in entry_points(group="torchx.named_resources")}
    if os.environ.get("TORCHX_PLUGINS_SOURCE") == "1":
        registered = set()
    try:
        users = user_resources()
    except UsageError as error:  # raised here, it would hide all other resources
        log.error("%s", error)
        users = {}
    for name, named in {**BUILT_IN, **users}.items():
        if name not in registered:

            def factory(named: NamedResource = named) -> object:
                return named.resource()

            register.named_resource(name=name)(factory)


_register()
