"""What TorchX's scheduler for Slurm lacks: it requeues a job after any failure, and it hands the
environment down in a list that a comma divides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launch.history import ledger
from train.exits import UsageError, is_worth_retrying

if TYPE_CHECKING:
    from torchx.specs import AppDef

# How TorchX's batch script decides.
_REQUEUE = 'if [ "$TORCHX_MAX_RETRIES" -gt '
_CODES = " ".join(str(code) for code in range(1, 256) if is_worth_retrying(code))


class OnSlurm:
    """Goes before TorchX's SlurmScheduler, see ``launch.schedulers``."""

    def submit_dryrun(self, app: AppDef, cfg: Any) -> Any:
        """The batch script, made to requeue only where that makes sense. Raises UsageError."""
        if not ledger.is_ours(app):
            return super().submit_dryrun(app, cfg)  # type: ignore[misc]
        for role in app.roles:
            _refuse_commas(role.env)
        info = super().submit_dryrun(app, cfg)  # type: ignore[misc]
        request = info.request
        kind = type(request)

        class Requeueing(kind):  # type: ignore[misc, valid-type]
            def materialize(self) -> str:
                script: str = super().materialize()
                assert _REQUEUE in script, "TorchX's batch script decides in another way by now"
                case = f'if [[ " {_CODES} " == *" $exitcode "* ]] && [ "$TORCHX_MAX_RETRIES" -gt '
                return script.replace(_REQUEUE, case)

        changed = object.__new__(Requeueing)
        changed.__dict__ = request.__dict__
        info.request = changed
        return info


def _refuse_commas(env: Mapping[str, str]) -> None:
    """srun is told the environment in one list; what follows a comma would be another variable."""
    for name, value in env.items():
        if "," in value:
            raise UsageError(
                f"{name} is {value!r} in the environment of the job, but Slurm cannot be given a "
                f"value with a comma; leave it out of --env and `export {name}=...` before you "
                "submit, which Slurm hands down."
            )
