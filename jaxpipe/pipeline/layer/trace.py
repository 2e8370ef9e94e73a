"""Traces a layer to a jaxpr inside `shard_map`, also a layer that JAX would refuse there.

Inside `shard_map` the type of a value says over which mesh axes it varies (`varying.py` explains
the word). A fresh `jnp.zeros` varies over none, but becomes varying as soon as the layer's input is
added to it; and JAX wants a loop's carry to have one type before and after its body, and the
branches of a conditional to return equal types. That refuses many an ordinary layer: a scan whose
carry starts from zeros, a branch or a custom backward rule that returns a constant. Such a function
is traced twice:

    function ──[1] trace inside shard_map ────────────────────────────▶ jaxpr
                    │ refused                                             ▲
                    ▼                                                     │
               [2] trace off the mesh ──▶ [3] run over it, types mended ──┘

The second way is open only to a function that does not communicate: off the mesh, a sum over an
axis of several devices would be traced as a sum over nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import AXES, STAGE
from jaxpipe.pipeline.layer.interpret import bodies, opened, run
from jaxpipe.pipeline.layer.varying import axes_of, bind_varying, collectives, unvarying, vary


def trace(function: Callable[..., Any], *args: Any) -> Any:
  """Returns the closed jaxpr of `function(*args)` with every call-like equation expanded.

  Args:
    function: maps trees of arrays to a tree of arrays. If anything is to be differentiated, this
      function does it: custom derivative rules are gone from the result. Whatever varies over the
      mesh must be an argument; a closure would carry it past the types.
    args: trees of arrays or `jax.ShapeDtypeStruct`s, varying over the mesh as the jaxpr's inputs
      will.

  Returns:
    A closed jaxpr from the leaves of `args` to the leaves of the result.

  Raises:
    ValueError: a loop or branch starts from a constant in a function that also communicates, or it
      communicates in a way that waits for devices which are running another action.
  """
  closed, over_mesh = _trace_anywhere(function, args)
  _refuse_what_waits_for_all(closed)
  _refuse_interpreted_kernels(opened(closed))

  def flat(*leaves: Any) -> list[Any]:
    if over_mesh:
      return run(closed, leaves)
    return vary(run(closed, leaves, bind_varying), axes_of(leaves))  # [3]

  # Tracing the run of a jaxpr writes down the equations of its calls in place of the calls: `run`
  # enters `jit`, `checkpoint` and custom rules. Also needed where [1] went well.
  return jax.make_jaxpr(flat)(*jax.tree.leaves(args))


def lenient(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `function` in a form that JAX accepts inside `shard_map`, whatever loops start from.

  Args:
    function: as for `trace`. It must differentiate inside, for custom derivative rules are gone
      from what is returned, and must take whatever varies over the mesh as an argument.

  Returns:
    A function of the same arguments and result, which may start loops and branches from constants.
  """

  def call(*args: Any) -> Any:
    closed, structure = trace_tree(function, *args)
    return jax.tree.unflatten(structure, run(closed, jax.tree.leaves(args)))

  return call


def trace_tree(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
  """Returns what `trace` does, and the structure of the tree that the function returns."""
  structures: list[Any] = []

  def leaves_of(*args: Any) -> list[Any]:
    leaves, structure = jax.tree.flatten(function(*args))
    structures.append(structure)
    return leaves

  closed = trace(leaves_of, *args)
  return closed, structures[-1]


def _trace_anywhere(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, bool]:
  """Returns the function's closed jaxpr, and whether it was traced inside `shard_map`."""
  # [1] Inside `shard_map` wherever that works: what a layer reduces over a mesh axis is
  # differentiated rightly only by its types, for the transpose of a sum over an axis depends on
  # whether the summand varies along it.
  try:
    return jax.make_jaxpr(function)(*args), True
  except (TypeError, ValueError) as error:
    refused = error
  # [2] Custom derivative rules still stand here, so that derivatives are taken off the mesh too and
  # [3] has plain equations to mend. An error that has nothing to do with the mesh is raised again
  # by this second trace, and is then the one that the caller sees.
  closed = _off_mesh(function, jax.tree.map(unvarying, args))
  if names := sorted({name for name, _ in collectives(closed)}):
    raise ValueError(
      "a loop or a branch starts from a constant, but becomes something that differs between"
      f" devices, and there is {', '.join(names)} beside it: start it from the data, such as"
      " jnp.zeros_like(x) or 0 * x.sum()"
    ) from refused
  return closed, False


def _off_mesh(function: Callable[..., Any], shapes: Sequence[Any]) -> Any:
  """Returns the closed jaxpr of a function, traced as if there were no mesh.

  Stand-ins that vary over no axis are enough for nearly every function; the rest is traced where no
  `shard_map` is entered.
  """
  try:
    return jax.make_jaxpr(function)(*shapes)
  except (TypeError, ValueError) as error:
    if "manual_axis_type" not in str(error) and "vma" not in str(error):
      raise
  # A Pallas kernel refuses to be traced inside `shard_map` unless it is told over which axes its
  # results vary, even where its operands vary over none. JAX keeps "inside `shard_map`" as a state
  # of the thread, so another thread is outside. The settings below are states of the thread as
  # well, and would be back at their defaults there.
  config: Any = jax.config
  sizes = {axis: axes.size(axis) for axis in AXES}
  x64, precision = config.jax_enable_x64, config.jax_default_matmul_precision

  def trace_outside() -> Any:
    # `axes.outside` makes a layer that asks for a mesh axis an error: it would believe itself alone
    # and leave out its sums.
    with jax.enable_x64(x64), jax.default_matmul_precision(precision), axes.outside(sizes):
      return jax.make_jaxpr(function)(*shapes)

  with ThreadPoolExecutor(1) as outside:
    return outside.submit(trace_outside).result()


def _refuse_interpreted_kernels(jaxpr: Any) -> None:
  """Raises ValueError for a Pallas kernel that is interpreted, as on CPU.

  Its interpreter is a loop that JAX makes when the program is lowered, whose types know no mesh.
  """
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call" and equation.params.get("interpret"):
      raise ValueError(
        "a layer, embedding or head calls an interpreted Pallas kernel, which JAX cannot lower over"
        " a mesh: pass interpret=False, or call the same function in jax.numpy on this platform,"
        " for example by jax.lax.platform_dependent"
      )
    for inner in bodies(equation):
      _refuse_interpreted_kernels(inner)


def _refuse_what_waits_for_all(closed: Any) -> None:
  """Raises ValueError for communication that cannot stand inside an action.

  Devices of other stages are in another branch at the time. A collective over `stage` would wait
  for them; so does a `ppermute` over any axis, whose rendezvous is of every pair in the program (it
  gave wrong values, or hung). The groups of other collectives wait for their own devices alone,
  which are of one stage and do the same.
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
