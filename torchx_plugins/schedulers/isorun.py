"""isorun's schedulers for a TorchX that was told not to read entry points, as in
``torchx_plugins.named_resources.isorun``."""

import os
from importlib.util import find_spec

from torchx.plugins import register

from launch import schedulers

if os.environ.get("TORCHX_PLUGINS_SOURCE") == "1":
    for _name, _module in schedulers.MODULES.items():
        if find_spec(_module):

            def _create(session_name: str, _name: str = _name, **parameters: object) -> object:
                return schedulers.create(_name, session_name, **parameters)

            globals()[_name] = register.scheduler(name=_name)(_create)
