"""Rules: which dim of which parameter is cut over which mesh axes, as data, in two steps.

    path of a parameter  ->  a name for each of its dims  ->  the mesh axes that cut each dim

    layers/query/kernel  ->  ("embed", "heads")           ->  (None, "tensor")

A *rule* is one line of the first step: a pattern of paths and a name for each dim. It depends on
what a layer computes with the parameter, and `redco` writes it for most transformers. The second
step is a table from names to axes, and depends on where the model runs. Axis `fsdp` needs no rule:
layers never see its pieces (weights are gathered before they are used), so that it cuts whichever
dim of a parameter is longest after the others are cut.

A parameter that no rule covers is an error as soon as `tensor` has more than one device, so that
none is replicated unnoticed; `(path, None)` replicates one on purpose.
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
# A name for each dim of a parameter; None for a dim that nothing but `fsdp` cuts.
Names = tuple[str | None, ...]

# Mesh axes of each name, unless a stack says otherwise.
PLACES: Mapping[str, tuple[str, ...]] = {
  "vocabulary": (TENSOR,),
  "heads": (TENSOR,),
  "mlp": (TENSOR,),
  "experts": ("expert",),
}


def _check_nothing(sizes: Mapping[str, int]) -> None:
  """Accepts every mesh."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Where a stack's parameters lie, and over which axes its modules communicate.

  Attributes:
    dims: the rules, pairs (pattern, names). The pattern is a regular expression that matches a
      whole path such as `layers/query/kernel`; the names are a name or None for each dim (of one
      layer, for layers). The first rule that matches counts. A dim without a name, or whose name
      has no place, is not cut; None in place of the names replicates a parameter of any rank.
    places: name of a dim -> mesh axes that cut it, the first outermost. A name that is missing here
      is looked up in `PLACES`.
    axes: those of `sequence` and `tensor` that the modules share work over, by calling
      `jaxpipe.parallel.axes`. A mesh with more than one device along another of the two is refused.
    check: called with the mesh's sizes, axis -> devices, when a step is built; raises ValueError
      where the model cannot run on such a mesh.
  """

  dims: Sequence[tuple[str, Names | None]]
  places: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  axes: frozenset[str] = frozenset()
  check: Callable[[Mapping[str, int]], None] = _check_nothing

  def names(self, path: str, rank: int) -> Names | None:
    """Returns the names of a parameter's dims by the first rule that matches.

    Args:
      path: of the parameter, such as `layers/query/kernel`.
      rank: number of its dims (of one layer, for layers).

    Returns:
      A name or None for each dim; None in place of all where no rule covers the parameter.

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
    """Returns the partition spec of one parameter (of one layer, for layers).

    Args:
      path: of the parameter, such as `layers/query/kernel`.
      shape: its whole shape, before anything is cut.
      sizes: mesh axis -> number of devices; an axis left out has one.

    Returns:
      A spec with one entry for every dim.

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
    """The mesh axes of more than one device that cut a dim of this name."""
    places = self.places.get(name or "", PLACES.get(name or "", ()))
    return tuple(axis for axis in places if sizes.get(axis, 1) > 1)


# The rules of a stack that was given none: nothing is cut but by `fsdp`.
NONE = Rules(dims=())


def check_axes(rules: Rules, sizes: Mapping[str, int]) -> None:
  """Refuses a mesh along one of whose axes all devices would compute the same.

  Args:
    rules: the stack's rules.
    sizes: mesh axis -> number of devices; an axis left out has one.

  Raises:
    ValueError: an axis that the modules do not share work over, or what `rules.check` raises.
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
  """Into how many pieces one entry of a partition spec cuts its dim."""
  return math.prod(sizes.get(axis, 1) for axis in axes_of_entry(entry))


def axes_of_entry(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a partition spec: of None, of a name or of several."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _with_fsdp(
  path: str, shape: Sequence[int], cut: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> list[Any]:
  """Entries of a partition spec, with `fsdp` as innermost axis of the longest piece it divides.

  Args:
    path: of the parameter, for messages.
    shape: its whole shape.
    cut: for each dim, the axes that cut it by the rules.
    sizes: mesh axis -> number of devices.
  """
  n = sizes.get(FSDP, 1)
  cut = list(cut)
  # A rule may have given `fsdp` a dim already; an axis can cut a parameter only once.
  if n > 1 and not any(FSDP in axes for axes in cut):
    left = [dim // _pieces(axes, sizes) for dim, axes in zip(shape, cut, strict=True)]
    fits = [d for d in range(len(shape)) if left[d] % n == 0]
    # A single number is not worth an error: it is replicated.
    if not fits and math.prod(shape) > 1:
      near = [k for k in range(1, n) if any(dim % k == 0 for dim in left)]
      raise ValueError(
        f"parameter {path} {list(shape)}: none of its dims can be cut into fsdp:{n} pieces; use"
        f" fsdp:{max(near)}, or a width that is a multiple of {n}"
      )
    if fits:
      # Of equally long pieces take the dim that nothing else cuts: there the whole that `fsdp`
      # gathers is one contiguous stretch.
      best = max(fits, key=lambda d: (left[d], not cut[d]))
      cut[best] = (*cut[best], FSDP)
  return [axes if len(axes) > 1 else (axes[0] if axes else None) for axes in cut]


def _check_divides(
  path: str, name: str | None, n: int, axes: tuple[str, ...], sizes: Mapping[str, int]
) -> None:
  """Raises ValueError where a dim of n elements cannot be cut over these axes."""
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
  """Writes a key path of a parameter tree as rules do, such as `layers/query/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")
