"""Networks for images: Vision Transformer, gMLP, AmoebaNet-D and a U-Net.

Open `vit.py` first, the shortest.

    vit, gmlp      layers of one kind over patches; `images` has the embedding and the head of both
    amoebanet      an evolved convolutional network; `amoebanet_cells` has its cells
    segmentation   a U-Net that names every pixel
    pictures       the convolution and the pooling that the two last ones use
"""
