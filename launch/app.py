"""What TorchX is asked to start: the node agent on each node, with a training under it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launch import shape as shapes
from launch.contract import UsageError
from launch.identity import Identity
from launch.ports import DEFAULT_PORT
from launch.secrets import withhold

if TYPE_CHECKING:
    from torchx.specs import AppDef, Resource

AGENT = ("-m", "launch.agent")
IMAGES = ("isorun:cpu", "isorun:cuda")  # as docker/ builds them
_PREFLIGHTS = ("auto", "off", "quick", "full")


@dataclass(frozen=True)
class Launch:
    """The placement's half of a launch, as the components' arguments say it."""

    shape: shapes.Shape
    resource: Resource
    image: str
    name: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[Any] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    max_retries: int = 0

    @classmethod
    def of(
        cls,
        j: str,
        h: str | None,
        numbers: tuple[int, int, int],
        image: str | None,
        name: str | None,
        env: Mapping[str, str] | None,
        mounts: list[str] | None,
        metadata: Mapping[str, str] | None,
        max_retries: int,
    ) -> Launch:
        """Checks the arguments of a component; ``numbers`` are cores, GPUs and MiB of memory.
        Raises UsageError."""
        shape = shapes.parse(j)
        resource = shapes.resource(shape, h, *numbers)
        if shape.processes is None and resource.gpu > 0:
            shape = replace(shape, processes=resource.gpu)
        if max_retries < 0:
            raise UsageError(f"--max_retries must not be negative, but is {max_retries}.")
        return cls(
            shape, resource, image or IMAGES[resource.gpu > 0], name, withhold(env or {}),
            _mounts(mounts or []), dict(metadata or {}), max_retries,
        )  # fmt: skip

    def app(
        self,
        role: str,
        identity: Identity,
        command: Sequence[str],
        *,
        options: Sequence[str] = (),
        rdzv_port: int = 0,
    ) -> AppDef:
        """One role, one agent per node; ``options`` are further ones of the agent's."""
        from torchx.specs import macros

        shape = self.shape
        words = ["--nnodes", shape.nnodes, "--nproc-per-node", str(shape.processes or "auto")]
        if shape.max_nodes > 1:
            # Not an endpoint with a default: a missing variable must not become localhost.
            words += ["--rdzv-host-env", macros.rank0_env, "--node-rank", macros.replica_id]
            words += ["--rdzv-port", str(rdzv_port)] if rdzv_port else []
        return self._app(role, identity, [*AGENT, *words, *options, "--", *literal(command)],
                         rdzv_port)  # fmt: skip

    def alone(self, role: str, identity: Identity, arguments: Sequence[str]) -> AppDef:
        """One role whose nodes do not meet; each runs ``python`` with these arguments."""
        return self._app(role, identity, list(arguments), 0)

    def _app(self, role: str, identity: Identity, args: list[str], port: int) -> AppDef:
        from torchx.specs import AppDef, Role

        elastic = self.shape.min_nodes < self.shape.max_nodes
        return AppDef(
            name=_app_name(self.name or identity.group),
            metadata=dict(self.metadata),
            roles=[
                Role(
                    name=role,
                    image=self.image,
                    entrypoint="python",
                    args=args,
                    # What the user says wins, an identity of theirs included.
                    env={**identity.environment(), **self.env},
                    num_replicas=self.shape.max_nodes,
                    min_replicas=self.shape.min_nodes if elastic else None,
                    max_retries=self.max_retries,
                    resource=self.resource,
                    port_map={"c10d": port or DEFAULT_PORT},
                    mounts=list(self.mounts),
                )
            ],
        )


def agent_options(preflight: str, max_restarts: int) -> list[str]:
    """The agent's options that components share. Raises UsageError."""
    if preflight not in _PREFLIGHTS:
        raise UsageError(
            f"--preflight is {preflight!r}, but must be one of {', '.join(_PREFLIGHTS)}."
        )
    if max_restarts < 0:
        raise UsageError(f"--max_restarts must not be negative, but is {max_restarts}.")
    return ["--max-restarts", str(max_restarts), "--preflight", preflight]


def given(command: Sequence[str]) -> Sequence[str]:
    """The command of ``isorun.run``. Raises UsageError if there is none."""
    if not command:
        raise UsageError(
            "isorun.run was given no command; write it after --, such as `torchx run isorun.run "
            "-- python -m train verify run.dir=/runs/mine`."
        )
    return command


def literal(words: Sequence[str]) -> list[str]:
    """Words in which a ``$`` is one: TorchX takes ``$$`` and ``${app_id}`` for its own."""
    return [word.replace("$", "$$") for word in words]


def _app_name(name: str) -> str:
    """As clusters take it: lower-case letters, digits and ``-``, a letter first, not too long."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-")
    return slug if slug[:1].isalpha() else f"run-{slug}".rstrip("-")


def _mounts(mounts: list[str]) -> list[Any]:
    from torchx.specs import parse_mounts

    try:
        return list(parse_mounts(mounts))
    except (KeyError, ValueError) as error:
        said = str(error.args[0])
        said += " is missing" if said in {"src", "dst"} else ""
        raise UsageError(
            f"--mounts {','.join(mounts)}: {said}; write "
            "type=bind,src=/on/the/host,dst=/in/the/container[,readonly]."
        ) from None
