"""Networks for images: Vision Transformer, gMLP, AmoebaNet-D and a U-Net.

Open `vit.py` first, the shortest; `images.py` has the patch embedding and the classifier that
several share, `pictures.py` the convolutions.
"""
