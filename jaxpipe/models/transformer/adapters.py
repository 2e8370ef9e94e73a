"""Low-rank adapters beside a transformer's matrices, and which parameters train beside them.

    y = x W + (alpha / r) (x A) B       W [in, out] frozen, A [in, r], B [r, out] trained

A begins as normal values and B as zeros, so that an adapted model begins as its base. The *base* of
a model is the same one without adapters, all of whose parameters train. Other systems' checkpoints
are read into it and written from it.

References:
  Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.parallel.rules import describe
from jaxpipe.stack.paths import get_path, leaf_paths, merged
from jaxpipe.stack.stack import LayerStack

Tree = Any


@dataclasses.dataclass(frozen=True)
class Lora:
  """The adapters of a model, one for each matrix of its attention and MLPs; experts have none.

  Attributes:
    rank: r, columns of A.
    alpha: what a product with an adapter is multiplied by is alpha / r.

  Raises:
    ValueError: a rank below 1, or an alpha that is not positive.
  """

  rank: int
  alpha: float

  def __post_init__(self) -> None:
    if self.rank < 1 or not self.alpha > 0:
      raise ValueError(
        f"adapters of rank {self.rank} and alpha {self.alpha}; use a rank of 1 or more, and an"
        " alpha above 0"
      )

  @property
  def scale(self) -> float:
    """What x A B is multiplied by before it is added."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Unfrozen:
  """The filter of all parameters but those whose paths match; adapters always train.

  Attributes:
    pattern: regular expression of whole paths, such as `embed/.*|layers/0/.*`.
    tied: path of a parameter that is another module's own -> the owner's, which alone counts.
  """

  pattern: str
  tied: Mapping[str, str]

  def __repr__(self) -> str:
    return f"all but freeze={self.pattern!r}"

  def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
    kind = getattr(value, "type", type(value))
    if not issubclass(kind, nnx.Param):
      return False
    return issubclass(kind, nnx.LoRAParam) or not self.matches(path)

  def matches(self, path: Sequence[Any]) -> bool:
    """Whether the expression matches a path, whose first element is the place of a module."""
    name = "/".join(map(str, path))
    return bool(re.fullmatch(self.pattern, self.tied.get(name, name)))


def trained(lora: Lora | None, freeze: str, tied: Mapping[str, str]) -> Any:
  """Returns the filter of the parameters that train, as `LayerStack` takes it.

  Args:
    lora: the adapters; None: there are none.
    freeze: regular expression of the parameters that do not train; empty: with adapters all but
      these, else none.
    tied: path of a parameter that is another module's own -> the owner's.

  Raises:
    ValueError: no regular expression.
  """
  if not freeze:
    return nnx.LoRAParam if lora else nnx.Param
  try:
    re.compile(freeze)
  except re.error as error:
    raise ValueError(f"freeze {freeze!r} is no regular expression: {error}") from error
  return Unfrozen(freeze, tied)


def check_frozen(stack: LayerStack, freeze: str) -> None:
  """Refuses an expression that freezes nothing.

  Raises:
    ValueError: names the expression and some paths that there are.
  """
  if freeze and not stack.has_state:
    some = [at for n, spec in stack.network.specs.items() for at in leaf_paths(spec.shapes, n)]
    shown = ", ".join([*some[:2], some[-1]])
    raise ValueError(f"freeze {freeze!r} matches no parameter's whole path; there are {shown}, ...")


def divide(stack: LayerStack, whole: Tree, fresh: Tree) -> tuple[Tree, Tree]:
  """Divides the parameters of a base into what trains and what does not.

  Args:
    stack: the model with adapters or frozen parameters.
    whole: parameters of its base; canonical, or placed where the stack is uniform.
    fresh: the stack's own parameters, in the same order, of which adapters are taken.

  Returns:
    The stack's parameters, and its model state.
  """

  def parts(tree: Tree) -> Iterator[tuple[Tree, Tree]]:
    """Yields, for the layers of each run, their part of a tree of the stack and of the whole."""
    runs = stack.network.runs
    if len(runs) == 1:
      yield tree["layers"], whole["layers"]
      return
    for run, own in zip(runs, tree["layers"], strict=True):
      yield own, jax.tree.map(lambda leaf, run=run: leaf[run.start : run.stop], whole["layers"])

  def taken(own: Tree, found: Tree) -> Tree:
    def one(path: Any, leaf: Any) -> Any:
      base = get_path(found, describe(path))
      return leaf if base is None else base

    return jax.tree.map_with_path(one, own)

  def divided(tree: Tree) -> Tree:
    layers = tuple(taken(*pair) for pair in parts(tree))
    ends = {end: taken(tree[end], whole[end]) for end in ("embed", "head")}
    return {**ends, "layers": layers[0] if len(layers) == 1 else layers}

  return divided(fresh), divided(stack.state_shapes()) if stack.has_state else {}


def merge(stack: LayerStack, lora: Lora | None, params: Tree, state: Tree) -> Tree:
  """Merges adapters into their matrices, and what is frozen with what is trained.

  Args:
    stack: the model with adapters or frozen parameters.
    lora: its adapters; None: there are none.
    params: its canonical parameters.
    state: its canonical model state; `{}` where nothing is frozen.

  Returns:
    The canonical parameters of its base.
  """
  runs = len(stack.network.runs)
  frozen = state or {"embed": {}, "head": {}, "layers": {} if runs == 1 else ({},) * runs}
  pairs = [(params["layers"], frozen["layers"])]
  if runs > 1:
    pairs = list(zip(params["layers"], frozen["layers"], strict=True))
  each = [_without_adapters(merged(*pair), lora) for pair in pairs]
  layers = each[0] if runs == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *each)
  ends = {end: merged(params[end], frozen[end]) for end in ("embed", "head")}
  return {**ends, "layers": layers}


def _without_adapters(tree: Tree, lora: Lora | None) -> Tree:
  """A tree of modules whose kernels have taken in the adapters beside them.

  Leaves may have a leading dim of layers.
  """
  if not isinstance(tree, Mapping):
    return tree
  tree = {name: _without_adapters(value, lora) for name, value in tree.items()}
  if lora and "lora_a" in tree:
    a, b = tree.pop("lora_a"), tree.pop("lora_b")
    kernel = tree["kernel"]
    # In the wider of the dtypes: it is rounded once, as it is stored.
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    product = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    added = lora.scale * product
    tree["kernel"] = (kernel.astype(wide) + added).astype(kernel.dtype)
  return tree


def flops_beside_base(stack: LayerStack, visited: float = 1.0) -> int:
  """Returns by how many FLOPs a training token of a model differs from one of its base.

  A frozen weight takes 4 in place of 6, for it has no gradient; a weight of an adapter takes 6.

  Args:
    stack: the model with adapters or frozen parameters.
    visited: share of the experts that a token visits.
  """
  state = stack.state_shapes() if stack.has_state else {}
  head = stack.head_state(state) if state else {}
  frozen = _multiplied({"layers": state.get("layers", {}), "head": head}, visited)
  params = jax.tree.leaves_with_path(stack.param_shapes())
  adapters = sum(math.prod(p.shape) for path, p in params if "/lora_" in describe(path))
  return 6 * adapters - 2 * frozen


def _multiplied(tree: Tree, visited: float) -> int:
  """Elements of the matrices of a tree of shapes, of all layers, as far as a token meets them."""
  found = 0
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = describe(path)
    rank = len(leaf.shape) - name.startswith("layers/")
    # Matrices of experts have a leading dim of experts.
    share = visited if rank == 3 else 1.0
    found += round(math.prod(leaf.shape) * share) if rank >= 2 else 0
  return found
