"""TorchX apps: one role, whose replicas are the nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launch.agent_command import AGENT
from launch.contract import UsageError, port_number
from launch.ports import DEFAULT_PORT
from launch.secrets import withhold
from launch.torchx import shape as shapes
from launch.torchx.run_ids import RunIds

if TYPE_CHECKING:
    from torchx.specs import AppDef, Resource

IMAGES = ("isorun:cpu", "isorun:cuda")  # built from docker/


@dataclass(frozen=True)
class AppBuilder:
    """The arguments that all components share, checked."""

    shape: shapes.Shape
    resource: Resource
    image: str
    name: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[Any] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    max_retries: int = 0

    @classmethod
    def from_arguments(
        cls,
        j: str,
        h: str | None,
        resources: tuple[int, int, int],
        image: str | None,
        name: str | None,
        env: Mapping[str, str] | None,
        mounts: list[str] | None,
        metadata: Mapping[str, str] | None,
        max_retries: int,
    ) -> AppBuilder:
        """Checks a component's arguments; ``resources`` are cores, GPUs and MiB of memory.
        Raises UsageError."""
        shape = shapes.parse(j)
        resource = shapes.resource(shape, h, *resources)
        if shape.processes is None and resource.gpu > 0:
            shape = replace(shape, processes=resource.gpu)
        if max_retries < 0:
            raise UsageError(f"--max_retries must not be negative, but is {max_retries}.")
        return cls(
            shape, resource, image or IMAGES[resource.gpu > 0], name, withhold(env or {}),
            _mounts(mounts or []), dict(metadata or {}), max_retries,
        )  # fmt: skip

    def with_agent(
        self,
        role: str,
        ids: RunIds,
        command: Sequence[str],
        *,
        options: Sequence[str] = (),
        rdzv_port: int = 0,
    ) -> AppDef:
        """An agent on each node, which runs the command as each rank; ``options`` are further
        options of the agent."""
        from torchx.specs import macros

        if rdzv_port and not port_number(str(rdzv_port)):
            raise UsageError(
                f"--rdzv_port must be a port from 1 to 65535, or 0 for the default, but is "
                f"{rdzv_port}."
            )
        shape = self.shape
        words = ["--nnodes", shape.nnodes, "--nproc-per-node", str(shape.processes or "auto")]
        if shape.max_nodes > 1:
            # By variable: `--rdzv-endpoint=${...:=localhost}`, as TorchX's own component has it,
            # lets each node train alone if the variable is missing.
            words += ["--rdzv-host-env", macros.rank0_env, "--node-rank", macros.replica_id]
            words += ["--rdzv-port", str(rdzv_port)] if rdzv_port else []
        args = [*AGENT, *words, *options, "--", *literal(command)]
        return self._app(role, ids, args, rdzv_port)

    def without_agent(self, role: str, ids: RunIds, arguments: Sequence[str]) -> AppDef:
        """``python ARGUMENTS`` on each node; the nodes do not communicate."""
        return self._app(role, ids, list(arguments), 0)

    def _app(self, role: str, ids: RunIds, args: list[str], port: int) -> AppDef:
        from torchx.specs import AppDef, Role

        return AppDef(
            name=_app_name(self.name or ids.group),
            metadata=dict(self.metadata),
            roles=[
                Role(
                    name=role,
                    image=self.image,
                    entrypoint="python",
                    args=args,
                    env={**ids.environment(), **self.env},  # --env wins, also over ids
                    num_replicas=self.shape.max_nodes,
                    min_replicas=self.shape.min_nodes if self.shape.is_elastic else None,
                    max_retries=self.max_retries,
                    resource=self.resource,
                    port_map={"c10d": port or DEFAULT_PORT},
                    mounts=list(self.mounts),
                )
            ],
        )


def required(command: Sequence[str]) -> Sequence[str]:
    """The command of ``isorun.run``. Raises UsageError if there is none."""
    if not command:
        raise UsageError(
            "isorun.run needs a command; write it after --, such as `torchx run isorun.run -- "
            "python -m train verify run.dir=/runs/mine`."
        )
    return command


def literal(words: Sequence[str]) -> list[str]:
    """Words with each ``$`` doubled, so that TorchX does not substitute ``$$`` or ``${app_id}``."""
    return [word.replace("$", "$$") for word in words]


def _app_name(name: str) -> str:
    """A valid name on all schedulers: at most 32 lower-case letters, digits and ``-``, and the
    first is a letter."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-")
    return slug if slug[:1].isalpha() else f"run-{slug}".rstrip("-")


def _mounts(mounts: list[str]) -> list[Any]:
    from torchx.specs import parse_mounts

    try:
        return list(parse_mounts(mounts))
    except (KeyError, ValueError) as error:
        reason = str(error.args[0])
        reason += " is missing" if reason in {"src", "dst"} else ""
        raise UsageError(
            f"--mounts {','.join(mounts)}: {reason}; write "
            "type=bind,src=/on/the/host,dst=/in/the/container[,readonly]."
        ) from None
