"""What one device knows and carries: the words that the parts of a tick have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.pipeline.device.probe import Probe
from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.varying import vary
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.pools import Pools
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.pipeline.table.program import CODE, Doing, Program
from jaxpipe.schedules import Kind


class Totals(NamedTuple):
  """Sums over the microbatches that this device has finished."""

  loss: jax.Array
  weight: jax.Array
  metrics: Tree


class Carry(NamedTuple):
  """What the loop carries.

  Attributes:
    activations, gradients: rings; see `program.py`.
    pools: saved values.
    weights: ring of what G gathers, leaf by leaf; empty where weights lie whole.
    vocabulary: ring of what a shard of the head keeps; empty where the last stage has all of it.
    flight: what was sent on the tick before and is still on its way; None without slack.
    grads: sums; empty in evaluation.
    totals: sums.
  """

  activations: Tree
  gradients: Tree
  pools: Pools
  weights: list[jax.Array]
  vocabulary: dict[str, Tree]
  flight: Tree | None
  grads: dict[str, Tree]
  totals: Totals


@dataclasses.dataclass(frozen=True)
class Now:
  """One tick on one device.

  Attributes:
    row: the device's row of the table, by column.
    doing: what may happen on this tick on any device, known before the program runs.
  """

  row: SimpleNamespace
  doing: Doing

  def __getattr__(self, column: str) -> jax.Array:
    value: jax.Array = getattr(self.row, column)
    return value

  def does(self, *kinds: Kind) -> jax.Array:
    """Whether this device's action is one of `kinds`."""
    return jnp.stack([self.row.kind == CODE[kind] for kind in kinds]).any()

  def when(
    self, kinds: Sequence[Kind], run: Callable[..., Any], skip: Callable[..., Any], *args: Any
  ) -> Any:
    """Does `run(*args)` where this device's action is one of `kinds`, else `skip(*args)`.

    No conditional where the tick's table says already what all devices do.
    """
    codes = {CODE[kind] for kind in kinds}
    if not codes & self.doing.kinds:
      return skip(*args)
    with jax.named_scope("_".join(kinds)):
      if self.doing.kinds <= codes:
        return run(*args)
      return lax.cond(self.does(*kinds), run, skip, *args)

  def at_end(
    self,
    end: str,
    kinds: Sequence[Kind],
    run: Callable[..., Any],
    skip: Callable[..., Any],
    *args: Any,
  ) -> Any:
    """The same where the action stands at the `first` or `last` stage of the path besides."""
    codes = {CODE[kind] for kind in kinds}
    if not codes & getattr(self.doing, end):
      return skip(*args)
    with jax.named_scope(f"{end}_stage"):
      return lax.cond(self.does(*kinds) & (getattr(self.row, end) > 0), run, skip, *args)

  def meet(self, column: str, run: Callable[..., Any], *args: Any) -> Any:
    """Does `run(column, m, *args)` on all devices where they meet over m, else returns `args`.

    One argument is returned as it is, not as a tuple of one.
    """
    same = args if len(args) > 1 else args[0]
    if (column, True) not in self.doing.meetings:
      return same
    m = self.column(column)
    with jax.named_scope(column):
      if (column, False) not in self.doing.meetings:
        return run(column, m, *args)
      return lax.cond(
        m >= 0,
        lambda *args: run(column, m, *args),
        lambda *args: args if len(args) > 1 else args[0],
        *args,
      )

  def column(self, *parts: str) -> jax.Array:
    """A column of the row, by its name's parts."""
    value: jax.Array = getattr(self.row, "_".join(parts))
    return value


@dataclasses.dataclass(frozen=True)
class DeviceContext:
  """One device's side of the program; everything is traced inside `shard_map`.

  Attributes:
    stack, program, axes, poison: see `pipeline_value_and_grad`.
    blocking: whether a device that waits in a transfer works on nothing else, as on CPU.
    probe: reads the clock round every action; None for a program that reads none.
    params: embedding and head, varying over all axes; the head's with tied leaves.
    batch: leaves [M, rows, ...]; key, rows: for dropout.
    training: False where only forwards run.
    state: of a packed stack, rows of what is not trained, [V, width] for each dtype.
    x: stand-in of the activation that travels between stages; only its type is ever used.
  """

  stack: Any
  program: Program
  axes: tuple[str, ...]
  poison: bool
  blocking: bool
  probe: Probe | None
  params: Tree
  batch: Tree
  key: jax.Array | None
  rows: jax.Array
  training: bool
  state: Tree
  x: Tree = None

  def microbatch(self, m: jax.Array) -> Tree:
    """A microbatch's own inputs."""
    return rings.get(self.batch, m)

  def vary(self, tree: Tree) -> Tree:
    """Marks every leaf as differing along all mesh axes."""
    return vary(tree, self.axes)

  def zeros(self, shapes: Tree) -> Tree:
    """Varying zeros of these shapes and dtypes."""
    return self.vary(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

  def idle(self, like: Sequence[Any]) -> list[jax.Array]:
    """What a device that does nothing sends: zeros, or NaN under `poison`."""
    fill = jnp.nan if self.poison else 0

    def blank(leaf: Any) -> jax.Array:
      return jnp.full(leaf.shape, fill if is_float(leaf) else 0, leaf.dtype)

    leaves: list[jax.Array] = self.vary([blank(leaf) for leaf in like])
    return leaves


def accumulate(sums: Tree, new: Tree) -> Tree:
  """Adds leaf by leaf, in the sums' own precision."""
  return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, new)
