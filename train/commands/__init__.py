"""The commands of ``python -m train``, one per file."""

COMMANDS = {
    "fit": "start a run, or resume it if its directory holds one",
    "evaluate": "evaluate a checkpoint on the evaluation data",
    "lr-find": "find a learning rate: a range test on this placement",
    "batch-size": "try sizes of micro-batches: memory and samples per second of each",
    "overfit": "train on one batch until it is learnt, or say what is in the way",
    "profile": "show what steps spend their time on: operators, data, compute, communication",
    "replay": "compute a step of a run again and compare it with what was logged",
    "parity": "run one config on several placements and compare the results",
    "runs": "list runs: state, step, metrics, placement, last exit",
    "compare": "show what differs between runs, and their metrics side by side",
    "logs": "print the logs of all ranks of a run, merged by time",
    "stacks": "print what each rank on this machine does now, and its stacks",
    "export": "save a trained model: parameters, program, or both",
    "sync": "upload to W&B what it still lacks of runs",
    "verify": "check that checkpoints are complete and each sample was used once",
    "report": "write one HTML file about one or several runs",
    "goodput": "show where the time of a run went, over all its attempts",
    "show-config": "print the resolved config and where each value comes from",
    "schema": "print the JSON schema of the config, for editors",
    "new": "create a project of your own to start from",
}
"""Each command and one line of help."""
