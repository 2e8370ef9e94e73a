"""Where the dims of parameters lie: rules as data, in two steps.

    path of a parameter  ->  a name for each of its dims  ->  the mesh axes that cut it

    layers/query/kernel  ->  ("embed", "heads")           ->  (None, "tensor")

What a layer computes decides the first step, and `redco` writes it for most transformers; where it
runs decides the second. `fsdp` needs no rule: it cuts whatever dim of a parameter is left.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.mesh import FSDP, SEQUENCE, TENSOR

Tree = Any
Names = tuple[str | None, ...]

# Mesh axes of each name, unless a stack says otherwise.
PLACES: Mapping[str, tuple[str, ...]] = {
  "vocabulary": (TENSOR,),
  "heads": (TENSOR,),
  "mlp": (TENSOR,),
  "experts": ("expert",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Where a stack's parameters lie, and over which axes its modules communicate.

  Attributes:
    dims: (pattern, names): a regular expression that matches a whole path such as
      `layers/query/kernel`, and a name or None for each dim (of one layer, for layers). The first
      that matches counts. A dim without a name, or whose name has no place, is not cut; None in
      place of the names replicates a parameter of any rank on purpose.
    places: name -> mesh axes, the first outermost; what is missing is taken from `PLACES`.
    axes: those of `sequence` and `tensor` that the modules know how to share work over.
    check: raises ValueError where the model cannot run on a mesh of these sizes.
  """

  dims: Sequence[tuple[str, Names | None]]
  places: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  axes: frozenset[str] = frozenset()
  check: Callable[[Mapping[str, int]], None] = lambda sizes: None

  def override(self, *dims: tuple[str, Names | None], **places: tuple[str, ...]) -> Rules:
    """The same rules, after these."""
    return dataclasses.replace(self, dims=(*dims, *self.dims), places={**self.places, **places})

  def names(self, path: str, rank: int) -> Names | None:
    """Names of a parameter's dims; None where no rule covers it.

    Raises:
      ValueError: the rule has names for another number of dims.
    """
    for pattern, names in self.dims:
      if re.fullmatch(pattern, path):
        names = (None,) * rank if names is None else names
        if len(names) != rank:
          raise ValueError(
            f"parameter {path} has {rank} dims, and its rule {pattern!r} has {len(names)} names"
            f" {names}; give one for each dim"
          )
        return names
    return None

  def spec(self, path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> Spec:
    """The partition spec of one parameter (of one layer, for layers).

    Args:
      path: such as `layers/query/kernel`.
      shape: whole.
      sizes: of the mesh axes.

    Raises:
      ValueError: no rule covers it though an axis wants one, or a dim does not divide.
    """
    names = self.names(path, len(shape))
    if names is None and sizes.get(TENSOR, 1) > 1:
      raise ValueError(
        f"parameter {path} {list(shape)}: no rule says how it lies over {TENSOR}:{sizes[TENSOR]};"
        f" name its dims in the stack's Rules, or add ({path!r}, None) to replicate it on purpose"
      )
    names = names or (None,) * len(shape)
    cut = [self._axes(name, sizes) for name in names]
    for name, axes, n in zip(names, cut, shape, strict=True):
      _check_divides(path, name, n, axes, sizes)
    return Spec(*_with_fsdp(path, shape, cut, sizes))

  def _axes(self, name: str | None, sizes: Mapping[str, int]) -> tuple[str, ...]:
    places = self.places.get(name or "", PLACES.get(name or "", ()))
    return tuple(axis for axis in places if sizes.get(axis, 1) > 1)


# What a stack without rules has: nothing is cut but by `fsdp`.
NONE = Rules(dims=())


def check_axes(rules: Rules, sizes: Mapping[str, int]) -> None:
  """Raises ValueError where the modules would repeat on an axis what they should share.

  Args:
    rules: the stack's.
    sizes: of the mesh axes.
  """
  for axis in (SEQUENCE, TENSOR):
    if sizes.get(axis, 1) > 1 and axis not in rules.axes:
      able = ", ".join(sorted(rules.axes)) or "none"
      raise ValueError(
        f"mesh axis {axis}:{sizes[axis]}: the stack's modules do not share work over it (they do"
        f" over {able}), all its devices would do the same; use {axis}:1, or write the modules with"
        " jaxpipe.parallel.axes and give LayerStack(rules=Rules(axes=...))"
      )
  rules.check(sizes)


def _pieces(entry: Any, sizes: Mapping[str, int]) -> int:
  """In how many pieces one entry of a spec cuts its dim."""
  return math.prod(sizes.get(axis, 1) for axis in axes_of_entry(entry))


def axes_of_entry(entry: Any) -> tuple[str, ...]:
  """The mesh axes of one entry of a spec."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _with_fsdp(
  path: str, shape: Sequence[int], cut: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> list[Any]:
  """The axes of each dim, `fsdp` on the largest piece that it divides, innermost."""
  n = sizes.get(FSDP, 1)
  cut = list(cut)
  if n > 1 and not any(FSDP in axes for axes in cut):
    left = [dim // _pieces(axes, sizes) for dim, axes in zip(shape, cut, strict=True)]
    fits = [d for d in range(len(shape)) if left[d] % n == 0]
    if not fits and math.prod(shape) > 1:
      near = [k for k in range(1, n) if any(dim % k == 0 for dim in left)]
      raise ValueError(
        f"parameter {path} {list(shape)}: none of its dims can be cut into fsdp:{n} pieces; use"
        f" fsdp:{max(near)}, or a width that is a multiple of {n}"
      )
    if fits:
      # Of equal dims the one that nothing else cuts: what is gathered then is one stretch.
      best = max(fits, key=lambda d: (left[d], not cut[d]))
      cut[best] = (*cut[best], FSDP)
  return [axes if len(axes) > 1 else (axes[0] if axes else None) for axes in cut]


def _check_divides(
  path: str, name: str | None, n: int, axes: tuple[str, ...], sizes: Mapping[str, int]
) -> None:
  count = _pieces(axes, sizes)
  if n % count:
    fits = [k for k in range(1, n + 1) if n % k == 0]
    near = min(fits, key=lambda k: (abs(k - count), k))
    named = ",".join(f"{axis}:{sizes[axis]}" for axis in axes)
    raise ValueError(
      f"parameter {path}: its dim {name} of {n} cannot be cut over {named}; use {near} in place of"
      f" {count} devices, or {n - n % count + count} {name}"
    )


def describe(path: Any) -> str:
  """A key path of a parameter tree as rules write it."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
