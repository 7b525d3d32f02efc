"""
The policy inside an engine: which engine serves it, how its adapter gets there, where its frozen base lies.

Nothing here knows trees or rewards.
"""
