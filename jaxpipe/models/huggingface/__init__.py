"""Reads and writes Hugging Face's checkpoints: GPT-2, Llama, Qwen2, Qwen3 and Mixtral.

Open `weights.py` first.

    config    the model's configuration from config.json, and back
    names     the name of each parameter in the files, and which way round it lies there
    files     the safetensors of a folder, read in slices and written in parts
    weights   brings these together: `check_weights`, `read_params`, `export`

On a mesh every device reads its own pieces of the files, and no process ever holds the whole
model.
"""

from jaxpipe.models.huggingface.config import read_config
from jaxpipe.models.huggingface.weights import check_weights, export, read_params

__all__ = ["check_weights", "export", "read_config", "read_params"]
