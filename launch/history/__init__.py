"""The launches of this user: when, where and from which code they were started, and how they ended.

launch_log  ->  the file, to which each launch and each end adds a line
image       ->  the digest of a launch's container image
launches    ->  the lines joined into launches, and their current state
"""
