"""What runs once on each node: it meets the other nodes, starts the ranks, and says how they ended.

torch's elastic agent does the meeting and the starting. What is added: exit codes that come back,
restarts only where they can help, a stop that reaches each rank once, the error of the rank that
failed first, and a look at the nodes before the run.
"""
