"""Names of parameters in Hugging Face's files, and which way round their matrices lie there.

    ours, all layers in one            theirs, one for every layer
    layers/query/kernel [L, D, N H]    model.layers.{}.self_attn.q_proj.weight [N H, D]

A name takes the number of the layer, and then that of the expert, for its braces. Llama, Qwen and
Mixtral keep matrices as outputs x inputs; GPT-2 keeps them as they are here, and queries, keys and
values side by side in one: parameters of one name are its columns, in the order of the table.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.parallel.rules import describe

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where one parameter of ours is in the files.

  Attributes:
    name: name of the tensor, with braces for the numbers of layer and expert.
    turned: whether the last two dims stand the other way round there.
  """

  name: str
  turned: bool = False

  @property
  def leading(self) -> int:
    """Number of our leading dims that are numbers in their names: 0, 1 or 2."""
    return self.name.count("{}")


def _dense(ours: str, theirs: str, turned: bool) -> dict[str, Stored]:
  """Names of the kernel and the bias of a matrix in the layers."""
  return {
    f"layers/{ours}/kernel": Stored(f"{theirs}.weight", turned),
    f"layers/{ours}/bias": Stored(f"{theirs}.bias"),
  }


def _norm(ours: str, theirs: str) -> dict[str, Stored]:
  """Names of the scale and the bias of a norm."""
  return {f"{ours}/scale": Stored(f"{theirs}.weight"), f"{ours}/bias": Stored(f"{theirs}.bias")}


_L = "model.layers.{}"
_E = f"{_L}.block_sparse_moe"
_LLAMA = {
  "embed/table": Stored("model.embed_tokens.weight"),
  **_norm("layers/attention_norm", f"{_L}.input_layernorm"),
  **_dense("query", f"{_L}.self_attn.q_proj", True),
  **_dense("key", f"{_L}.self_attn.k_proj", True),
  **_dense("value", f"{_L}.self_attn.v_proj", True),
  **_norm("layers/query_norm", f"{_L}.self_attn.q_norm"),
  **_norm("layers/key_norm", f"{_L}.self_attn.k_norm"),
  **_dense("attention_out", f"{_L}.self_attn.o_proj", True),
  **_norm("layers/mlp_norm", f"{_L}.post_attention_layernorm"),
  **_dense("gate", f"{_L}.mlp.gate_proj", True),
  **_dense("up", f"{_L}.mlp.up_proj", True),
  **_dense("down", f"{_L}.mlp.down_proj", True),
  "layers/experts/router": Stored(f"{_E}.gate.weight", True),
  "layers/experts/gate": Stored(f"{_E}.experts.{{}}.w1.weight", True),
  "layers/experts/up": Stored(f"{_E}.experts.{{}}.w3.weight", True),
  "layers/experts/down": Stored(f"{_E}.experts.{{}}.w2.weight", True),
  **_norm("head/norm", "model.norm"),
  "head/table": Stored("lm_head.weight"),
}
_G = "transformer.h.{}"
_GPT2 = {
  "embed/table": Stored("transformer.wte.weight"),
  "embed/positions": Stored("transformer.wpe.weight"),
  **_norm("layers/attention_norm", f"{_G}.ln_1"),
  **_dense("query", f"{_G}.attn.c_attn", False),
  **_dense("key", f"{_G}.attn.c_attn", False),
  **_dense("value", f"{_G}.attn.c_attn", False),
  **_dense("attention_out", f"{_G}.attn.c_proj", False),
  **_norm("layers/mlp_norm", f"{_G}.ln_2"),
  **_dense("up", f"{_G}.mlp.c_fc", False),
  **_dense("down", f"{_G}.mlp.c_proj", False),
  **_norm("head/norm", "transformer.ln_f"),
  "head/table": Stored("lm_head.weight"),
}
# Tensors of older files that are no weights (attention's mask, rotary frequencies), and the second
# copy of a tied table.
_IGNORED = re.compile(r".*\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq|lm_head\.weight")
_PREFIXES = ("model.", "transformer.")


@dataclasses.dataclass(frozen=True)
class Piece:
  """The part of one tensor of theirs that one parameter of ours holds.

  Attributes:
    path: path of the parameter.
    numbers: number of the layer, and then of the expert; empty for embedding and head.
    start: first column of the part in the tensor, when that lies our way round.
    shape: shape of the part, without the dims that the numbers stand for.
  """

  path: str
  numbers: tuple[int, ...]
  start: int
  shape: Shape


@dataclasses.dataclass(frozen=True)
class Names:
  """The parameters of one model, by both names.

  Attributes:
    stored: path of a parameter of ours -> how it is stored, in the order of the model.
    shapes: path of a parameter of ours -> its shape in the canonical tree.
  """

  stored: Mapping[str, Stored]
  shapes: Mapping[str, Shape]

  @classmethod
  def of(cls, config: TransformerConfig, shapes: Any) -> Names:
    """Finds the names for a canonical tree of parameters, or of its shapes.

    Raises:
      ValueError: parameters that Hugging Face's models do not have.
    """
    leaves = {describe(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(shapes)}
    table = _GPT2 if config.positions == "learned" else _LLAMA
    stored = {path: entry for path, entry in table.items() if path in leaves}
    if unnamed := sorted(leaves.keys() - stored.keys()):
      raise ValueError(f"parameters {', '.join(unnamed)} have no name in Hugging Face's models")
    return cls(stored, leaves)

  def start(self, path: str) -> int:
    """Returns the first column of a parameter in the tensor that it shares with others, or 0."""
    name, start = self.stored[path].name, 0
    for other, entry in self.stored.items():
      if other == path:
        break
      if entry.name == name:
        start += self.shapes[other][-1]
    return start

  def tensors(self) -> Iterator[tuple[str, list[Piece]]]:
    """Yields each tensor's name and the pieces that are its columns, those of the ends first."""
    found: dict[str, list[Piece]] = {}
    for path, entry in self.stored.items():
      shape, n, start = self.shapes[path], entry.leading, self.start(path)
      for numbers in itertools.product(*map(range, shape[:n])):
        piece = Piece(path, numbers, start, shape[n:])
        found.setdefault(entry.name.format(*numbers), []).append(piece)
    # Embedding and head have no numbers, and stand first.
    yield from sorted(found.items(), key=lambda item: item[1][0].numbers)

  def shape(self, pieces: list[Piece]) -> Shape:
    """Returns the shape of the tensor that these pieces make up, their way round."""
    *rest, _ = pieces[0].shape
    whole = (*rest, sum(piece.shape[-1] for piece in pieces))
    return whole[::-1] if self.stored[pieces[0].path].turned else whole


def known_as(name: str, present: Mapping[str, Any]) -> str:
  """Returns the name of a tensor in files that hold the names `present`.

  Files of a model without its head leave the first word of the name out.
  """
  bare = name
  for prefix in _PREFIXES:
    bare = bare.removeprefix(prefix)
  return bare if name not in present and bare in present else name


def ignored(name: str) -> bool:
  """Whether a tensor is none of the model's weights, so that a file may have it left over."""
  return bool(_IGNORED.fullmatch(name))
