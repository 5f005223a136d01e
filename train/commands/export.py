"""Export a trained model.

Writes a directory with the parameters (safetensors), a torch.export program (graph and
parameters), and the task's reference and config. train.load(path) loads it as a module. If the
config has ema, the averaged weights are exported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from train.checkpoint.manifest import Manifest
from train.checkpoint.run_directory import RunDirectory
from train.command_line import say
from train.commands.arguments import add_checkpoint_argument, add_config_arguments
from train.commands.checkpoints import find_checkpoint, load_full_model, local_checkpoint
from train.config.load import LoadedConfig
from train.exits import Exit, UsageError
from train.files import refuse_irregular, refuse_link
from train.json_text import finite
from train.output import log
from train.paths import path_argument
from train.process.diagnose import fault_of

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram


_USED = (
    "task", "model", "data", "ema", "run.seed", "precision", "checkpoint.keep_best",
    "track.wandb_project", "track.wandb_entity", "track.wandb_group",
)  # fmt: skip
"""The sections and fields of the config that an export uses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser, takes_run=True)
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--to", type=path_argument, metavar="DIR",
        help="output directory; default: exports/step-N in the run directory",
    )  # fmt: skip
    parser.add_argument(
        "--form",
        choices=["both", "parameters", "program"],
        help="parameters: safetensors; program: torch.export; default: both, or parameters if the "
        "task has no example_inputs()",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="also log the files to W&B, as an artifact"
    )
    parser.add_argument(
        "--registry", metavar="REGISTRY/COLLECTION",
        help="log them to W&B and link the artifact to a collection of a registry",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> Exit:
    """Writes the export and prints the paths of its files."""
    registry = _registry(arguments)
    with local_checkpoint(arguments) as (loaded, which, received):
        if received.name_of_run(loaded.run_directory) and not arguments.to:
            raise UsageError(
                "An export of an artifact of W&B needs a directory, since there is no run "
                "directory; add --to DIR."
            )
        _export(loaded, which, registry, arguments)
    return Exit.DONE


def _export(
    loaded: LoadedConfig, which: str, registry: str | None, arguments: argparse.Namespace
) -> None:
    checkpoint = find_checkpoint(loaded, which, other_data=arguments.other_data, used=_USED)
    manifest = Manifest.read(checkpoint)
    exported = prepare_export(loaded, checkpoint, arguments.form)
    directory = Path(arguments.to or loaded.run_directory / "exports" / f"step-{manifest.step}")
    try:
        if not arguments.to:  # others may write to a run directory
            for folder in (directory.parent, directory):
                refuse_link(folder)
        written = exported.write(directory, loaded, manifest)
    except OSError as error:
        wrong = UsageError(
            f"--to is {str(directory)!r}, which cannot be written: {error}; choose another "
            "directory."
        )
        raise fault_of(error, wrong) from None
    for path in written:
        say(str(path))
    if arguments.wandb or registry:
        from train.track.wandb_export import log_export

        run_directory = RunDirectory(loaded.run_directory)
        identity = run_directory.identity(loaded.config.run.name)
        track = loaded.config.track
        name = log_export(written, run_directory.path, identity, track, manifest, registry)
        say(f"W&B: {name}" + (f", linked to {registry}" if registry else ""))


class Exported(NamedTuple):
    """What an export consists of, before anything is written."""

    model: nn.Module
    program: ExportedProgram | None
    has_parameters: bool
    """Whether the parameters are a file of their own."""

    def write(self, directory: Path, loaded: LoadedConfig, manifest: Manifest) -> list[Path]:
        """Writes the files, all or none; returns their paths. Raises OSError."""
        from train.export.module import (
            DESCRIPTION,
            PARAMETERS,
            PROGRAM,
            export_parameters,
            export_program,
            write_description,
        )
        from train.export.replacement import replacing_files

        for name in (PARAMETERS, PROGRAM):
            refuse_irregular(directory / name)
        source = {
            "step": manifest.step,
            "run": manifest.state.get("run"),
            "metrics": finite(manifest.metrics),
        }
        values = loaded.config.model_dump(mode="json")
        with replacing_files(directory, last=DESCRIPTION) as new:
            written = [export_parameters(self.model, new)] if self.has_parameters else []
            if self.program is not None:
                written.append(export_program(self.program, new))
            written.append(write_description(new, values, source, self.model))
        return [directory / path.name for path in written]


def prepare_export(loaded: LoadedConfig, checkpoint: Path, form: str | None = None) -> Exported:
    """The model of a checkpoint in the ``form`` of --form. Raises UsageError if it cannot be
    exported in this form."""
    from train.export.module import example_inputs, make_program

    task = loaded.task(loaded.config)
    model = load_full_model(task, checkpoint, loaded)
    model.eval()
    inputs = None if form == "parameters" else example_inputs(task)
    if inputs is None and form in ("both", "program"):
        raise UsageError(
            f"--form is {form}, but the task has no example_inputs(), which the export of a "
            "program needs; implement it, or set --form parameters."
        )
    if inputs is None and form is None:
        log("The task has no example_inputs(), so the export has no program, only the parameters.")
    program = None if inputs is None else make_program(model, inputs)
    return Exported(model, program, form != "program")


def _registry(arguments: argparse.Namespace) -> str | None:
    """W&B's path for --registry. Raises UsageError before the work, if W&B cannot be used."""
    if not (arguments.wandb or arguments.registry):
        return None
    from train.track.wandb_export import registry_path
    from train.track.wandb_sync import check_login

    path = registry_path(arguments.registry) if arguments.registry else None
    check_login()
    return path
