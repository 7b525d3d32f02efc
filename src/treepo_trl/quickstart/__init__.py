"""
A first training without a hub: a small model, tasks with answers, their accuracy and a line per step.
"""
