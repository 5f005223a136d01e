"""Hyperparameter studies: trials that are ordinary runs, chosen and judged by Optuna.

settings     what decides the trials of a study, and its record
methods      samplers and pruners by name
study        the study in its storage: which trial is next, what it reports, how it ends
trial        the processes of one trial
devices      the share of this machine that each trial gets
controller   starts trials, watches them, and decides what their ends mean
result       the table, the JSON, and the config of the best trial
"""
