"""isorun's schedulers, for a TorchX that is told to ignore entry points; see
``torchx_plugins.named_resources.isorun``."""

import os
from importlib.util import find_spec

from torchx.plugins import register

from launch.torchx.schedulers import SCHEDULERS, create

if os.environ.get("TORCHX_PLUGINS_SOURCE") == "1":
    for _name, (_module, _) in SCHEDULERS.items():
        if find_spec(_module):

            def _create(session_name: str, _name: str = _name, **parameters: object) -> object:
                return create(_name, session_name, **parameters)

            globals()[_name] = register.scheduler(name=_name)(_create)
