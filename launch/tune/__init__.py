"""Hyperparameter studies: trials that are ordinary runs, chosen and judged by Optuna.

settings     what decides the trials of a study, and its record
checked      the settings, checked before anything starts
methods      samplers and pruners by name
halving      successive halving: trials pause, and the best go on from their checkpoints
study        the study in its storage: which trial is next, what it reports, how it ends
storage      where Optuna keeps it: a journal or a database
values       the values of a trial, as they are stored and as the config takes them
trial        the processes of one trial
devices      the share of this machine that each trial gets
controller   starts trials, watches them, and decides what their ends mean
backend      what the controller needs of the place where trials run
result       the table, the JSON, and the config of the best trial
page         the same as an HTML page
"""
