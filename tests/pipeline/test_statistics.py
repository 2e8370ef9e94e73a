"""Layers of one kind with running statistics keep the loop, and change them as one device does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe
from jaxpipe.parallel.sequence import take_own
from jaxpipe.parallel.tensor import enter_tensor, leave_tensor
from jaxpipe.pipeline.check import leaf_errors
from jaxpipe.pipeline.timeline import measure
from jaxpipe.stack.errors import StackError

D, B, M = 6, 16, 2
BATCH = {"x": np.random.default_rng(0).normal(size=(B, D))}
KEY = jax.random.key(0)


class Block(nnx.Module):
  """A matrix and a norm whose averages change, beside a frozen scale and a dropout of Flax."""

  def __init__(self, rngs, rate=0.2):
    self.inner = nnx.Linear(D, D, rngs=rngs, param_dtype=jnp.float64)
    self.norm = nnx.BatchNorm(D, momentum=0.7, rngs=rngs, param_dtype=jnp.float64)
    self.norm.mean[...], self.norm.var[...] = jnp.full(D, 0.1), jnp.full(D, 1.5)
    self.fixed = nnx.Variable(jnp.full(D, 1.25))
    self.drop = nnx.Dropout(rate, rngs=rngs)

  def __call__(self, x):
    return x + self.drop(jnp.tanh(self.norm(self.inner(x * self.fixed[...][None]))))


def loss(y, batch):
  return (y**2).sum(-1)


def pipeline(mesh, schedule, layers=4, **options):
  modules = [functools.partial(Block, rate=options.pop("rate", 0.2))] * layers
  return jaxpipe.pipeline(
    loss, modules, BATCH, mesh=mesh, schedule=schedule, microbatches=M, **options
  )


CASES = [
  ("1f1b", "stage:2,data:2", "dots"),
  ("zb-h1", "stage:2", "full"),
  ("zb-v", "stage:2,fsdp:2", "all"),
  ("interleaved-1f1b", "stage:2", "full"),
  ("chimera", "stage:2", "dots"),
  ("zeropp", "stage:2,fsdp:2", "dots"),
  ("1f1b with R", "stage:2", "full"),
]


@pytest.mark.sampled("name, mesh, residuals", CASES, 2)
def test_gradients_and_statistics_are_those_of_one_device(float64, name, mesh, residuals):
  name, _, recompute = name.partition(" ")
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=M, recompute=bool(recompute))
  pipe = pipeline(mesh, schedule, layers=schedule.stages)
  assert pipe.stack.uniform
  params, state = pipe.init(KEY, BATCH), pipe.init_state(KEY, BATCH)
  step = jaxpipe.pipeline_value_and_grad(
    pipe.stack, schedule, pipe.mesh, residuals=residuals, unroll="none", poison=True
  )
  (loss, _, after), grads = step(params, BATCH, KEY, state)
  one = jaxpipe.reference_value_and_grad(pipe.stack, M)
  whole = (pipe.unplace(tree) for tree in (params, state))
  (value, _, new), true = one(next(whole), BATCH, KEY, next(whole))
  np.testing.assert_allclose(loss, value, rtol=1e-12)
  errors = leaf_errors(pipe.unplace(grads), true)
  assert len(errors) == 4 and max(errors.values()) < 1e-11, errors
  close = functools.partial(np.testing.assert_allclose, rtol=1e-11)
  jax.tree.map(close, pipe.unplace(after), new)


def test_statistics_are_the_mean_of_what_microbatches_make_of_the_users_model(float64):
  pipe = pipeline("stage:2,data:2", "zb-h1", rate=0.0)
  params, state = pipe.init(KEY, BATCH), pipe.init_state(KEY, BATCH)
  made = []
  for m in range(M):
    x, model = BATCH["x"][m * B // M : (m + 1) * B // M], pipe.modules(params, state)
    for layer in model:
      layer.train()
      x = layer(x)
    made.append([(layer.norm.mean[...], layer.norm.var[...]) for layer in model])
  after = pipe.value_and_grad(params, BATCH, KEY, state)[0][2]
  got = pipe.unplace(after)["layers"]
  for i in range(4):
    for which, name in enumerate(("mean", "var")):
      want = np.mean([made[m][i][which] for m in range(M)], axis=0)
      np.testing.assert_allclose(got["norm"][name][i], want, rtol=1e-11)
  np.testing.assert_array_equal(got["fixed"], pipe.unplace(state)["layers"]["fixed"])
  # Evaluation reads the averages and changes nothing.
  value, _ = pipe.evaluate(params, BATCH, after)
  x = BATCH["x"]
  for layer in pipe.modules(params, after):
    layer.eval()
    x = layer(x)
  np.testing.assert_allclose(value, loss(x, BATCH).mean(), rtol=1e-11)


def test_microbatches_that_skip_layers_are_refused_beside_statistics(float64):
  with pytest.raises(StackError, match="skip stages, whose statistics would be of some"):
    pipeline("stage:2", "skippipe").init(KEY, BATCH)


class First(nnx.Module):
  def __call__(self, batch):
    return take_own(batch["x"])


class Hidden(nnx.Module):
  """A norm of hidden units, which `tensor` cuts, over all rows and positions."""

  def __init__(self, rngs):
    self.up = nnx.Linear(D, 8, use_bias=False, rngs=rngs, param_dtype=jnp.float64)
    self.norm = nnx.BatchNorm(8, rngs=rngs, param_dtype=jnp.float64)
    self.down = nnx.Linear(8, D, use_bias=False, rngs=rngs, param_dtype=jnp.float64)

  def __call__(self, x, context):
    h = jnp.tanh(self.norm(self.up(enter_tensor(x, False))))
    return x + leave_tensor(self.down(h), False)


class Last(nnx.Module):
  def __call__(self, x, batch):
    return jnp.sum(x**2), 1.0 * x.shape[0] * x.shape[1], {}


@pytest.mark.sampled(
  "mesh", ["stage:2,sequence:2", "stage:2,tensor:2", "stage:2,tensor:2,fsdp:2"], 1
)
def test_statistics_over_a_mesh_that_cuts_positions_or_units(float64, mesh):
  rules = jaxpipe.Rules(
    axes=frozenset({"sequence", "tensor"}),
    dims=[
      ("layers/up/kernel", (None, "mlp")),
      ("layers/down/kernel", ("mlp", None)),
      ("layers/norm/.*", ("mlp",)),
    ],
  )
  stack = jaxpipe.LayerStack(lambda rngs: First(), [Hidden] * 2, lambda rngs: Last(), rules=rules)
  assert stack.uniform
  batch = {"x": np.random.default_rng(0).normal(size=(8, 4, D))}
  schedule = jaxpipe.make_schedule("zb-h1", devices=2, microbatches=M)
  devices = jaxpipe.make_mesh(mesh)
  params, state = stack.init(KEY, batch), stack.init_state(KEY, batch)
  placed = [jaxpipe.place(tree, stack, schedule, devices) for tree in (params, state)]
  step = jaxpipe.pipeline_value_and_grad(stack, schedule, devices, unroll="none", poison=True)
  (loss, _, after), grads = step(placed[0], batch, None, placed[1])
  one = jaxpipe.reference_value_and_grad(stack, M)
  (value, _, new), true = one(params, batch, None, state)
  np.testing.assert_allclose(loss, value, rtol=1e-12)
  errors = leaf_errors(jaxpipe.unplace(grads, stack, schedule), true)
  assert len(errors) == 4 and max(errors.values()) < 1e-11, errors
  close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-14)
  jax.tree.map(close, jaxpipe.unplace(after, stack, schedule), new)
  assert jax.tree.all(
    jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), after, placed[1])
  )


class Tracked(nnx.Module):
  def __init__(self, rngs, track):
    self.track, self.seen = track, nnx.BatchStat(jnp.zeros(D))

  def __call__(self, x):
    m = x.mean(0)
    if self.track:
      self.seen[...] = m
    return x - m[None]


def test_layers_that_change_other_statistics_are_not_alike():
  """All of them changed those of the first, and the reference did so, too."""
  modules = [functools.partial(Tracked, track=track) for track in (True, False)]
  batch = {"x": BATCH["x"].astype(np.float32)}
  pipe = jaxpipe.pipeline(loss, modules, batch, mesh="stage:2", schedule="gpipe", microbatches=M)
  assert not pipe.stack.uniform


class Counts(nnx.Module):
  """Assigns whole numbers, or another shape, to a statistic that was made as floats [6]."""

  def __init__(self, rngs, made):
    self.made, self.seen = made, nnx.BatchStat(jnp.zeros(D))

  def __call__(self, x):
    self.seen.set_value(self.made(x))
    return x


@pytest.mark.parametrize("partition", [None, [1, 1]])
@pytest.mark.parametrize(
  "made, message",
  [
    (lambda x: (x > 0).sum(0), r"statistic \['seen'\] int\d+\[6\], which was float32\[6\]"),
    (lambda x: x.mean(), r"statistic \['seen'\] float32\[\], which was float32\[6\]"),
  ],
)
def test_a_statistic_of_another_kind_or_shape_is_refused(made, message, partition):
  """Whole numbers were not averaged, as floats are, and the reference averaged them."""
  batch = {"x": BATCH["x"].astype(np.float32)}
  with pytest.raises(StackError, match=message):
    jaxpipe.pipeline(
      loss, [functools.partial(Counts, made=made)] * 2, batch, mesh="stage:2", microbatches=M,
      partition=partition,
    )  # fmt: skip


def test_paths_beside_statistics_are_refused_by_the_reference(float64):
  stack = pipeline("stage:2", "gpipe").stack
  with pytest.raises(ValueError, match="paths= lets microbatches skip layers whose statistics"):
    jaxpipe.reference_value_and_grad(stack, M, paths=[(0, 1, 2, 3), (0, 3)])


def test_narrow_statistics_are_rounded_once_as_a_mean():
  """The reference rounded what every microbatch had made of them."""

  class Narrow(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.Linear(D, D, rngs=rngs)
      self.seen = nnx.BatchStat(jnp.zeros(D, jnp.bfloat16))

    def __call__(self, x):
      x = self.inner(x)
      self.seen.set_value(x.mean(0))
      return x

  batch = {"x": BATCH["x"].astype(np.float32)}
  pipe = jaxpipe.pipeline(
    loss, [Narrow] * 2, batch, mesh="stage:2", schedule="gpipe", microbatches=M
  )
  params, state = pipe.init(KEY, batch), pipe.init_state(KEY, batch)
  whole = pipe.unplace(params), pipe.unplace(state)
  made = []
  for m in range(M):
    layer, x = pipe.modules(params, state)[0], batch["x"][m * B // M : (m + 1) * B // M]
    made.append(layer.inner(x).mean(0))
  want = (sum(made) / M).astype(jnp.bfloat16)
  got = pipe.unplace(pipe.value_and_grad(params, batch, None, state)[0][2])
  one = jaxpipe.reference_value_and_grad(pipe.stack, M)(whole[0], batch, None, whole[1])[0][2]
  for after in got, one:
    np.testing.assert_array_equal(after["layers"]["seen"][0], want)


def test_actions_are_timed_of_a_stack_with_statistics():
  pipe = jaxpipe.pipeline(
    loss,
    [functools.partial(nnx.BatchNorm, D)] * 2,
    {"x": BATCH["x"].astype(np.float32)},
    mesh="stage:2",
    schedule="gpipe",
    microbatches=M,
  )
  batch = {"x": BATCH["x"].astype(np.float32)}
  params, state = pipe.init(KEY, batch), pipe.init_state(KEY, batch)
  measured = measure(
    *(pipe.stack, pipe.schedule, pipe.mesh, params, batch), state=state, steps=1, unroll="none"
  )
  assert measured.step > 0


def test_schedules_that_cannot_count_are_left_out_of_a_choice():
  """The choice ended with the first of them, which holds a stage on two devices."""

  class Counter(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.Linear(D, D, rngs=rngs)
      self.seen = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
      self.seen.set_value(self.seen[...] + 1)
      return self.inner(x)

  batch = {"x": BATCH["x"].astype(np.float32)}
  pipe = jaxpipe.pipeline(
    loss, [Counter] * 4, batch, mesh="stage:2", schedule="gpipe", microbatches=M
  )
  choice = jaxpipe.choose_schedule(pipe.stack, pipe.mesh, batch, microbatches=M)
  assert not choice.schedule.placement.replicated
  with pytest.raises(StackError, match="counts in whole numbers"):
    pipe.stack.laid_out(jaxpipe.make_schedule("chimera", devices=2, microbatches=M))
