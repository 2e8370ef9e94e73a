"""One device's side of the program: what it does on each tick.

Every device runs the same loop over the ticks of a `Program`, and does on each what its own column
of the table says. One tick:

    [0] gather where weights are cut over `fsdp`: those of a stage, into a slot of `weights`
    [1] enter  where the vocabulary is sharded: the embedding's shards meet
    [2] F      y, from the stage's input; what is kept goes to its cells
    [3] leave  at the last stage: loss, and, where the head is apart, dy into `gradients` or y to
               the head's shards
    [4] R      what F dropped
    [5] B / I  dx; I leaves what W waits for in cells that it may just have freed
    [6] back   at the first stage: dx into the embedding's gradient
    [7] W      from the cells
    [8] S / T  the head on a shard of the vocabulary; after the last S, loss and dy
    [9] send   y or dx to the neighbours; what arrives goes into its slot

Rules that the shape of this loop follows; each was paid for:
- A conditional returns only what it writes.
- `ppermute` stands outside every branch: inside one it waits for devices that took another.
- The loop is never differentiated: F, I and W are explicit.
- Parameters are cast to *varying* once, so that gradients stay local and are reduced once a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.parallel.placing import gather_fsdp
from jaxpipe.pipeline.device.context import Carry, DeviceContext, Now, Totals
from jaxpipe.pipeline.device.looped_stage import ActionArguments, LoopedStage, cut_stack
from jaxpipe.pipeline.device.order import after
from jaxpipe.pipeline.device.probe import END, START
from jaxpipe.pipeline.device.sharded_ends import ShardedEnds
from jaxpipe.pipeline.device.switched_stages import PackedEnds, SwitchedStages, cut_stages
from jaxpipe.pipeline.device.weights import Weights
from jaxpipe.pipeline.device.whole_ends import InnerEnds, WholeEnds
from jaxpipe.pipeline.layer.equations import lenient
from jaxpipe.pipeline.layer.floats import float_leaves, with_float_leaves
from jaxpipe.pipeline.layer.residuals import Residuals
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.pools import Storage
from jaxpipe.pipeline.storage.rings import Tree, wide
from jaxpipe.pipeline.table.program import CODE, Doing
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Device:
  """One device's side of the program; every method is traced inside `shard_map`.

  Attributes:
    local: what it knows.
    ends: embedding and head.
    stage: the actions of one stage.
    weights: the parameters that they read.
    lengths: cells of each pool.
    totals: zeros of the right types.
  """

  local: DeviceContext
  ends: WholeEnds | ShardedEnds
  stage: LoopedStage | SwitchedStages
  weights: Weights
  lengths: tuple[int, ...]
  totals: Totals

  @classmethod
  def build(
    cls, local: DeviceContext, pieces: Tree, specs: Tree, layers: int, policy: Residuals | None
  ) -> tuple[Device, Any]:
    """Traces a stage, cuts it, and finds the types of all that travels.

    Args:
      local: the device, as yet without an `x`.
      pieces, specs: parameters of the device's layers, and how they lie.
      layers: of a stage.
      policy: what F keeps; None where only forwards run.

    Returns:
      The device, and the table of cells, int32 [ticks, P, values].
    """
    uniform = local.stack.uniform
    build = _layers_alike if uniform else _unlike_stages
    local, stage, weights = build(local, pieces, specs, layers, policy)
    one = rings.get(local.batch, 0)
    sums = jax.eval_shape(lenient(local.stack.apply_head), local.params["head"], local.x, one)
    totals = Totals(sums[0], *sums[1])
    cells, lengths = stage.cells(local.program)
    totals = local.zeros(jax.tree.map(_sum_type, totals))
    whole = WholeEnds if uniform else InnerEnds
    ends = ShardedEnds if local.program.schedule.vocabulary else whole
    return cls(local, ends(local), stage, weights, lengths, totals), cells

  def start(self) -> Carry:
    """The loop's state before the first tick."""
    local, length = self.local, self.local.program.length
    x = jax.tree.leaves(local.x)
    ring = lambda shapes, name: rings.allocate(  # noqa: E731
      shapes, length(name), local.axes, local.poison
    )
    params = {**local.params, "layers": self.weights.whole()}
    sums = local.zeros(jax.tree.map(_sum_type, params)) if local.training else {}
    return Carry(
      activations=ring(x, "activations"),
      gradients=ring(float_leaves(x), "gradients"),
      pools=self.stage.allocate(self.stage.layout.pools, self.lengths),
      weights=ring(self.weights.slot(), "weights"),
      vocabulary=ring(self.ends.held(), "vocabulary"),
      flight=local.idle(x) if local.program.slack else None,
      grads=sums,
      totals=self.totals,
    )

  def tick(self, state: Carry, row: dict[str, jax.Array], doing: Doing) -> Carry:
    """Does one tick; the numbers are those of the module's docstring."""
    if self.local.probe:
      row = self.local.probe(START, state, row)
    now = Now(SimpleNamespace(**row), doing)
    state = self.gather(state, now)  # [0]
    state = self.ends.enter(state, now)  # [1]
    y, state = self.forward(state, now)  # [2]
    state = self.ends.leave(state, now, y)  # [3]
    if self.local.training:
      state = self.recompute(state, now)  # [4]
      dx, state = self.backward(state, now)  # [5]
      state = self.ends.back_at_input(state, now, dx)  # [6]
      state = self.weight_grad(state, now)  # [7]
      # y and dx are never sent on one tick, and a neighbour knows from its table which it gets.
      y = self.payload(now, y, dx)
    state = self.ends.passes(state, now)  # [8]
    if self.local.probe:
      y = self.local.probe(END, (state, y), y)
    elif self.local.blocking and CODE[Kind.W] in doing.kinds:
      # Nothing that is sent waits for W, and a device that waits in a transfer works on nothing.
      y = after(state.grads["layers"], y)
    return self.send(state, now, y)  # [9]

  def gather(self, state: Carry, now: Now) -> Carry:
    """G: the weights of a stage."""

    def run(ring: Leaves) -> Leaves:
      return rings.put(ring, self.weights.gathered(now.chunk * self.stage.layers), now.weights)

    return state._replace(weights=now.when([Kind.G], run, lambda same: same, state.weights))

  def forward(self, state: Carry, now: Now) -> tuple[Leaves, Carry]:
    """F. Idle devices return something that nobody reads."""

    def run(storage: Storage) -> tuple[Leaves, Storage]:
      x = self.ends.input(state, now)
      if not self.local.training or self.stage.layout.pools_of(Kind.F) == []:
        return self.stage.primal(self.call(state, now), x), storage
      return self.stage.forward(self.call(state, now), x, storage)

    return self.act(state, now, Kind.F, run, self.local.idle(jax.tree.leaves(self.local.x)))

  def recompute(self, state: Carry, now: Now) -> Carry:
    """R: fills the cells that F left empty."""
    if self.local.program.keeps_input:

      def forward(storage: Storage) -> tuple[Leaves, Storage]:
        x = self.ends.input(state, now)
        return [], self.stage.remake(self.call(state, now), x, storage)

      return self.act(state, now, Kind.R, forward, [])[1]

    if not self.stage.recomputes:
      return state

    def run(_: Leaves, storage: Storage, made: Storage) -> tuple[Leaves, Storage]:
      return [], self.stage.recompute(self.call(state, now), storage, made)

    return self.act_apart(state, now, Kind.R, run, [])[1]

  def backward(self, state: Carry, now: Now) -> tuple[Leaves, Carry]:
    """B and I: the gradient of the stage's input. Idle devices return what nobody reads."""
    idle = self.local.idle(float_leaves(self.local.x))
    dy = lambda: rings.load(state.gradients, now.gradients)  # noqa: E731
    x = lambda: self.ends.input(state, now) if self.stage.rereads_input else []  # noqa: E731

    def fused(_: Leaves, grads: Tree) -> tuple[Leaves, Tree]:
      storage = Storage(self.stage.layout, state.pools, now.cells)
      return self.stage.backward(self.call(state, now), storage, x(), dy(), grads)

    dx, grads = now.when([Kind.B], fused, lambda *same: same, idle, self.sums(state))
    state = state._replace(grads={**state.grads, **grads})
    # Read outside the branch: what arrives later in the tick is then written in place.
    sliced = dy() if CODE[Kind.I] in now.doing.kinds else []

    def split(_: Leaves, storage: Storage, made: Storage) -> tuple[Leaves, Storage]:
      return self.stage.input_grad(self.call(state, now), storage, x(), sliced, made)

    return self.act_apart(state, now, Kind.I, split, dx)

  def weight_grad(self, state: Carry, now: Now) -> Carry:
    """W: the gradient of the stage's weights, from what I left."""

    def run(grads: Tree) -> Tree:
      storage = Storage(self.stage.layout, state.pools, now.cells)
      return self.stage.weight_grad(self.call(state, now), storage, grads)

    grads = now.when([Kind.W], run, lambda same: same, self.sums(state))
    return state._replace(grads={**state.grads, **grads})

  def sums(self, state: Carry) -> dict[str, Tree]:
    """The gradients that a stage adds to."""
    return {name: state.grads[name] for name in self.stage.sums}

  def act(
    self,
    state: Carry,
    now: Now,
    kind: Kind,
    run: Callable[[Storage], tuple[Leaves, Storage]],
    idle: Leaves,
  ) -> tuple[Leaves, Carry]:
    """Does `run(storage)` where the tick is of this kind; the branch returns what it writes."""
    written = self.stage.layout.pools_of(kind)

    def go(leaves: Leaves, pools: list[jax.Array]) -> tuple[Leaves, list[jax.Array]]:
      all_pools = _replaced(state.pools, written, pools)
      leaves, storage = run(Storage(self.stage.layout, all_pools, now.cells))
      return leaves, [storage.pools[p] for p in written]

    mine = [state.pools[p] for p in written]
    leaves, pools = now.when([kind], go, lambda *same: same, idle, mine)
    return leaves, state._replace(pools=_replaced(state.pools, written, pools))

  def act_apart(
    self,
    state: Carry,
    now: Now,
    kind: Kind,
    run: Callable[[Leaves, Storage, Storage], tuple[Leaves, Storage]],
    idle: Leaves,
  ) -> tuple[Leaves, Carry]:
    """The same for `run(idle, storage, made)`, which reads one storage and writes the other.

    Both are the pools, and a branch that read and returned them would be two copies of them: one
    of both is scratch, and a branch of its own moves what lies there; see `Scratch`.
    """
    apart = self.stage.apart.get(kind)
    if apart is None:  # what the action writes it does not read
      return self.act(state, now, kind, lambda pools: run(idle, pools, pools), idle)
    cells, lengths = apart.layout.one_each()
    pools = Storage(self.stage.layout, state.pools, now.cells)
    scratch = self.stage.allocate(apart.layout.pools, lengths)
    if apart.before:

      def fetch(scratch: list[jax.Array]) -> list[jax.Array]:
        return Storage(apart.layout, scratch, cells).take(pools).pools

      read = Storage(apart.layout, now.when([kind], fetch, lambda same: same, scratch), cells)
      return self.act(state, now, kind, lambda made: run(idle, read, made), idle)

    def go(leaves: Leaves, scratch: list[jax.Array]) -> tuple[Leaves, list[jax.Array]]:
      leaves, made = run(leaves, pools, Storage(apart.layout, scratch, cells))
      return leaves, made.pools

    leaves, scratch = now.when([kind], go, lambda *same: same, idle, scratch)
    made = Storage(apart.layout, scratch, cells)
    return leaves, self.act(state, now, kind, lambda pools: ([], pools.take(made)), [])[1]

  def payload(self, now: Now, y: Leaves, dx: Leaves) -> Leaves:
    """What this tick sends: y, or dx in its place."""
    gradient = with_float_leaves(y, dx)
    return [
      jnp.where(now.does(Kind.F), a, b) if a is not b else a
      for a, b in zip(y, gradient, strict=True)
    ]

  def send(self, state: Carry, now: Now, payload: Leaves) -> Carry:
    """Sends along every route and stores what arrives; "nowhere" is a slot of its own.

    With slack, what leaves now is what the tick before made: nothing of this tick waits for it.
    """
    activations, gradients = state.activations, state.gradients
    for r, route in enumerate(self.local.program.routes):
      pairs = sorted(now.doing.pairs[r])
      if not pairs:
        continue
      here = payload
      if route.offset:
        away = payload if state.flight is None else state.flight
        here = lax.ppermute(away, STAGE, pairs)
      if route.activations:
        activations = rings.store(activations, here, getattr(now, f"arriving_activation_{r}"))
      if route.gradients:
        slot = getattr(now, f"arriving_gradient_{r}")
        gradients = rings.store(gradients, float_leaves(here), slot)
    flight = None if state.flight is None else payload
    return state._replace(activations=activations, gradients=gradients, flight=flight)

  def call(self, state: Carry, now: Now) -> ActionArguments:
    """Arguments of this tick's action on the stage's layers."""
    local, layers = self.local, self.stage.layers
    first, held = now.stage * layers, now.chunk * layers
    batch = local.microbatch(now.microbatch)

    def inputs(i: rings.Index) -> Tree:
      return dict(
        batch=batch, key=local.key, layer=first + i, microbatch=now.microbatch, rows=local.rows
      )

    read = self.weights.reader(state.weights, now.weights, held)
    return ActionArguments(read, held, inputs, self.weights.layers)


def _layers_alike(
  local: DeviceContext, pieces: Tree, specs: Tree, layers: int, policy: Residuals | None
) -> tuple[DeviceContext, LoopedStage, Weights]:
  """The stage of a uniform stack; arguments as of `Device.build`."""
  local = _with_x(local)
  layer = jax.eval_shape(lambda: rings.get(gather_fsdp(specs, pieces), 0))

  def allocate(shapes: Any, lengths: Any) -> list[jax.Array]:
    return [
      rings.allocate(shape, n, local.axes, local.poison)
      for shape, n in zip(shapes, lengths, strict=True)
    ]

  stage = cut_stack(
    *(local.stack, layer, _inputs(local), local.x, layers, policy, allocate),
    recompute=Kind.R in local.program.kinds,
    # On TPU, XLA then computes the attention of I more than once: a third more cycles.
    fetch=local.blocking,
  )
  # All are gathered now, but where the schedule gathers: then only those that W reads.
  leaves = jax.tree.leaves(layer)
  later = [False for _ in leaves]
  if local.program.gathers:
    later = [not read for read in stage.split.weight_grad.reads_given(leaves)]
  return local, stage, Weights.of(pieces, specs, later, layers)


def _unlike_stages(
  local: DeviceContext, pieces: Tree, specs: Tree, layers: int, policy: Residuals | None
) -> tuple[DeviceContext, SwitchedStages, Weights]:
  """All stages of a packed stack, whose weights are gathered now."""
  weights = Weights.of(pieces, specs, [False for _ in jax.tree.leaves(pieces)], layers)
  shared = local.vary(local.stack.shared(weights.layers))
  stages = cut_stages(
    *(local.stack, local, weights.layers, shared, _inputs(local), policy),
    recompute=Kind.R in local.program.kinds,
  )
  ends = PackedEnds(stages.boundaries[-1], stages.widths)
  local = dataclasses.replace(local, stack=ends, params={**local.params, "shared": shared})
  return _with_x(local), stages, weights


def _with_x(local: DeviceContext) -> DeviceContext:
  """The device, knowing what travels between stages."""
  one = rings.get(local.batch, 0)
  x = jax.eval_shape(lenient(local.stack.apply_embed), local.params["embed"], one)
  return dataclasses.replace(local, x=local.zeros(x))


def _inputs(local: DeviceContext) -> Tree:
  """Stand-ins of a layer's further inputs."""
  one, rows = rings.get(local.batch, 0), local.rows
  return dict(batch=one, key=local.key, layer=rows[0], microbatch=rows[0], rows=rows)


def _sum_type(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, wide(leaf.dtype))


def _replaced(pools: list[jax.Array], which: list[int], new: list[jax.Array]) -> list[jax.Array]:
  pools = list(pools)
  for p, pool in zip(which, new, strict=True):
    pools[p] = pool
  return pools
