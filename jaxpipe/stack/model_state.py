"""The model state of a packed stack: which of it a forward changes, and its rows after a step.

Model state is every variable that is not trained. Running statistics (`nnx.BatchStat` and types
derived from it) change in a forward that trains; frozen weights never do. Within a step F reads the
state as it was before the step. What each microbatch makes of the changing leaves is summed in rows
of their own, and once the step is over, the mean over microbatches takes the place of the old
values:

    state     row [width]:     mean | kernel | var      before the step
    changing  row [narrower]:  mean' | var'             the step's mean over microbatches
    state     row [width]:     mean' | kernel | var'    after it

So the state after a step is the same under every schedule, and no bubble can touch it.

Letters of shapes: S stages; a device owns some of them, `owned` in number.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.flat import Flat
from jaxpipe.parallel.mesh import STAGE
from jaxpipe.parallel.protocol import PlacementLike
from jaxpipe.parallel.replicas import owned
from jaxpipe.stack.errors import StackError
from jaxpipe.stack.network import Network

Tree = Any
# Dtype -> [..., width], of one row or of several.
Rows = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class StateRows:
  """How the model state of each stage lies in a row, and which leaves of it change.

  Attributes:
    network: all modules, and which of their state changes.
    placement: which device holds which stage.
    stages: names of each stage's modules, [S][...].
    state: how each stage's state lies in its row, [S].
    changing: layout of the changing leaves alone, in a second row, [S].
    widths: dtype -> elements of a row of state.
  """

  network: Network
  placement: PlacementLike
  stages: tuple[tuple[str, ...], ...]
  state: tuple[Flat, ...]
  changing: tuple[Flat, ...]
  widths: Mapping[str, int]

  def renewed(
    self, rows: Rows, counted: Rows, vary: Callable[[Tree], Tree]
  ) -> dict[str, jax.Array]:
    """Replaces the changing leaves by the step's averages; all others stay bit for bit.

    It runs inside `shard_map`.

    Args:
      rows: dtype -> [owned, width] before the step, of the stages that this device owns.
      counted: dtype -> [owned, width], the changing leaves as the step has made them: of floats the
        mean over microbatches and data shards, of whole numbers the largest.
      vary: marks a tree as differing between stages.

    Returns:
      The rows after the step, dtype -> [owned, width].
    """

    def write(s: int, row: Rows, new: Rows) -> Rows:
      before = self.state[s].read(row)
      changed = iter(self.changing[s].read(new))
      changes = jax.tree.leaves({n: self.network.specs[n].changing for n in self.stages[s]})
      after = [next(changed) if yes else leaf for leaf, yes in zip(before, changes, strict=True)]
      after = [leaf.astype(old.dtype) for leaf, old in zip(after, before, strict=True)]
      # All branches of a switch must agree on what varies over the mesh, and the row of a stage
      # without state is a constant.
      marked: Rows = vary(self.state[s].pack_leaves(after, self.widths))
      return marked

    stages = jnp.asarray(owned(self.placement), jnp.int32)[lax.axis_index(STAGE)]
    branches = [functools.partial(write, s) for s in range(len(self.stages))]
    made = [
      lax.switch(
        stages[j],
        branches,
        {name: leaf[j] for name, leaf in rows.items()},
        {name: leaf[j] for name, leaf in counted.items()},
      )
      for j in range(stages.shape[0])
    ]
    return stack_rows(made)


def changing_leaves(network: Network, stage: Sequence[str], trees: Mapping[str, Tree]) -> list[Any]:
  """Leaves of the modules' state that a forward changes, in the order of the stage's state.

  Args:
    network: says which leaves change.
    stage: names of the stage's modules.
    trees: name -> the module's state, or its shapes.
  """
  changes = {name: network.specs[name].changing for name in stage}
  leaves = jax.tree.leaves({name: trees[name] for name in stage})
  return [leaf for leaf, yes in zip(leaves, jax.tree.leaves(changes), strict=True) if yes]


def refuse_counters(network: Network, schedule: str) -> None:
  """Refuses state that counts in whole numbers, for a schedule that holds every stage twice.

  Each of the two homes of a stage sees a part of the microbatches, and what they have made of the
  state is added. Of floats, which each home sums, the sum over all microbatches comes out; of whole
  numbers, of which each keeps the largest, a sum of two largest would.

  Raises:
    StackError: names the module.
  """
  for spec in network.specs.values():
    pairs = zip(jax.tree.leaves(spec.state), jax.tree.leaves(spec.changing), strict=True)
    if any(yes and not jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf, yes in pairs):
      raise StackError(
        f"{spec.name} counts in whole numbers, and schedule {schedule} holds every stage twice;"
        " make the counter a float, or take another schedule"
      )


def stack_rows(rows: Sequence[Rows]) -> dict[str, jax.Array]:
  """Rows, each dtype -> [width], as dtype -> [len(rows), width].

  The key is the dtype of the network's own leaves; an optimizer's moments may be wider.
  """
  return {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
