"""
From rewards to the loss: tree advantages, and forward passes that compute each shared prefix once.

In order: `rewards`, `advantages`, `row_advantages`, `packable`, `packing`, `tree_attention`, `packed_forward`.
"""
