"""
`treepo-trl doctor`: whether a training would work on this machine.

Its environment as a table, the recipe's settings and plan, and one small step of it in a child process.
"""
