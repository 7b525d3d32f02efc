"""
What the commands share: options, prompts, engines, files of trees, errors.
"""
