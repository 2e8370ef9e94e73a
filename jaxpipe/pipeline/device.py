"""One device's side of the program: what it does on each tick.

Every device runs the same loop over the ticks of a `Program`, and does on each what its own column
of the table says. One tick:

    [1] F      x from the batch or the `activations` ring; y; what is kept goes to `residuals`
    [2] head   last stage: loss, and dy into `gradients`
    [3] B / I  dx from `residuals` and `gradients`; I leaves what W needs in `waiting`
    [4] embed  first stage: dx into the embedding's gradient
    [5] W      from `waiting`
    [6] send   y or dx to the neighbours; what arrives goes into its slot

Rules that the shape of this loop follows; each was paid for:
- A conditional returns only what it writes. A buffer that a branch both reads and returns is copied
  whole, every tick, by the TPU compiler.
- `ppermute` stands outside every branch: inside one it waits for devices that took another.
- The loop is never differentiated: F, I and W are explicit.
- Parameters are cast to *varying* once, so that gradients stay local and are reduced once a step.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline import rings
from jaxpipe.pipeline.program import CODE, Program
from jaxpipe.pipeline.residuals import Residuals
from jaxpipe.pipeline.rings import wide
from jaxpipe.pipeline.split import float_leaves, is_float, with_float_leaves
from jaxpipe.pipeline.stage import Call, Stage, cut_stack
from jaxpipe.schedules import Kind

Tree = Any


class Totals(NamedTuple):
  """Sums over the microbatches that this device has finished."""

  loss: jax.Array
  weight: jax.Array
  metrics: Tree


class State(NamedTuple):
  """What the loop carries: the rings, and the sums. `grads` is empty in evaluation."""

  activations: Tree
  gradients: Tree
  residuals: Tree
  waiting: Tree
  grads: dict[str, Tree]
  totals: Totals


@dataclasses.dataclass(frozen=True)
class Device:
  """One device's side of the program; every method is traced inside `shard_map`.

  Attributes:
    stack, program, axes, poison: see `pipeline_value_and_grad`.
    params: this device's, varying over all axes; the head's with tied leaves.
    batch: leaves [M, rows, ...]; key, rows: for dropout.
    stage: the actions of one stage.
    layers: layers in a stage.
    training: False where only forwards run.
    x: stand-in of the activation that travels between stages; only its type is ever used.
    totals: zeros of the right types.
  """

  stack: Any
  program: Program
  axes: tuple[str, ...]
  poison: bool
  params: Tree
  batch: Tree
  key: jax.Array | None
  rows: jax.Array
  stage: Stage
  layers: int
  training: bool
  x: Tree
  totals: Totals

  @classmethod
  def build(
    cls,
    stack: Any,
    program: Program,
    layers: int,
    policy: Residuals | None,
    poison: bool,
    axes: tuple[str, ...],
    params: Tree,
    batch: Tree,
    key: jax.Array | None,
    rows: jax.Array,
  ) -> Device:
    """Traces one layer, cuts it, and finds the types of all that travels."""
    zeros = lambda tree: rings.vary(  # noqa: E731
      jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree), axes
    )
    one = rings.get(batch, 0)
    with rings.explain_varying("embed"):
      x = zeros(jax.eval_shape(stack.apply_embed, params["embed"], one))
    with rings.explain_varying("head"):
      loss, (weight, metrics) = jax.eval_shape(stack.apply_head, params["head"], x, one)
    sums = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wide(leaf.dtype))  # noqa: E731
    totals = Totals(*zeros(jax.tree.map(sums, (loss, weight, metrics))))
    training = policy is not None
    inputs = dict(batch=one, key=key, layer=rows[0], microbatch=rows[0], rows=rows)
    allocate = lambda shapes, slots: rings.allocate(shapes, slots, axes, poison)  # noqa: E731
    layer = rings.get(params["layers"], 0)
    stage = cut_stack(stack, layer, inputs, x, layers, policy, allocate, axes)
    return cls(
      stack, program, axes, poison, params, batch, key, rows, stage, layers, training, x, totals
    )

  def start(self) -> State:
    """The loop's state before the first tick."""
    ring = {
      name: self.stage.allocate(shapes, self.program.length(name))
      for name, shapes in self.stage.slots(jax.tree.leaves(self.x)).items()
    }
    zero = lambda p: jnp.zeros(p.shape, wide(p.dtype))  # noqa: E731
    grads = rings.vary(jax.tree.map(zero, self.params), self.axes) if self.training else {}
    return State(**ring, grads=grads, totals=self.totals)

  def tick(self, state: State, row: dict[str, jax.Array]) -> tuple[State, None]:
    """Does one tick; the numbers are those of the module's docstring."""
    now = SimpleNamespace(**row)
    y, state = self.forward(state, now)  # [1]
    state = self.head(state, now, y)  # [2]
    if self.training:
      dx, state = self.backward(state, now)  # [3]
      state = self.embed_grad(state, now, dx)  # [4]
      state = self.weight_grad(state, now)  # [5]
      # y and dx are never sent on one tick, and a neighbour knows from its table which it gets.
      dx = with_float_leaves(y, dx)
      y = jax.tree.map(lambda a, b: jnp.where(self.doing(now, Kind.F), a, b), y, dx)
    return self.send(state, now, y), None  # [6]

  def forward(self, state: State, now: SimpleNamespace) -> tuple[Tree, State]:
    """F. Idle devices return something that nobody reads."""

    def run(residuals: Tree) -> tuple[Tree, Tree]:
      x = lax.cond(
        now.stage == 0,
        lambda: rings.vary(jax.tree.leaves(self.embed(self.params["embed"], now)), self.axes),
        lambda: rings.get(state.activations, now.activations),
      )
      if not self.training:
        return self.stage.primal(self.call(now), x), residuals
      return self.stage.forward(self.call(now), x, residuals, now.residuals)

    y, residuals = lax.cond(
      self.doing(now, Kind.F),
      run,
      lambda r: (self.idle(jax.tree.leaves(self.x)), r),
      state.residuals,
    )
    y = jax.tree.unflatten(jax.tree.structure(self.x), y)
    return y, state._replace(residuals=residuals)

  def head(self, state: State, now: SimpleNamespace, y: Tree) -> State:
    """The loss of a microbatch that has left the last stage, and where its backward begins."""
    batch = rings.get(self.batch, now.microbatch)
    last = self.doing(now, Kind.F) & (now.stage == self.program.stages - 1)

    def loss(params: Tree, floats: list[jax.Array]) -> Any:
      with rings.explain_varying("head"):
        return self.stack.apply_head(params, with_float_leaves(y, floats), batch)

    def evaluate(totals: Totals) -> Totals:
      return self.count(totals, *loss(self.params["head"], float_leaves(y)))

    def train(totals: Totals, grads: Tree, ring: Tree) -> tuple[Totals, Tree, Tree]:
      (value, aux), (dp, dy) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        self.params["head"], float_leaves(y)
      )
      grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, dp)
      return self.count(totals, value, aux), grads, rings.put(ring, dy, now.gradients)

    if not self.training:
      return state._replace(totals=lax.cond(last, evaluate, lambda t: t, state.totals))
    totals, grads, ring = lax.cond(
      last, train, lambda *same: same, state.totals, state.grads["head"], state.gradients
    )
    return state._replace(totals=totals, gradients=ring, grads={**state.grads, "head": grads})

  def backward(self, state: State, now: SimpleNamespace) -> tuple[list[jax.Array], State]:
    """B and I: the gradient of the stage's input. Idle devices return what nobody reads."""
    dx = self.idle(float_leaves(self.x))
    dy = lambda: rings.get(state.gradients, now.gradients)  # noqa: E731
    if Kind.B in self.program.kinds:
      dx, grads = lax.cond(
        self.doing(now, Kind.B),
        lambda _, g: self.stage.backward(self.call(now), state.residuals, now.residuals, dy(), g),
        lambda *same: same,
        *(dx, state.grads["layers"]),
      )
      state = state._replace(grads={**state.grads, "layers": grads})
    if Kind.I in self.program.kinds:
      dx, waiting = lax.cond(
        self.doing(now, Kind.I),
        lambda _, ring: self.stage.input_grad(
          self.call(now), state.residuals, now.residuals, dy(), ring, now.waiting
        ),
        lambda *same: same,
        *(dx, state.waiting),
      )
      state = state._replace(waiting=waiting)
    return dx, state

  def weight_grad(self, state: State, now: SimpleNamespace) -> State:
    """W: the gradient of the stage's weights, from what I left."""
    if Kind.W not in self.program.kinds:
      return state
    grads = lax.cond(
      self.doing(now, Kind.W),
      lambda g: self.stage.weight_grad(self.call(now), state.waiting, now.waiting, g),
      lambda g: g,
      state.grads["layers"],
    )
    return state._replace(grads={**state.grads, "layers": grads})

  def embed_grad(self, state: State, now: SimpleNamespace, dx: list[jax.Array]) -> State:
    """The embedding's gradient, where dx is that of the first stage's input."""

    def run(grads: Tree) -> Tree:
      def outputs(params: Tree) -> list[jax.Array]:
        # A leaf that does not depend on the parameters has a cotangent like every other.
        return float_leaves(rings.vary(self.embed(params, now), self.axes))

      _, back = jax.vjp(outputs, self.params["embed"])
      return jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, back(dx)[0])

    at_input = self.doing(now, Kind.B, Kind.I) & (now.stage == 0)
    grads = lax.cond(at_input, run, lambda g: g, state.grads["embed"])
    return state._replace(grads={**state.grads, "embed": grads})

  def send(self, state: State, now: SimpleNamespace, payload: Tree) -> State:
    """Sends `payload` along every route and stores what arrives; "nowhere" is a slot of its own."""
    activations, gradients = state.activations, state.gradients
    for r, route in enumerate(self.program.routes):
      here = payload
      if route.offset:
        here = lax.ppermute(payload, STAGE, route.pairs)
      if route.activations:
        slot = getattr(now, f"arriving_activation_{r}")
        activations = rings.put(activations, jax.tree.leaves(here), slot)
      if route.gradients:
        slot = getattr(now, f"arriving_gradient_{r}")
        gradients = rings.put(gradients, float_leaves(here), slot)
    return state._replace(activations=activations, gradients=gradients)

  def doing(self, now: SimpleNamespace, *kinds: Kind) -> jax.Array:
    """Whether this device's action on this tick is one of `kinds`."""
    found = [now.kind == CODE[kind] for kind in kinds if kind in self.program.kinds]
    return jnp.stack(found).any() if found else rings.vary(jnp.array(False), self.axes)

  def embed(self, params: Tree, now: SimpleNamespace) -> Tree:
    """The stack's input for this tick's microbatch."""
    with rings.explain_varying("embed"):
      return self.stack.apply_embed(params, rings.get(self.batch, now.microbatch))

  def call(self, now: SimpleNamespace) -> Call:
    """Arguments of this tick's action on the stage's layers."""
    first = now.stage * self.layers
    batch = rings.get(self.batch, now.microbatch)

    def inputs(i: rings.Index) -> Tree:
      return dict(
        batch=batch, key=self.key, layer=first + i, microbatch=now.microbatch, rows=self.rows
      )

    return Call(self.params["layers"], now.chunk * self.layers, inputs)

  def count(self, totals: Totals, loss: jax.Array, aux: tuple[jax.Array, Tree]) -> Totals:
    """Adds one microbatch's sums."""
    new = (loss, *aux)
    return Totals(*jax.tree.map(lambda a, b: a + b.astype(a.dtype), tuple(totals), new))

  def idle(self, like: list[jax.Array]) -> list[jax.Array]:
    """What a device that does nothing sends: zeros, or NaN under `poison`."""
    fill = jnp.nan if self.poison else 0

    def blank(leaf: jax.Array) -> jax.Array:
      return jnp.full(leaf.shape, fill if is_float(leaf) else 0, leaf.dtype)

    return rings.vary([blank(leaf) for leaf in like], self.axes)
