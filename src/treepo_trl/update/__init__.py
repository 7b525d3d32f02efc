"""
From rewards to the loss: tree advantages, and forward passes that compute each shared prefix once.

Each file says where it starts: `rewards`, `advantages`, `packing`, `tree_attention`, `packed_forward`.
"""
