"""
Whether a training would work on this machine: its environment as a table, and checks that really run.

What may end a process or keep memory runs in a child process. Nothing here trains for anyone.
"""
