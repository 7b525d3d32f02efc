"""
Every private name of TRL: what is read and set on a trainer (`host`), and what is replaced for a call (`seams`).

`treepo_trainer.py` overrides methods; nothing else knows a private name of `GRPOTrainer`. `tests/trl` pins them.
"""
