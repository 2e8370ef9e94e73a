"""The decoder-only transformer: its blocks, its ends, and the shapes of known models.

Open `decoder.py` first, which builds the stack that `config.py` describes.

    config        every choice as one frozen value; `presets` has those of known models
    decoder       a layer: attention, then an MLP or experts; and the stack
    ends          embedding and head; `cross_entropy` has the loss over a vocabulary that is cut
    attention     causal attention over a row that may be cut over devices: `ring_attention` where
                  keys visit, in steps that `attention_blocks` has; `rotary` has the positions
    dense         matrices, biases and norms
    moe           a mixture of experts: `routing` chooses, `dispatch` sends tokens there and back
    completep     learning rates that carry over to wider and deeper models
"""

from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.decoder import transformer

__all__ = ["TransformerConfig", "transformer"]
