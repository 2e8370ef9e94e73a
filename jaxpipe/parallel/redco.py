"""Writes rules for any transformer, from the names and shapes of its parameters.

Two rules give Megatron's layout for most of them (Redco: Tan et al., arXiv:2310.16355):

    attention   queries, keys and values are cut along their outputs, the projection out along its
                inputs: whole heads stay on one device
    the rest    matrices that widen are cut along their outputs, matrices that come back to the
                model's width along their inputs

In the words of `rules`, with kernels as Flax stores them, [in, out]:

    [embed, heads] -> [heads, embed]      query, key, value -> projection out
    [embed, mlp]   -> [mlp, embed]        up, gate -> down
    [vocabulary, embed]                   tables

Between the two matrices of a pair nothing is sent, and one sum follows the second (Megatron-LM,
arXiv:1909.08053). A bias is cut as the outputs of its matrix are; of a low-rank adapter beside a
kernel, `lora_a` [in, r] as its inputs and `lora_b` [r, out] as its outputs. Vectors of the model's
width (norms) are whole, tables are cut along the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpipe.parallel.rules import Names, Rules, describe

Tree = Any

# Modules by the names that GPT, Llama, T5, BERT and Qwen give them: attention's first matrices and
# the last matrix of any branch.
_IN = re.compile(
  r"(^|.*[/_.])(q|k|v|qkv|wq|wk|wv|query|key|value|c_attn|[qkv]_proj|query_key_value)"
)
_OUT = re.compile(r"(^|.*[/_.])(o|wo|out|o_proj|out_proj|attention_out|output)")
# Only asked where a matrix is square, and its shape says nothing.
_WIDENS = re.compile(
  r"(^|.*[/_.])(up|gate|w1|w3|wi|wi_[01]|fc1|c_fc|up_proj|gate_proj|intermediate)"
)
_NARROWS = re.compile(r"(^|.*[/_.])(down|w2|fc2|c_proj|down_proj)")
# The two matrices [in, r] and [r, out] of a low-rank adapter, in the module of its kernel.
_ADAPTER = re.compile(r"(.*)/lora_(a|b)")
# Paths that have an attention among their folders.
_ATTENTION = re.compile(r"(^|.*/)[^/]*(att|selfattention|encdecattention)[^/]*/.*", re.IGNORECASE)


def transformer_rules(
  shapes: Tree, width: int, *, extra: Sequence[tuple[str, Names]] = (), **options: Any
) -> Rules:
  """Returns rules for a parameter tree.

  Args:
    shapes: `stack.param_shapes()`, or any tree with parts `embed`, `layers` (with a leading layer
      dim) and `head`.
    width: D, of the residual stream.
    extra: rules that come first.
    options: `places`, `axes` and `check` of `Rules`.

  Returns:
    The extra rules, then one for the whole path of every parameter that they do not cover.

  Raises:
    ValueError: a matrix that neither rule covers.
  """
  leaves = {describe(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
  given = Rules(dims=tuple(extra))
  dims = []
  for path, shape in leaves.items():
    inner = shape[1:] if path.startswith("layers/") else shape
    if given.names(path, len(inner)) is None:
      dims.append((re.escape(path), _names(path, inner, width, leaves)))
  return Rules(dims=(*extra, *dims), **options)


def _names(
  path: str, shape: tuple[int, ...], width: int, leaves: Mapping[str, tuple[int, ...]]
) -> Names:
  """Names of a parameter's dims.

  Args:
    path: of the parameter.
    shape: its shape, without the dim of the layers.
    width: D.
    leaves: path -> shape of all parameters, with the dim of the layers.
  """
  adapter = _ADAPTER.fullmatch(path)
  matrix = f"{adapter[1]}/kernel" if adapter else ""
  if adapter and matrix in leaves:
    beside = _names(matrix, leaves[matrix][path.startswith("layers/") :], width, leaves)
    return (beside[0], None) if adapter[2] == "a" else (None, beside[-1])
  if len(shape) < 2:
    return _of_vector(path, shape, width, leaves)
  if not path.startswith("layers/"):
    return _of_table(path, shape, width)
  if len(shape) > 2:
    raise ValueError(
      f"parameter {path} {list(shape)}: no rule for {len(shape)} dims; name its dims in extra"
    )
  # Names before shapes: with as many heads as make up the width, attention's matrices are square.
  module = path.rpartition("/")[0]
  if _IN.fullmatch(module):
    return ("embed", "heads")
  # `o` and `output` are also what MLPs call their last matrix, which is cut alike.
  if _OUT.fullmatch(module) or (_ATTENTION.fullmatch(path) and shape[1] == width):
    return ("heads", "embed") if _is_attention(module) else ("mlp", "embed")
  square = shape[0] == shape[1]
  if (shape[0] == width and not square) or _WIDENS.fullmatch(module):
    return ("embed", "mlp")
  if (shape[1] == width and not square) or _NARROWS.fullmatch(module):
    return ("mlp", "embed")
  raise ValueError(
    f"parameter {path} {list(shape)}: neither widens nor narrows the width {width}, and its name is"
    " none of an attention's; give its dims' names in extra"
  )


def _is_attention(module: str) -> bool:
  """Whether a last matrix stands in an attention, by its folders, or else by its own name."""
  folders = module.split("/")[1:-1]
  return bool(_ATTENTION.fullmatch(f"{module}/")) if folders else not module.endswith("output")


def _of_vector(
  path: str, shape: tuple[int, ...], width: int, leaves: Mapping[str, tuple[int, ...]]
) -> Names:
  """Names of a vector's dim: that of the outputs of the matrix beside it, if there is one."""
  module = path.rpartition("/")[0]
  beside = [
    p for p in leaves if p.rpartition("/")[0] == module and len(leaves[p]) > len(leaves[path])
  ]
  if shape and beside and path.startswith("layers/"):
    return _names(beside[0], leaves[beside[0]][1:], width, leaves)[-1:]
  return (None,) * len(shape)


def _of_table(path: str, shape: tuple[int, ...], width: int) -> Names:
  """Names of the dims of a matrix in the embedding or in the head."""
  names: list[str | None] = ["embed" if n == width else None for n in shape]
  # Positions have tables too, which are small and looked up whole.
  if len(shape) == 2 and not re.search(r"pos|wpe|type", path):
    other = 0 if shape[1] == width else 1
    names[other] = "vocabulary"
  return tuple(names)
