"""Slices of a jaxpr: which equations some values need, given others, and running just those.

JAX has dead-code elimination of its own, but not as a public name, and it keeps or drops whole
outputs; cutting a backward pass in two needs the question "what is left once these are known?".

Where the jaxpr comes from stands here too. Inside `shard_map` a fresh `jnp.zeros` does not vary
over the mesh and what is added to it does, so that JAX refuses many an ordinary layer: a loop whose
carry starts from zeros, a branch or a backward rule that returns them. Such a function is traced
twice:

    function ──[1] trace over the mesh ───────────────────────────────▶ jaxpr
                    │ refused                                             ▲
                    ▼                                                     │
               [2] trace off the mesh ──▶ [3] run over it, types mended ──┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import AXES, STAGE
from jaxpipe.pipeline.layer.interpret import Equation, Var, bind, read, run
from jaxpipe.pipeline.layer.varying import (
  axes_of,
  axes_of_types,
  bind_varying,
  collectives,
  unvarying,
  vary,
)


def trace(function: Callable[..., Any], *args: Any) -> Any:
  """Returns the closed jaxpr of `function(*args)` with every call-like equation expanded.

  Args:
    function: of trees of arrays. It differentiates, if anything does: custom derivative rules are
      expanded in the result. Whatever varies over the mesh comes in as an argument, never by a
      closure.
    args: trees of arrays or stand-ins, varying over the mesh as the jaxpr's inputs will.

  Raises:
    ValueError: a loop or branch starts from a constant in a function that also communicates, or it
      communicates in a way that waits for devices which are doing something else.
  """
  closed, over_mesh = _trace_anywhere(function, args)
  _refuse_what_waits_for_all(closed)

  def flat(*leaves: Any) -> list[Any]:
    if over_mesh:
      return run(closed, leaves)
    return vary(run(closed, leaves, bind_varying), axes_of(leaves))  # [3]

  return jax.make_jaxpr(flat)(*jax.tree.leaves(args))


def lenient(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `function`, to be called inside `shard_map`, traced as `trace` does.

  Differentiate inside `function`, never outside; whatever varies over the mesh is an argument.
  """

  def call(*args: Any) -> Any:
    structures: list[Any] = []

    def leaves_of(*args: Any) -> list[Any]:
      leaves, structure = jax.tree.flatten(function(*args))
      structures.append(structure)
      return leaves

    closed = trace(leaves_of, *args)
    return jax.tree.unflatten(structures[-1], run(closed, jax.tree.leaves(args)))

  return call


def needed(
  outputs: Iterable[Any], equations: Sequence[Equation], known: set[Var]
) -> list[Equation]:
  """Equations, in order, that compute `outputs` from the variables in `known`."""
  missing = {v for v in outputs if isinstance(v, Var) and v not in known}
  kept = []
  for equation in reversed(equations):
    if not missing.isdisjoint(equation.outvars):
      kept.append(equation)
      missing.update(v for v in equation.invars if isinstance(v, Var) and v not in known)
  return kept[::-1]


def depends(equations: Sequence[Equation], sources: Iterable[Var]) -> set[Var]:
  """All variables whose value can change with one of `sources`, themselves included."""
  reached = set(sources)
  for equation in equations:
    if any(isinstance(v, Var) and v in reached for v in equation.invars):
      reached.update(equation.outvars)
  return reached


def evaluate(
  equations: Sequence[Equation], values: dict[Var, Any], outputs: Sequence[Any]
) -> list[Any]:
  """Runs `equations` on the values of their inputs and returns those of `outputs`.

  A value that was saved for a later action has come to vary over all axes on the way, though it may
  be a sum over some of them; what is computed from it then does, too.
  """
  values = dict(values)
  for equation in equations:
    args = [read(values, v) for v in equation.invars]
    known = axes_of(args) <= axes_of_types(v.aval for v in equation.invars)
    outs = (bind if known else bind_varying)(equation, args)
    values.update(zip(equation.outvars, outs, strict=True))
  return [read(values, v) for v in outputs]


def used(equations: Sequence[Equation], outputs: Iterable[Any] = ()) -> list[Var]:
  """Variables that the equations, or `outputs`, read; each once, in order of first use."""
  reads = [v for equation in equations for v in equation.invars] + list(outputs)
  return list(dict.fromkeys(v for v in reads if isinstance(v, Var)))


def _off_mesh(function: Callable[..., Any], shapes: Sequence[Any]) -> Any:
  """The jaxpr of a function that knows nothing of a mesh."""
  try:
    return jax.make_jaxpr(function)(*shapes)
  except (TypeError, ValueError) as error:
    if "manual_axis_type" not in str(error) and "vma" not in str(error):
      raise
  # A Pallas kernel wants to be told over which axes its results vary, wherever types say so.
  # Tracing inside `shard_map` is a state of the thread: another one is outside.
  config: Any = jax.config
  sizes = {axis: axes.size(axis) for axis in AXES}
  x64, precision = config.jax_enable_x64, config.jax_default_matmul_precision

  def trace() -> Any:
    with jax.enable_x64(x64), jax.default_matmul_precision(precision), axes.outside(sizes):
      return jax.make_jaxpr(function)(*shapes)

  with ThreadPoolExecutor(1) as outside:
    return outside.submit(trace).result()


def _refuse_what_waits_for_all(closed: Any) -> None:
  """Stages take different branches: of what one stage's devices do, other stages know nothing.

  A `ppermute` waits for every pair in the program, and gave wrong values or hung; groups of other
  collectives wait for their own devices alone.
  """
  for name, over in collectives(closed):
    if STAGE in over:
      raise ValueError(
        f"a layer, embedding or head calls {name} over the axis `{STAGE}`, along which other"
        " devices run other stages at the time: it would never end; use other axes only"
      )
    if name == "ppermute":
      raise ValueError(
        f"a layer, embedding or head calls ppermute over {', '.join(sorted(over))}: it waits for"
        " devices of other stages, which do other work at the time; use all_gather, psum_scatter or"
        " all_to_all, which wait for their own group alone"
      )


def _trace_anywhere(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, bool]:
  """The function's jaxpr, and whether it was traced over the mesh."""
  # [1] Over the mesh wherever that works: what a layer reduces over an axis is differentiated
  # rightly only by its types (the transpose of a sum depends on what varies).
  try:
    return jax.make_jaxpr(function)(*args), True
  except (TypeError, ValueError) as error:
    refused = error
  # [2] Derivatives are taken here too, while custom rules still stand. An error that has nothing to
  # do with the mesh is raised once more.
  closed = _off_mesh(function, jax.tree.map(unvarying, args))
  if names := sorted({name for name, _ in collectives(closed)}):
    raise ValueError(
      "a loop or a branch starts from a constant, but becomes something that differs between"
      f" devices, and there is {', '.join(names)} beside it: start it from the data, such as"
      " jnp.zeros_like(x) or 0 * x.sum()"
    ) from refused
  return closed, False
