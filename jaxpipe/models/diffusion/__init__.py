"""The diffusion transformer (DiT) behind a frozen patch encoder, trained by flow matching.

Open `dit.py` first.

    dit                 the stack: embedding, blocks and the loss of flow matching
    patch_codec         the frozen encoder, whose latents the stack is trained on
    flow                samples images with a trained network, step by step
    gaussian_velocity   the best affine predictor, as a baseline that needs no training
"""
