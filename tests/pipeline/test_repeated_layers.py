"""Layers that read the same variables run as one loop, and train as the user's own objects do."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import lm
from networks.drawn import drawn

import jaxpipe
from jaxpipe.pipeline import timeline
from jaxpipe.pipeline.execution import Execution

D, LAYERS = 8, 8
KEY = jax.random.key(0)
BATCH = {"x": np.random.default_rng(0).standard_normal((8, D)), "y": np.linspace(-1, 1, 8)}


class Block(nnx.Module):
  """A norm and a matrix, either of which another block may hold as well."""

  def __init__(self, seed):
    rngs = nnx.Rngs(seed)
    self.norm = nnx.LayerNorm(D, rngs=rngs, param_dtype=jnp.float64)
    self.inner = nnx.Linear(D, D, rngs=rngs, param_dtype=jnp.float64)

  def __call__(self, x):
    return x + jnp.tanh(self.inner(self.norm(x)))


def one():
  """ALBERT: the same block eight times."""
  return [Block(0)] * LAYERS


def looped():
  """A looped transformer: four blocks, twice."""
  return [Block(i) for i in range(LAYERS // 2)] * 2


def kernels():
  """The kernel is one of two, in no regular order; norms and biases are each block's own."""
  blocks = [Block(i) for i in range(LAYERS)]
  for block, owner in zip(blocks, [0, 1, 1, 0, 0, 1, 1, 1], strict=True):
    block.inner.kernel = blocks[owner].inner.kernel
  return blocks


# Schedule, mesh, chunks of a device: both directions, gathered at each G, V places of one stage.
CASES = [
  ("1f1b", "stage:4", 1),
  ("zb-h1", "stage:2,data:2", 1),
  ("interleaved-1f1b", "stage:2,fsdp:2", 2),
  ("chimera", "stage:2", 2),
  ("zb-v", "stage:2", 2),
  ("zeropp", "stage:2,fsdp:2", 2),
]
# Whose values, and rows of kernel and bias.
SHARED = [(one, 1, 1), (looped, 4, 4), (kernels, 2, 8)]


def loss(y, batch):
  return (y.mean(-1) - batch["y"]) ** 2


def make(blocks, name, mesh, chunks=1, **options):
  schedule = jaxpipe.make_schedule(
    name, devices=int(mesh[6]), microbatches=4, **({} if chunks == 1 else {"chunks": chunks})
  )
  return jaxpipe.pipeline(
    loss, blocks, BATCH, mesh=mesh, schedule=schedule, microbatches=4, **options
  )


def mean_loss(blocks):
  x = BATCH["x"]
  for block in blocks:
    x = block(x)
  return loss(x, BATCH).mean()


# Blocks that are all the same cannot show a wrong row: the others come first.
@pytest.mark.parametrize("shared", SHARED[::-1])
@pytest.mark.sampled("name, mesh, chunks", CASES, 1)
def test_gradients_are_those_of_the_users_own_objects(float64, name, mesh, chunks, shared):
  make_blocks, *rows = shared
  blocks = make_blocks()
  pipe = make(blocks, name, mesh, chunks)
  assert pipe.stack.uniform
  params = pipe.init(KEY, BATCH)
  value, grads = pipe.value_and_grad(params, BATCH)
  grads = pipe.unplace(grads)["layers"]
  assert [len(grads["inner"][leaf]) for leaf in ("kernel", "bias")] == rows
  want_value, want = nnx.value_and_grad(mean_loss)(nnx.List(blocks))
  np.testing.assert_allclose(value[0], want_value, rtol=1e-12)
  # NNX keeps a variable where it stands first.
  each = [dict(nnx.to_flat_state(want.get(i, nnx.State({})))) for i in range(LAYERS)]
  for path in [("inner", "kernel"), ("inner", "bias"), ("norm", "scale"), ("norm", "bias")]:
    owned = [leaves[path][...] for leaves in each if path in leaves]
    np.testing.assert_allclose(grads[path[0]][path[1]], owned, rtol=0, atol=1e-12)

  again = pipe.modules(params)
  for old, new in zip(blocks, again, strict=True):
    np.testing.assert_array_equal(old.inner.kernel[...], new.inner.kernel[...])
  holders = [
    {i for i, b in enumerate(g) if b.inner.kernel is g[0].inner.kernel} for g in (blocks, again)
  ]
  assert holders[0] == holders[1] and len(holders[0]) > 1
  np.testing.assert_allclose(pipe.predict(params, BATCH), run(blocks), rtol=1e-12)


def run(blocks):
  x = BATCH["x"]
  for block in blocks:
    x = block(x)
  return x


# Each looks at whole variables, in its own way; the first also at the norm of all.
OPTIMIZERS = {
  "lamb": lambda: optax.chain(optax.clip_by_global_norm(0.01), optax.lamb(1e-2)),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
  "muon": lambda: optax.contrib.muon(1e-2),
}


@pytest.mark.sampled(
  "name, make_blocks, case",
  list(itertools.product(OPTIMIZERS, (one, looped, kernels), CASES[2:4] + CASES[5:])),
  2,
)
def test_updates_are_those_of_optax_on_the_users_variables(float64, name, make_blocks, case):
  """A norm over all parameters counts what layers share once; Lamb looks at single variables."""
  tx, blocks = OPTIMIZERS[name](), make_blocks()
  pipe = make(blocks, *case)
  params, ours = pipe.init(KEY, BATCH), pipe.optimizer(tx)
  state = ours.init(params)
  optimizer = nnx.Optimizer(nnx.List(blocks), tx, wrt=nnx.Param)
  models = nnx.List(blocks)
  for _ in range(3):
    updates, state = ours.update(pipe.value_and_grad(params, BATCH)[1], state, params)
    params = optax.apply_updates(params, updates)
    optimizer.update(models, nnx.grad(mean_loss)(models))
  for old, new in zip(blocks, pipe.modules(params), strict=True):
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (old, new)), strict=True):
      np.testing.assert_allclose(b, a, rtol=0, atol=1e-10)
  again = pipe.place(pipe.unplace(state))
  jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.sampled(
  "name, mesh",
  [("zb-h1", "stage:2,tensor:2"), ("1f1b", "stage:2,sequence:2"), ("vocabulary", "stage:2")],
  1,
)
def test_axes_inside_layers_and_a_cut_vocabulary(float64, name, mesh):
  """What only a loop over layers of one kind can be combined with."""
  stack = lm.stack(layers=4, dropout=0.2, kv_heads=2)
  ties = {**stack.tied, "layers/2": "layers/0", "layers/3": "layers/1"}
  stack = dataclasses.replace(stack, tied=ties)
  head = {"head": "sharded"} if name == "vocabulary" else {}
  name = "1f1b" if name == "vocabulary" else name
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=4, **head)
  mesh, batch = jaxpipe.make_mesh(mesh), lm.batch(8)
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, poison=True)
  params = drawn(stack)
  (got, _), grads = step(jaxpipe.place(params, stack, schedule, mesh), batch, KEY)

  # The same with a stack that ties nothing but its ends, whose layers are given their values twice.
  untied = lm.stack(layers=4, dropout=0.2, kv_heads=2)
  rows = np.array([0, 1, 0, 1])

  def twice(params):
    params = {**params, "layers": jax.tree.map(lambda leaf: leaf[rows], params["layers"])}
    return jaxpipe.reference_value_and_grad(untied, 4)(params, batch, KEY)[0][0]

  value, want = jax.value_and_grad(twice)(params)
  np.testing.assert_allclose(got, value, rtol=1e-12)
  grads = jaxpipe.unplace(grads, stack, schedule)
  for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(want), strict=True):
    atol = 1e-14 + 1e-11 * float(abs(b).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=str(path))


def test_fresh_values_are_the_owners_on_every_mesh():
  stack = lm.stack(layers=4, dtype=jnp.float32, param_dtype=jnp.float32)
  repeated = dataclasses.replace(
    stack, tied={**stack.tied, "layers/2": "layers/0", "layers/3": "layers/1"}
  )
  batch = lm.batch(4)
  want, got = stack.init(KEY, batch), repeated.init(KEY, batch)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:2], b), want["layers"], got["layers"])
  schedule, mesh = (
    jaxpipe.make_schedule("zb-v", devices=2, microbatches=4),
    jaxpipe.make_mesh("stage:2"),
  )
  placed = repeated.init(KEY, batch, schedule, mesh)
  jax.tree.map(np.testing.assert_array_equal, jaxpipe.unplace(placed, repeated, schedule), got)
  for leaf in jax.tree.leaves(placed["layers"]):
    assert leaf.sharding.is_fully_replicated


def test_they_are_split_once_and_measured(float64):
  blocks = [Block(0)] * LAYERS
  pipe = make(blocks, "1f1b", "stage:2")
  execution = Execution.of(pipe.stack, pipe.schedule, pipe.mesh)
  assert execution.inspect(BATCH, lambda device: len(device.stage.splits)) == 1
  params = pipe.init(KEY, BATCH)
  found = timeline.measure(pipe.stack, pipe.schedule, pipe.mesh, params, BATCH, steps=1)
  assert sum(map(len, found.timeline.start)) == 2 * 2 * 4


def test_a_few_ties_among_many_layers_lie_with_their_owners(float64):
  """Rows on every stage would be nearly the whole model on each."""
  blocks = [Block(i) for i in range(LAYERS)]
  blocks[5].inner.kernel = blocks[1].inner.kernel
  assert not make(blocks, "1f1b", "stage:2").stack.uniform
