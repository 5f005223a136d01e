"""Run directories to look at and to compare. Nothing here imports torch or the code of a run.

find     ->  the run directories below a directory
state    ->  whether a run is in progress, and how it ended
tail     ->  the last rows of metrics.jsonl
summary  ->  what a table shows of a run
columns  ->  the columns of that table, its order and its filters
table    ->  text in columns
differences, curves, comparison  ->  what differs between runs
log_lines, log_files, log_reader ->  the log files of all ranks, merged by time
"""
