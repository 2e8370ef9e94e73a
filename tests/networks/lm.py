"""Small float64 models and batches that the exactness tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.decoder import transformer
from jaxpipe.pipeline.layer.split import split as split_layer
from jaxpipe.stack.stack import LayerStack

VOCABULARY = 16
LENGTH = 4

# What makes a configuration that of a known model, on any shape.
GPT2 = dict(norm="layernorm", bias="all", positions="learned", max_positions=16, mlp="gelu")
QWEN2 = dict(bias="qkv")
QWEN3 = dict(head_width=8, qk_norm=True)


def attention(query, key, value, *, is_causal):
  """Softmax in the inputs' own dtype; `jax.nn.dot_product_attention` softmaxes in float32."""
  T, groups = query.shape[1], query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(a, groups, axis=2) for a in (key, value))
  scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / np.sqrt(query.shape[-1])
  mask = jnp.tril(jnp.ones((T, T), bool))[None, None] if is_causal else True
  return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(jnp.where(mask, scores, -1e9)), value)


def stack(layers: int = 4, freeze: str = "", **changes) -> LayerStack:
  """A transformer with tied ends, grouped heads and dropout, in float64."""
  shape = dict(vocabulary_size=VOCABULARY, layers=layers, width=8, heads=2, kv_heads=1)
  options = dict(dropout=0.2, tied=True, dtype=jnp.float64, param_dtype=jnp.float64)
  config = TransformerConfig(**{**shape, **options, "attention": attention, **changes})
  return transformer(config, freeze)


def batch(rows: int, length: int = LENGTH, seed: int = 0) -> dict[str, np.ndarray]:
  """Random tokens; about a third of the weights are zero, so that microbatches weigh unlike."""
  rng = np.random.default_rng(seed)
  tokens, targets = rng.integers(0, VOCABULARY, (2, rows, length), np.int32)
  weights = (rng.random((rows, length)) < 0.7).astype(np.float64)
  weights[0, 0] = 1
  return {"tokens": tokens, "targets": targets, "weights": weights}


def split(layer, *args, **options):
  """`split` of a layer that returns y alone."""
  return split_layer(lambda *args: (layer(*args), ()), *args, **options)
