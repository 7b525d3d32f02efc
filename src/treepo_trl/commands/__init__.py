"""
The commands of `treepo-trl`, a file each, and what they share: arguments, prompts, engines, errors.
"""
