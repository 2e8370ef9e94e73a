"""The decoder-only transformer: its blocks, its ends, and the shapes of known models.

Open `decoder.py` first, which builds the stack that `config.py` describes. A block is attention
(`attention.py`, `rotary.py`) and an MLP (`dense.py`) or experts (`moe.py`, with `routing.py` and
`dispatch.py`).
"""

from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.decoder import transformer

__all__ = ["TransformerConfig", "transformer"]
