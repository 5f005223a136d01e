"""Print the JSON schema of the config, for editors.

The schema includes the sections of the task that --config or task.use names; by default those
of the built-in task `text`. Save it and refer to it in your editor, for instance with the first
line `# yaml-language-server: $schema=isorun.schema.json` in a config file.
"""

from __future__ import annotations

import argparse
import json

from train.commands.arguments import add_config_arguments
from train.config.compose import compose
from train.config.schema import config_class
from train.exits import Exit
from train.tasks.registry import find_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this command's arguments."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> Exit:
    """Prints the schema."""
    composed = compose(arguments.config, arguments.overrides)
    task = composed.values.get("task")
    use = task.get("use", "text") if isinstance(task, dict) else "text"
    schema = config_class(find_task(str(use), composed.origin("task.use"))).model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    print(json.dumps(schema, indent=2))
    return Exit.DONE
