"""The networks that ship with jaxpipe, each as a `LayerStack` that the pipeline can cut.

    transformer/   decoder-only language models: GPT-2, Llama, Qwen, Mixtral and the like
    translation    an encoder-decoder Transformer
    vision/        Vision Transformer, gMLP, AmoebaNet-D, U-Net
    diffusion/     a diffusion transformer trained by flow matching
    speech/        Deep Speech 2
    gnn            a deep graph network whose graph is cut into chunks
    huggingface/   reads and writes checkpoints of Hugging Face's transformers
    batch_norm, tables   what several of them share

Each network has a frozen configuration and a function that makes its stack of it, such as
`transformer(TransformerConfig(...))`. None of them knows schedules or devices: the pipeline takes a
stack of the user's own modules in the same way.
"""
