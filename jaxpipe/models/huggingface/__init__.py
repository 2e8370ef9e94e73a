"""Hugging Face's checkpoints: GPT-2, Llama, Qwen2, Qwen3 and Mixtral, in and out, as safetensors.

`config` knows config.json, `names` what their parameters are called and which way round they lie,
`files` the safetensors of a folder, and `weights` brings all of it together: every device reads its
own pieces of the files, and nothing is ever whole in one place.
"""

from jaxpipe.models.huggingface.config import read_config
from jaxpipe.models.huggingface.weights import check_weights, export, read_params

__all__ = ["check_weights", "export", "read_config", "read_params"]
