"""One device's side of the program: what it does on each tick.

Every device runs the same loop over the ticks of a `Program`, and does on each what its own column
of the table says. One tick:

    [0] gather where weights are cut over `fsdp`: those of a stage, into a slot of `weights`
    [1] enter  where the vocabulary is cut over the stages: all devices embed a microbatch together
    [2] F      y, from the stage's input; what is kept goes to its cells
    [3] leave  at the last stage: the loss, and its gradient into `gradients`; or y to the head's
               shards
    [4] R      what F dropped
    [5] B / I  dx; I leaves what W waits for in cells that it may just have freed
    [6] back   at the first stage: dx into the embedding's gradient
    [7] W      the gradient of the stage's weights, from the cells
    [8] S / T  the head on a shard of the vocabulary; after the last S, loss and its gradient
    [9] send   y or dx to the neighbours; what arrives goes into its slot

A device does at most one of the actions F, R, B, I, W, S, T and G on a tick. Each stands in a
conditional of its own; [3] runs on top of an F at the last stage, [6] on top of a B or I at the
first. Rules that the shape of this loop follows, each of which was measured:

- A conditional returns only what it writes, and takes as operands only what it reads: XLA copies
  whole a buffer that a conditional both reads and returns.
- `ppermute` stands outside every conditional. It is one operation for all devices of the mesh: each
  waits until all have entered it, whichever pairs it names, and one that took another branch never
  would. Collectives over groups (`psum` over `tensor`, say) may stand inside, for the peers of a
  group always take the same branch; those over all stages may where the whole mesh does
  (`Now.collective`).
- The loop is never differentiated: F, I and W are explicit functions.
- Parameters are cast to *vary* over all mesh axes once, before the loop, so that gradients stay
  local and are reduced once a step, not once a microbatch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline.device.build import build_parts
from jaxpipe.pipeline.device.carry import Carry, Totals, sum_type
from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.now import Now
from jaxpipe.pipeline.device.order import after
from jaxpipe.pipeline.device.probe import END, START
from jaxpipe.pipeline.device.protocols import ActionArguments, Ends, Leaves, StageActions
from jaxpipe.pipeline.device.weights import Weights
from jaxpipe.pipeline.layer.floats import float_leaves, with_float_leaves
from jaxpipe.pipeline.layer.residuals import Residuals
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.pools import Storage
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.pipeline.table.program import CODE, Doing
from jaxpipe.schedules import Kind
from jaxpipe.stack.protocol import PackedStack, UniformStack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """The object whose `tick` does a device's work; every method is traced inside `shard_map`.

  Attributes:
    context: what the device knows for the whole step.
    ends: embedding and head: `WholeEnds`, `ShardedEnds` or `InnerEnds`.
    stage: the actions of its stages: a `LoopedStage` or `SwitchedStages`.
    weights: the parameters that they read.
    cells: int32 [ticks, P, values], where each tick's action reads and writes saved values.
    lengths: number of cells of each pool; of a packed stack rows of each arena, then of each sum.
    totals: zeros of the sums of loss, weight and metrics.
  """

  context: DeviceContext
  ends: Ends
  stage: StageActions
  weights: Weights
  cells: np.ndarray
  lengths: tuple[int, ...]
  totals: Totals

  @classmethod
  def build(
    cls,
    stack: UniformStack | PackedStack,
    context: DeviceContext,
    *,
    pieces: Tree,
    specs: Tree,
    layers: int,
    policy: Residuals | None,
  ) -> Device:
    """Traces and splits the stages; arguments as of `build_parts`."""
    parts = build_parts(stack, context, pieces=pieces, specs=specs, layers=layers, policy=policy)
    # Cells are known only now: which values wait, and how large, depends on the split layer.
    cells, lengths = parts.stage.cells(context.program)
    return cls(
      context=parts.context,
      ends=parts.ends,
      stage=parts.stage,
      weights=parts.weights,
      cells=cells,
      lengths=lengths,
      totals=parts.totals,
    )

  def start(self) -> Carry:
    """The carry before the first tick: rings and pools undefined, sums zero."""
    context, length = self.context, self.context.program.length
    x = jax.tree.leaves(context.x)
    # Gradients have the shape of the gathered weights; they are scattered once, after the loop.
    params = {**context.params, "layers": self.weights.whole()}
    sums = context.zeros(jax.tree.map(sum_type, params)) if context.training else {}
    return Carry(
      activations=context.ring(x, length("activations")),
      gradients=context.ring(float_leaves(x), length("gradients")),
      pools=self.stage.allocate(self.stage.layout, self.lengths),
      weights=context.ring(self.weights.slot(), length("weights")),
      vocabulary=context.ring({} if context.predicts else self.ends.held(), length("vocabulary")),
      flight=context.idle(x) if context.program.slack else None,
      grads=sums,
      totals=self.totals,
      outputs=self.no_outputs() if context.predicts else None,
    )

  def no_outputs(self) -> Tree:
    """Zeros in the places of the last layer's outputs, leaves `[M + 1, rows, ...]`.

    Raises:
      ValueError: an output without rows.
    """
    slots = self.context.program.schedule.microbatches + 1
    rows = len(self.context.rows)

    def zeros(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
      if leaf.shape[:1] != (rows,):
        raise ValueError(
          f"the last layer returns y{jax.tree_util.keystr(path)} of shape {leaf.shape} for a"
          f" microbatch of {rows} rows: outputs without rows cannot be put together; return"
          " [rows, ...] from it"
        )
      return jax.ShapeDtypeStruct((slots, *leaf.shape), leaf.dtype)

    y = self.stage.output(jax.tree.leaves(self.context.x))
    return self.context.zeros(jax.tree.map_with_path(zeros, y))

  def collect(self, carry: Carry, now: Now, y: Leaves) -> Carry:
    """After F: keeps the output of a microbatch that has left the last layer."""
    if CODE[Kind.F] not in now.doing.last:
      return carry
    # A write without a condition, into a slot that nobody reads where there is nothing to write:
    # XLA would copy whole a buffer that a conditional both reads and returns.
    nowhere = self.context.program.schedule.microbatches
    slot = jnp.where(now.does(Kind.F) & (now.last > 0), now.microbatch, nowhere)
    return carry._replace(outputs=rings.put(carry.outputs, self.stage.output(y), slot))

  def tick(self, carry: Carry, row: dict[str, jax.Array], doing: Doing) -> Carry:
    """Does one tick, in the steps [0] to [9] of the module's docstring.

    Args:
      carry: after the tick before.
      row: this device's row of the table, by column.
      doing: what may happen on this tick on any device, known while the program is traced.
    """
    context = self.context
    if context.probe:
      row = context.probe(START, carry, row)
    now = Now(SimpleNamespace(**row), doing)
    carry = self.gather(carry, now)  # [0]
    carry = self.ends.enter(carry, now)  # [1]
    y, carry = self.forward(carry, now)  # [2]
    if context.predicts:
      return self.send(self.collect(carry, now, y), now, y)  # [3], [9]
    carry = self.ends.leave(carry, now, y)  # [3]
    if context.training:
      carry = self.recompute(carry, now)  # [4]
      dx, carry = self.backward(carry, now)  # [5]
      carry = self.ends.back_at_input(carry, now, dx)  # [6]
      carry = self.weight_grad(carry, now)  # [7]
      # One payload serves both ways: a device makes y or dx on a tick, never both, and the table
      # of its neighbours says which of the two will arrive.
      y = self.payload(now, y, dx)
    carry = self.ends.passes(carry, now)  # [8]
    if context.probe:
      y = context.probe(END, (carry, y), y)
    elif context.blocking and CODE[Kind.W] in doing.kinds:
      # Nothing that is sent waits for W. Where a device that waits in a transfer works on nothing,
      # XLA would start the transfer first and leave W until the neighbour has come.
      y = after(carry.grads["layers"], y)
    return self.send(carry, now, y)  # [9]

  def gather(self, carry: Carry, now: Now) -> Carry:
    """G: the weights of this tick's stage, whole, into a slot of the ring `weights`."""

    def run(ring: Leaves) -> Leaves:
      return rings.put(ring, self.weights.gathered(now.chunk * self.stage.layers), now.weights)

    return carry._replace(weights=now.when([Kind.G], run, lambda same: same, carry.weights))

  def forward(self, carry: Carry, now: Now) -> tuple[Leaves, Carry]:
    """F: the stage's output. Devices that do something else return values that nobody reads."""

    def run(storage: Storage) -> tuple[Leaves, Storage]:
      x = self.ends.input(carry, now)
      # A policy may keep nothing of a layer. F then writes no pool, and a storage passed through
      # the stage's loop would only be copied.
      if not self.context.training or self.stage.layout.pools_of(Kind.F) == []:
        return self.stage.primal(self.arguments(carry, now), x), storage
      return self.stage.forward(self.arguments(carry, now), x, storage)

    return self.act(carry, now, Kind.F, run, self.context.idle(jax.tree.leaves(self.context.x)))

  def recompute(self, carry: Carry, now: Now) -> Carry:
    """R: fills the cells that F left empty, from the stage's input or from what F kept."""
    # The stage's input waits in `activations`, which R's conditional does not return: no scratch.
    if self.context.program.keeps_input:

      def from_input(storage: Storage) -> tuple[Leaves, Storage]:
        x = self.ends.input(carry, now)
        return [], self.stage.recompute_from_input(self.arguments(carry, now), x, storage)

      return self.act(carry, now, Kind.R, from_input, [])[1]

    if not self.stage.recomputes:
      return carry

    def recompute(_: Leaves, storage: Storage, made: Storage) -> tuple[Leaves, Storage]:
      return [], self.stage.recompute_from_kept(self.arguments(carry, now), storage, made)

    return self.act_through_scratch(carry, now, Kind.R, recompute, [])[1]

  def backward(self, carry: Carry, now: Now) -> tuple[Leaves, Carry]:
    """B and I: the cotangents of the stage's input. Idle devices return what nobody reads."""
    idle = self.context.idle(float_leaves(self.context.x))

    def dy() -> Leaves:
      leaves: Leaves = rings.load(carry.gradients, now.gradients)
      return leaves

    def x() -> Leaves:
      return self.ends.input(carry, now) if self.stage.rereads_input else []

    def fused(_: Leaves, grads: Tree) -> tuple[Leaves, Tree]:
      storage = Storage(self.stage.layout, carry.pools, now.cells)
      return self.stage.backward(self.arguments(carry, now), storage, x(), dy(), grads)

    # B returns the gradient sums and no pools: it frees cells and fills none.
    dx, grads = now.when([Kind.B], fused, lambda *same: same, idle, self.sums(carry))
    carry = carry._replace(grads={**carry.grads, **grads})
    # Read before the conditional: inside it, the ring would be an operand of the branch, and what
    # arrives later in the tick could not be written into it in place.
    arrived = dy() if CODE[Kind.I] in now.doing.kinds else []

    def split(_: Leaves, storage: Storage, made: Storage) -> tuple[Leaves, Storage]:
      return self.stage.input_grad(self.arguments(carry, now), storage, x(), arrived, made)

    return self.act_through_scratch(carry, now, Kind.I, split, dx)

  def weight_grad(self, carry: Carry, now: Now) -> Carry:
    """W: the gradient of the stage's weights, from what F, R and I have left in the pools."""

    def run(grads: Tree) -> Tree:
      storage = Storage(self.stage.layout, carry.pools, now.cells)
      return self.stage.weight_grad(self.arguments(carry, now), storage, grads)

    grads = now.when([Kind.W], run, lambda same: same, self.sums(carry))
    return carry._replace(grads={**carry.grads, **grads})

  def sums(self, carry: Carry) -> dict[str, Tree]:
    """The gradient sums that a stage adds to."""
    return {name: carry.grads[name] for name in self.stage.sums}

  def act(
    self,
    carry: Carry,
    now: Now,
    kind: Kind,
    run: Callable[[Storage], tuple[Leaves, Storage]],
    idle: Leaves,
  ) -> tuple[Leaves, Carry]:
    """Does an action that writes saved values, and reads none of the pools that it writes.

    Args:
      carry: before the action.
      now: the tick.
      kind: of the action; its conditional returns only the pools that such actions write.
      run: the action: given the pools, returns its leaves and the pools.
      idle: what takes the place of its leaves on a device that does something else.
    """
    written = self.stage.layout.pools_of(kind)

    def go(leaves: Leaves, pools: list[jax.Array]) -> tuple[Leaves, list[jax.Array]]:
      all_pools = _replaced(carry.pools, written, pools)
      leaves, storage = run(Storage(self.stage.layout, all_pools, now.cells))
      return leaves, [storage.pools[p] for p in written]

    # Pools that this kind of action does not write reach the branch as closure, and are not
    # returned: XLA copies only what a conditional returns.
    mine = [carry.pools[p] for p in written]
    leaves, pools = now.when([kind], go, lambda *same: same, idle, mine)
    return leaves, carry._replace(pools=_replaced(carry.pools, written, pools))

  def act_through_scratch(
    self,
    carry: Carry,
    now: Now,
    kind: Kind,
    run: Callable[[Leaves, Storage, Storage], tuple[Leaves, Storage]],
    idle: Leaves,
  ) -> tuple[Leaves, Carry]:
    """Does an action that reads saved values and writes others, maybe in the same pools.

    One conditional that did both would be given the pools and return them, and XLA would copy all
    of them whole. So the action works on a scratch of one cell a value, by one of two ways:

        scratch.before    conditional 1: pools -> scratch     what the action reads
                          conditional 2: scratch -> pools     the action
        otherwise         conditional 1: pools -> scratch     the action
                          conditional 2: scratch -> pools     what the action made

    Args:
      carry, now, kind, idle: as for `act`.
      run: the action, `run(idle, read, made)`: reads one storage and returns the other, written.
    """
    scratch = self.stage.scratch.get(kind)
    if scratch is None:  # no action of this stage reads a pool that it writes
      return self.act(carry, now, kind, lambda pools: run(idle, pools, pools), idle)
    cells, lengths = scratch.layout.one_each()
    pools = Storage(self.stage.layout, carry.pools, now.cells)
    small = self.stage.allocate(scratch.layout, lengths)
    if scratch.before:

      def fetch(small: list[jax.Array]) -> list[jax.Array]:
        return Storage(scratch.layout, small, cells).take(pools).pools

      read = Storage(scratch.layout, now.when([kind], fetch, lambda same: same, small), cells)
      return self.act(carry, now, kind, lambda made: run(idle, read, made), idle)

    def go(leaves: Leaves, small: list[jax.Array]) -> tuple[Leaves, list[jax.Array]]:
      leaves, made = run(leaves, pools, Storage(scratch.layout, small, cells))
      return leaves, made.pools

    leaves, small = now.when([kind], go, lambda *same: same, idle, small)
    made = Storage(scratch.layout, small, cells)
    return leaves, self.act(carry, now, kind, lambda pools: ([], pools.take(made)), [])[1]

  def payload(self, now: Now, y: Leaves, dx: Leaves) -> Leaves:
    """What this tick sends: y after an F, else dx in the place of its float leaves."""
    # Leaves without a gradient are sent as they are: a receiver of dx does not read them.
    gradient = with_float_leaves(y, dx)
    return [
      jnp.where(now.does(Kind.F), a, b) if a is not b else a
      for a, b in zip(y, gradient, strict=True)
    ]

  def send(self, carry: Carry, now: Now, payload: Leaves) -> Carry:
    """Sends along every route and stores what arrives.

    What arrives where the table expects nothing goes into a slot of its own, one past the used
    ones: a write without a condition is cheaper than a conditional round every write.

    With slack, what leaves now is what the tick before made, so that the transfer waits for nothing
    of this tick and runs beside its work.
    """
    activations, gradients = carry.activations, carry.gradients
    for r, route in enumerate(self.context.program.routes):
      # Only pairs that carry something on this tick. In a loop over all ticks these are all pairs
      # that ever do, since one body serves every tick.
      pairs = sorted(now.doing.pairs[r])
      if not pairs:
        continue
      arrived = payload
      if route.offset:  # else a copy within the device
        away = payload if carry.flight is None else carry.flight
        arrived = lax.ppermute(away, STAGE, pairs)
      if route.activations:
        slot = now.column(f"arriving_activation_{r}")
        activations = rings.store(activations, arrived, slot)
      if route.gradients:
        slot = now.column(f"arriving_gradient_{r}")
        gradients = rings.store(gradients, float_leaves(arrived), slot)
    flight = None if carry.flight is None else payload
    return carry._replace(activations=activations, gradients=gradients, flight=flight)

  def arguments(self, carry: Carry, now: Now) -> ActionArguments:
    """Parameters and further inputs of the layers of this tick's stage."""
    context, layers = self.context, self.stage.layers
    first, held = now.stage * layers, now.chunk * layers
    batch = context.microbatch(now.microbatch)

    def inputs(i: rings.Index) -> Tree:
      # The layer's number in the model, never in the stage or on the device: dropout is keyed by
      # it, and must be the same under every schedule. (Of a packed stack it is the stage's number,
      # which only the switch reads: its modules know their own.)
      given = dict(
        batch=batch, key=context.key, layer=first + i, microbatch=now.microbatch, rows=context.rows
      )
      if context.uniform_state:
        given["state"] = rings.get(context.uniform_state["layers"], held + i)
      return given

    def rows(i: rings.Index) -> Sequence[rings.Index]:
      return self.weights.rows(held + i, first + i)

    read = self.weights.reader(carry.weights, now.weights, rows)
    return ActionArguments(read, held, rows, inputs, self.weights.layers)


def _replaced(pools: list[jax.Array], which: list[int], new: list[jax.Array]) -> list[jax.Array]:
  """The pools, those with these numbers replaced by new ones."""
  pools = list(pools)
  for p, pool in zip(which, new, strict=True):
    pools[p] = pool
  return pools
