"""Says which layers are of one kind, so that one loop can run them, and why others are not.

Layers are of one kind where their modules have equal static attributes, or, as a batch shows, where
they compute the same: the number of a layer, or an initializer of its own, makes no kind.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from typing import Any

import jax

from jaxpipe.stack.layer_trace import ShapeWalk, module_call
from jaxpipe.stack.module.computation import difference, traced
from jaxpipe.stack.module_spec import ModuleSpec
from jaxpipe.stack.ties import below

Tree = Any


def same_computation(specs: Mapping[str, ModuleSpec], batch: Tree) -> dict[int, str | None]:
  """How layers whose attributes differ from those of the layer before differ in what they compute.

  Args:
    specs: all modules.
    batch: an example or its shapes, leaves [B, ...].

  Returns:
    Number of a layer, for those that have variables of the same shapes as the layer before -> what
    they compute otherwise; None where they compute the same.
  """
  layers = [specs[f"layers/{i}"] for i in range(len(specs) - 2)]
  unlike = [
    i
    for i in range(1, len(layers))
    if layers[i].graph is not layers[i - 1].graph
    and not layers[i].same_kind(layers[i - 1])
    and layers[i].same_variables(layers[i - 1])
    # What becomes of statistics is no output that is compared here.
    and not any(jax.tree.leaves(layers[i].changing))
  ]
  if not unlike:
    return {}
  walk = ShapeWalk(batch)
  walk.through(specs["embed"])
  given = []  # what each layer is called with
  for spec in layers:
    given.append(walk.x)
    walk.through(spec)

  @functools.cache
  def trace(i: int) -> tuple[Any, ...]:
    spec = layers[i]
    calls = (module_call(spec, walk.rows, training) for training in (True, False))
    return traced(*calls, spec.shapes, spec.state, given[i], batch)

  return {i: difference(trace(i - 1), trace(i)) for i in unlike}


def runs_of(
  specs: Mapping[str, ModuleSpec],
  ties: Mapping[str, str],
  same: Mapping[int, str | None],
  shared: Container[str] = (),
) -> tuple[tuple[range, ...], dict[int, str]]:
  """Numbers of the layers of each run: neighbours of one kind that own the same leaves.

  Args:
    specs: all modules.
    ties: path of a tied leaf -> its owner's path.
    same: as `same_computation` returns it.
    shared: paths of leaves below a layer that may be another layer's own, and yet be stacked.

  Returns:
    The runs; and number of the first layer of a run -> how it differs from the layer before.
  """

  def owned_by_others(i: int) -> list[str]:
    return [path for path in below(f"layers/{i}", ties) if path not in shared]

  starts = {0: ""}
  depth = len(specs) - 2
  for i in range(1, depth):
    spec, before = specs[f"layers/{i}"], specs[f"layers/{i - 1}"]
    # Layers of one factory share its graph, which saves comparing the graphs.
    alike = (spec.graph is before.graph and spec.same_variables(before)) or spec.same_kind(before)
    if not alike and not (i in same and same[i] is None):
      starts[i] = _reason(spec, before, same.get(i))
    elif owned_by_others(i) != owned_by_others(i - 1):
      # A tied leaf is missing from its layer's tree, and only equal trees can be stacked.
      starts[i] = "its tied variables are other ones"
  ends = [*list(starts)[1:], depth]
  runs = tuple(range(a, b) for a, b in zip(starts, ends, strict=True))
  return runs, {i: why for i, why in starts.items() if i}


def _reason(spec: ModuleSpec, before: ModuleSpec, computes: str | None) -> str:
  """How a layer differs from the layer before, for `print`."""
  if spec.label != before.label:
    return f"{spec.label} after {before.label}"
  if not spec.same_variables(before):
    return "its variables have other names or shapes, or others of them are trained"
  return computes or "its attributes differ"
