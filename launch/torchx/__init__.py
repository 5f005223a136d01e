"""TorchX: what ``torchx run isorun.fit`` submits, and to which scheduler.

components, app          ->  the AppDef of a fit, a doctor, a sweep or any command
train_command, sweep     ->  the training command of a run, or of each run of a sweep
shape, resources         ->  nodes and processes, and what each node requests
run_ids                  ->  the ids that all processes of a run share
schedulers               ->  TorchX's schedulers, each with checks and a launch log
cli                      ->  ``torchx run`` and ``torchx log``

``import torchx`` is TorchX itself: imports are absolute.
"""
