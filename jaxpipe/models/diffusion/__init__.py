"""The diffusion transformer (DiT) behind a frozen patch encoder, trained by flow matching.

Open `dit.py` first: the stack of blocks. `flow.py` has the loss, `patch_codec.py` the frozen
encoder, and `gaussian_velocity.py` the baseline that needs no training.
"""
