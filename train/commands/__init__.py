"""The commands of ``python -m train``, one per file."""

COMMANDS = {
    "fit": "start a run, or resume it if its directory holds one",
    "evaluate": "evaluate a checkpoint on the evaluation data",
    "parity": "run one config on several placements and compare the results",
    "export": "save a trained model: parameters, program, or both",
    "verify": "check that checkpoints are complete and each sample was used once",
    "goodput": "show where the time of a run went, over all its attempts",
    "show-config": "print the resolved config and where each value comes from",
    "schema": "print the JSON schema of the config, for editors",
    "new": "create a project of your own to start from",
}
"""Each command and one line of help."""
