"""Everything that ``launch`` uses of ``train``; no other file of ``launch`` imports ``train``.

Command line       its parser and errors; how a training command is written, read and started
Secrets            which names and values are secret; how texts are recorded and shown
Config             its schema, and the checks that do not need the training's processes
Exit codes         what the end of a process means, and the errors that carry a code
Signals            those that request a stop
Rendezvous         how ranks find each other, the signed messages of a store and the address at
                   which it listens, and the waits for names and ports
Environment        what a launcher sets for a rank, and where a rank writes its error
Limits             the cores that a process may use, and its cgroups
Run directory      the files of a run that other programs may read
Storage            objects at a URL such as s3://bucket/folder, and what its errors mean
Studies            the space of a study, and what its trials are compared by
JSON               records that another process has written, checked when they are read

A launcher must start fast, and the agent runs on every node: modules that import pydantic,
omegaconf or more are imported when one of their names is used for the first time.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train
from train.commands import COMMANDS as TRAIN_COMMANDS
from train.distributed.endpoint import wait_for_name, wait_for_port
from train.distributed.waiting import reported_wait
from train.distributed.world import World, first_host, this_world
from train.exits import (
    ADVICE,
    AGENT_RANK,
    Exit,
    ResumeRefusedError,
    RetryError,
    RunError,
    UsageError,
    error_of_code,
    first_line,
    is_worth_retrying,
)
from train.files import open_regular, refuse_link, replace_text, write_json
from train.goodput.clock import SUBMITTED_AT
from train.imports import import_extra
from train.json_files import (
    Fields,
    has_fields,
    is_count,
    is_number,
    parse_object,
    parsed_lines,
    read_object,
)
from train.numeric_text import finite_number, port_number, seconds_in, whole_number
from train.output import log
from train.paths import path_argument, path_word, user_path
from train.private_directory import private_directory
from train.process.cgroups import CGROUPS, OWN_CGROUP, cgroups_of_process
from train.process.cores import threads_per_process, usable_cores
from train.process.diagnose import fault_of
from train.process.error_file import write_error_file
from train.process.stop_signals import (
    STOP_SIGNALS,
    TERMINATING,
    handled_signals,
    unblock_stop_signals,
)
from train.program import typed_command
from train.secret_files import is_secret_file
from train.secrets import (
    HIDDEN,
    is_secret_value,
    is_secret_variable,
    redact,
    redact_command,
    redact_values,
)
from train.setup.environment import IMAGE, PACKAGES, driver_version, package_versions
from train.signing import SECRET, SECRET_FILE, MessageError, Signer, new_secret, read_secret
from train.suggest import did_you_mean, listed
from train.visible import visible, visible_log

if TYPE_CHECKING:
    from train.checkpoint.mirror_storage import described as storage_error
    from train.checkpoint.mirror_storage import is_misconfigured, open_storage
    from train.checkpoint.run_directory import (
        InUseError,
        RunDirectory,
        new_run_id,
        slug,
    )
    from train.checkpoint.store import CheckpointStore
    from train.code.git import GitError, git, top_of_repository
    from train.code.version import CODE_VERSION, code_version
    from train.command_line import (
        Commands,
        Parser,
        check_command,
        check_command_first,
        exit_code_of,
        key_value,
        python_module,
        safe_path_options,
        say,
    )
    from train.config.changes import differences as config_differences
    from train.config.load import LoadedConfig, load_config
    from train.config.load import check as check_config
    from train.config.space import (
        ChoiceDimension,
        Dimension,
        FloatDimension,
        Space,
        check_space,
        load_space,
        stored_space,
    )
    from train.data.plan import BatchPlan
    from train.distributed.gpu import gpu_index, shared_gpu
    from train.distributed.listening import (
        LOOPBACK,
        address_to_listen_at,
        listen,
        open_listening_store,
    )
    from train.distributed.messages import Messages, unreadable
    from train.distributed.process_group import use_loopback
    from train.distributed.rendezvous import join as join_ranks
    from train.distributed.rendezvous import open_store
    from train.optim.schedule import depends_on_length
    from train.process.stacks import STACKS, describe_stacks
    from train.report.study import render_study
    from train.report.study_data import StudyAxis, StudyData, StudyTrial
    from train.report.target import check_target, write_report
    from train.runs.summary import total_steps
    from train.runs.table import drawn, terminal_width
    from train.track.wandb_sink import wandb_mode
    from train.track.wandb_sync import check_login as check_wandb_login
    from train.track.watched_metric import watched_metric

__all__ = [
    "ADVICE",
    "AGENT_RANK",
    "CGROUPS",
    "CHECKPOINTS",
    "CODE_VERSION",
    "FAILURES",
    "HIDDEN",
    "IMAGE",
    "LAUNCHER",
    "LOOPBACK",
    "OWN_CGROUP",
    "PACKAGES",
    "RUN_FILE",
    "RUN_ID",
    "SECRET",
    "SECRET_FILE",
    "STACKS",
    "STOP_DEADLINE",
    "STOP_SIGNALS",
    "SUBMITTED_AT",
    "TERMINATING",
    "TRAIN",
    "TRAIN_COMMANDS",
    "TYPED",
    "WANDB_GROUP",
    "WANDB_ID",
    "BatchPlan",
    "CheckpointStore",
    "ChoiceDimension",
    "Commands",
    "Dimension",
    "Exit",
    "Fields",
    "FloatDimension",
    "GitError",
    "InUseError",
    "LoadedConfig",
    "MessageError",
    "Messages",
    "Parser",
    "ResumeRefusedError",
    "RetryError",
    "RunDirectory",
    "RunError",
    "Signer",
    "Space",
    "StudyAxis",
    "StudyData",
    "StudyTrial",
    "UsageError",
    "World",
    "address_to_listen_at",
    "cgroups_of_process",
    "check_command",
    "check_command_first",
    "check_config",
    "check_space",
    "check_target",
    "check_wandb_login",
    "code_version",
    "config_arguments",
    "config_differences",
    "depends_on_length",
    "describe_stacks",
    "did_you_mean",
    "drawn",
    "driver_version",
    "error_of_code",
    "exit_code_of",
    "fault_of",
    "finite_number",
    "first_host",
    "first_line",
    "git",
    "gpu_index",
    "handled_signals",
    "has_fields",
    "import_extra",
    "is_count",
    "is_misconfigured",
    "is_number",
    "is_secret_file",
    "is_secret_value",
    "is_secret_variable",
    "is_worth_retrying",
    "join_ranks",
    "key_value",
    "listed",
    "listen",
    "load_config",
    "load_space",
    "log",
    "new_run_id",
    "new_secret",
    "open_listening_store",
    "open_regular",
    "open_storage",
    "open_store",
    "package_versions",
    "parse_object",
    "parsed_lines",
    "path_argument",
    "path_word",
    "port_number",
    "private_directory",
    "python_module",
    "read_object",
    "read_secret",
    "redact",
    "redact_command",
    "redact_values",
    "refuse_link",
    "render_study",
    "replace_text",
    "reported_wait",
    "run_directory",
    "run_train",
    "safe_path_options",
    "say",
    "seconds_in",
    "shared_gpu",
    "slug",
    "storage_error",
    "stored_space",
    "terminal_width",
    "this_world",
    "threads_per_process",
    "top_of_repository",
    "total_steps",
    "train_arguments",
    "train_sources",
    "train_version",
    "training_config",
    "typed_command",
    "unblock_stop_signals",
    "unreadable",
    "usable_cores",
    "use_loopback",
    "user_path",
    "visible",
    "visible_log",
    "wait_for_name",
    "wait_for_port",
    "wandb_mode",
    "watched_metric",
    "whole_number",
    "write_error_file",
    "write_json",
    "write_report",
]

_IMPORTED_WHEN_USED = {
    "is_misconfigured": ("train.checkpoint.mirror_storage", "is_misconfigured"),
    "open_storage": ("train.checkpoint.mirror_storage", "open_storage"),
    "storage_error": ("train.checkpoint.mirror_storage", "described"),
    "stored_space": ("train.config.space", "stored_space"),
    "config_differences": ("train.config.changes", "differences"),
    "watched_metric": ("train.track.watched_metric", "watched_metric"),
    "depends_on_length": ("train.optim.schedule", "depends_on_length"),
    "StudyAxis": ("train.report.study_data", "StudyAxis"),
    "StudyData": ("train.report.study_data", "StudyData"),
    "StudyTrial": ("train.report.study_data", "StudyTrial"),
    "render_study": ("train.report.study", "render_study"),
    "check_wandb_login": ("train.track.wandb_sync", "check_login"),
    "check_target": ("train.report.target", "check_target"),
    "write_report": ("train.report.target", "write_report"),
    "total_steps": ("train.runs.summary", "total_steps"),
    "terminal_width": ("train.runs.table", "terminal_width"),
    "drawn": ("train.runs.table", "drawn"),
    "RunDirectory": ("train.checkpoint.run_directory", "RunDirectory"),
    "InUseError": ("train.checkpoint.run_directory", "InUseError"),
    "load_space": ("train.config.space", "load_space"),
    "check_space": ("train.config.space", "check_space"),
    "Space": ("train.config.space", "Space"),
    "FloatDimension": ("train.config.space", "FloatDimension"),
    "Dimension": ("train.config.space", "Dimension"),
    "ChoiceDimension": ("train.config.space", "ChoiceDimension"),
    "LOOPBACK": ("train.distributed.listening", "LOOPBACK"),
    "BatchPlan": ("train.data.plan", "BatchPlan"),
    "CheckpointStore": ("train.checkpoint.store", "CheckpointStore"),
    "Commands": ("train.command_line", "Commands"),
    "LoadedConfig": ("train.config.load", "LoadedConfig"),
    "Messages": ("train.distributed.messages", "Messages"),
    "Parser": ("train.command_line", "Parser"),
    "address_to_listen_at": ("train.distributed.listening", "address_to_listen_at"),
    "check_command": ("train.command_line", "check_command"),
    "check_command_first": ("train.command_line", "check_command_first"),
    "check_config": ("train.config.load", "check"),
    "CODE_VERSION": ("train.code.version", "CODE_VERSION"),
    "GitError": ("train.code.git", "GitError"),
    "git": ("train.code.git", "git"),
    "top_of_repository": ("train.code.git", "top_of_repository"),
    "code_version": ("train.code.version", "code_version"),
    "exit_code_of": ("train.command_line", "exit_code_of"),
    "gpu_index": ("train.distributed.gpu", "gpu_index"),
    "listen": ("train.distributed.listening", "listen"),
    "join_ranks": ("train.distributed.rendezvous", "join"),
    "key_value": ("train.command_line", "key_value"),
    "load_config": ("train.config.load", "load_config"),
    "new_run_id": ("train.checkpoint.run_directory", "new_run_id"),
    "shared_gpu": ("train.distributed.gpu", "shared_gpu"),
    "slug": ("train.checkpoint.run_directory", "slug"),
    "open_listening_store": ("train.distributed.listening", "open_listening_store"),
    "open_store": ("train.distributed.rendezvous", "open_store"),
    "python_module": ("train.command_line", "python_module"),
    "safe_path_options": ("train.command_line", "safe_path_options"),
    "say": ("train.command_line", "say"),
    "STACKS": ("train.process.stacks", "STACKS"),
    "describe_stacks": ("train.process.stacks", "describe_stacks"),
    "unreadable": ("train.distributed.messages", "unreadable"),
    "use_loopback": ("train.distributed.process_group", "use_loopback"),
    "wandb_mode": ("train.track.wandb_sink", "wandb_mode"),
}


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _IMPORTED_WHEN_USED[name]
    return getattr(importlib.import_module(module), attribute)


# -- command line ---------------------------------------------------------------------------------

TRAIN = ("-m", "train")
"""The arguments of Python that start ``train``."""


def run_train(argv: Sequence[str], prog: str) -> int:
    """Runs a command of ``train``, and returns the code that the process must exit with at once."""
    from train.__main__ import run

    return run(argv, prog)


def train_arguments(command: Sequence[str]) -> Sequence[str] | None:
    """The arguments of ``train`` in ``python -m train ...`` or ``isorun ...``; None for any other
    command."""
    words = tuple(command)
    if words and Path(words[0]).name == "isorun" and words[1:2] and words[1] in TRAIN_COMMANDS:
        return words[1:]
    for index in range(len(words) - 1):
        if words[index : index + 2] == TRAIN:
            return words[index + 2 :]
    return None


def config_arguments(command: Sequence[str]) -> argparse.Namespace | None:
    """The parsed arguments of a training command, with its config files (``config``) and
    ``overrides``; None for any other command, and for one that prints its help. Raises
    UsageError."""
    words = train_arguments(command)
    if words is None:
        return None
    from train.cli import parse

    with suppress(SystemExit), redirect_stdout(StringIO()):  # the parser prints --help and exits
        arguments = parse(words)
        return arguments if hasattr(arguments, "config") else None
    return None


def training_config(command: Sequence[str]) -> LoadedConfig | None:
    """The config of a training command (``python -m train fit --config ...``); None for any other
    command. Raises UsageError if its arguments or its config are wrong."""
    from train.config.load import load_config

    arguments = config_arguments(command)
    if arguments is None:
        return None
    return load_config(arguments.config, arguments.overrides, runs=False)


def run_directory(command: Sequence[str]) -> Path | None:
    """The run directory of a training command; None if its config cannot be read. The task's
    module, which may be what has failed, is not imported."""
    from train.config.load import find_run_directory

    try:
        arguments = config_arguments(command)
        return find_run_directory(arguments.config, arguments.overrides) if arguments else None
    except (RunError, OSError):
        return None


# -- environment ----------------------------------------------------------------------------------

LAUNCHER = "ISORUN_LAUNCHER"
"""What started the ranks, where no other variable tells."""
RUN_ID = "ISORUN_RUN_ID"
"""The id that a new run takes; an existing run keeps its own."""
TYPED = "ISORUN_TYPED"
"""How the user has called ``isorun``, for hints of ranks that an agent starts by the module."""
STOP_DEADLINE = "ISORUN_STOP_DEADLINE"
"""Seconds that ranks have to save a checkpoint after a request to stop."""
WANDB_ID = "WANDB_RUN_ID"
WANDB_GROUP = "WANDB_RUN_GROUP"

# -- run directory --------------------------------------------------------------------------------

RUN_FILE = "run.json"
"""The identity of the run: id, name, wandb_id, created."""
CHECKPOINTS = "checkpoints"
"""The directory of its checkpoints."""
FAILURES = "failures"
"""The directory of failure records, which agents write; the only part that ``launch`` writes."""


# -- package --------------------------------------------------------------------------------------


def train_version() -> str:
    """The version of the installed package."""
    return train.__version__


def train_sources() -> Path:
    """The directory of the package's source files."""
    assert train.__file__
    return Path(train.__file__).parent
