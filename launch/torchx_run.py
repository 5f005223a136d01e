"""``torchx run``, with two things mended for all who have isorun installed.

Without a configured scheduler the default is the first registered one, by the alphabet, which
would be a cloud; it stays a local one. And a user's mistake is told in one sentence, with an exit
code that means something; so does the end of a local job.
"""

from __future__ import annotations

import argparse
import sys

from torchx.cli.cmd_run import CmdRun
from torchx.runner.config import get_config

from launch.history import ledger
from train.exits import RunError

DEFAULT = "local_cwd"


class Run(CmdRun):  # type: ignore[misc]
    """Takes the place of TorchX's own command (entry point group ``torchx.cli.cmds``)."""

    def add_arguments(self, subparser: argparse.ArgumentParser) -> None:
        """TorchX's, with another default."""
        super().add_arguments(subparser)
        if get_config(prefix="cli", name="run", key="scheduler") is None:
            subparser.set_defaults(scheduler=DEFAULT)

    def run(self, args: argparse.Namespace) -> None:
        """Submits, and waits for what is local."""
        try:
            super().run(args)
        except RunError as error:
            for line in str(error).splitlines():
                print(f"isorun: error: {line}", file=sys.stderr)
            sys.exit(int(error.code))
        except SystemExit as leaving:
            # TorchX says 1 for everything; the agents know better.
            if leaving.code == 1 and (code := ledger.code_of_this_process()):
                sys.exit(code)
            raise
