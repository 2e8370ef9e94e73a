"""Random numbers of layers that others wrote: the same on every mesh, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxpipe
from jaxpipe.stack.module.row_keys import row_key
from jaxpipe.stack.stack import LayerStack, StackError

B, D = 8, 6
BATCH = {"x": np.random.default_rng(0).normal(size=(B, D)).astype(np.float32)}
KEY = jax.random.key(3)


def loss(y, batch):
  return (y**2).sum(-1)


class Stored(nnx.Module):
  """Two dropouts that share one stream, and one whose masks are alike for all rows."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(D, D, rngs=rngs)
    self.one = nnx.Dropout(0.5, rngs=rngs)
    self.alike = nnx.Dropout(0.3, broadcast_dims=(0,), rngs=rngs)

  def __call__(self, x):
    return self.alike(self.one(self.inner(self.one(x))))


class Linen(nn.Module):
  """Dropout and noise by `make_rng`, inside `nn.remat`, under a flag."""

  @nn.compact
  def __call__(self, x, deterministic):
    def noisy(self, x):
      x = nn.Dropout(0.4)(nn.Dense(D)(x), deterministic=deterministic)
      return x if deterministic else x + jax.random.normal(self.make_rng("noise"), x.shape)

    return nn.remat(noisy)(self, x)


def given(x, context):
  """Draws from a key of its context, in a scan."""
  if context.key is None:
    return x
  keys = jax.random.split(context.key, 2)
  return jax.lax.scan(lambda x, key: (x + jax.random.normal(key, x.shape), None), x, keys)[0]


MODULES = (Stored, Linen(), given, functools.partial(Stored))


@pytest.mark.parametrize("schedule, mesh", [("zb-v", "stage:2,data:2"), ("gpipe", "stage:2")])
def test_masks_of_any_layer_are_those_of_one_device(schedule, mesh):
  """All shards of a microbatch drew one mask for rows that differ."""
  pipe = jaxpipe.pipeline(loss, MODULES, BATCH, mesh=mesh, schedule=schedule, microbatches=2)
  report = pipe.check(BATCH)
  assert report.ok, str(report)
  params = pipe.init(KEY, BATCH)
  first, second, _, fourth = pipe.modules(params)
  for module in first, fourth:
    module.eval()
  want = fourth(Linen().apply(second, first(BATCH["x"]), True))
  np.testing.assert_allclose(pipe.predict(params, BATCH), want, rtol=1e-5)


def masks(rows, module=Stored, key=KEY):
  """Where a layer's output for ones is zero, for some rows of a batch."""
  stack = LayerStack.from_modules([module], loss=loss, batch=BATCH)
  params = stack.network.specs["layers/0"].init(KEY)[0]
  inputs = dict(batch=BATCH, key=key, microbatch=jnp.int32(1), rows=jnp.asarray(rows))
  x = jnp.ones((len(rows), D))
  return np.asarray(stack.network.call("layers/0", params, {}, x, True, inputs)[0] == 0)


class Once(nnx.Module):
  def __init__(self, rngs):
    self.drop = nnx.Dropout(0.4, rngs=rngs)

  def __call__(self, x):
    return self.drop(x)


@pytest.mark.smoke
def test_rows_draw_by_their_number_and_at_the_rate_that_was_given():
  whole = masks(range(8), Once)
  np.testing.assert_array_equal(masks([5, 6, 7], Once), whole[5:])
  assert (whole[0] != whole[1]).any() and (masks(range(8), Once, jax.random.key(4)) != whole).any()
  many = jax.random.bernoulli(row_key(KEY, jnp.arange(400)), 0.4, (400, 100))
  assert abs(float(many.mean()) - 0.4) < 0.01
  assert abs(float(np.corrcoef(np.asarray(many, float))[np.triu_indices(400, 1)].mean())) < 0.01


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_any_implementation_draw_alike_for_the_same_rows(impl):
  key = jax.random.key(3, impl=impl)
  np.testing.assert_array_equal(masks([2, 3], Once, key), masks(range(8), Once, key)[2:4])


def test_a_dim_that_is_as_large_as_the_rows_by_chance_is_drawn_once():
  """A mask of features [6] was drawn by rows where a device had six rows, and once elsewhere."""

  def layer(x, context):
    keep = jax.random.bernoulli(context.key, 0.5, (D,))
    return x * jax.random.bernoulli(context.key, 0.5, x.shape) * keep[None]

  six, four = masks(range(6), layer), masks(range(4), layer)
  np.testing.assert_array_equal(six[:4], four)


def test_a_mask_for_all_rows_beside_one_for_each_of_a_single_row_is_refused_at_once():
  """Both have the shape [1, 6] where a device has one row, and would be drawn in the same way."""
  with pytest.raises(StackError, match=r"shape \[1, 6\] for all rows at once.*device's 1 rows"):
    jaxpipe.pipeline(loss, [Stored], BATCH, mesh="stage:1,data:4", microbatches=2)
  assert masks([3], Once).shape == (1, D)  # a single row is no obstacle by itself


class ByFeature(nnx.Module):
  """Draws a mask of features, and one for each row, from streams that it keeps."""

  def __init__(self, rngs):
    self.rngs = rngs.fork()
    self.drop = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.drop(x) * jax.random.bernoulli(self.rngs.noise(), 0.5, (D,))[None]


def test_a_stream_that_is_kept_draws_features_once_too():
  """Keys of streams were made before it was known which of their draws have rows."""
  np.testing.assert_array_equal(masks(range(6), ByFeature)[:4], masks(range(4), ByFeature))


REFUSED = [
  (
    lambda x, context: x + jax.random.normal(context.key, (x.size,)).reshape(x.shape),
    "rows as first",
  ),
  (lambda x: nnx.Dropout(0.5)(x, rngs=nnx.Rngs(0)), "a key of its own making"),
]


def test_rows_that_are_not_the_first_dim_of_x_are_noticed():
  """X was taken to have its rows in front: a mask of [time, rows, ...] counted as drawn once."""
  batch = {"x": np.ones((3, 5, D), np.float32)}
  drop = lambda x, context: x * jax.random.bernoulli(context.key, 0.5, x.shape)  # noqa: E731
  swap = lambda x: x.swapaxes(0, 1)  # noqa: E731
  for modules in ([swap, drop, swap], [drop, swap, drop, swap]):
    with pytest.raises(StackError, match=r"of shape \(5, 3, 6\) for 3 rows and \(5, 4, 6\) for 4"):
      LayerStack.from_modules(modules, loss=lambda y, b: y.sum((1, 2)), batch=batch)


def test_draws_in_the_loss_are_refused():
  def noisy(y, batch):
    return (y * jax.random.bernoulli(jax.random.key(0), 0.5, y.shape)).sum(-1)

  with pytest.raises(StackError, match="loss draws random numbers for its rows from a key of its"):
    LayerStack.from_modules([nn.Dense(2)], loss=noisy, batch=BATCH)


def test_streams_come_back_as_they_were_given():
  """All dropouts came back with one key, and drew alike."""
  given = [nnx.Dropout(0.5, rngs=nnx.Rngs(seed)) for seed in (5, 6)]
  pipe = jaxpipe.pipeline(
    loss, [*given, nn.Dense(2)], BATCH, mesh="stage:2", schedule="gpipe", microbatches=2
  )
  for old, new in zip(given, pipe.modules(pipe.init(KEY, BATCH)), strict=False):
    np.testing.assert_array_equal(new(BATCH["x"]), old(BATCH["x"]))


@pytest.mark.parametrize("layer, said", REFUSED)
def test_draws_that_would_depend_on_the_mesh_are_refused(layer, said):
  with pytest.raises(StackError, match=said):
    LayerStack.from_modules([layer], loss=loss, batch=BATCH)


def test_streams_that_draw_nothing_are_no_obstacle():
  """`nnx.RNN` keeps a stream for the zeros of its carry."""
  batch = {"x": np.ones((4, 5, D), np.float32)}
  rnn = nnx.RNN(nnx.GRUCell(D, D, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(0))
  modules = [rnn, lambda x: x[:, -1], nnx.Dropout(0.0, rngs=nnx.Rngs(0)), nn.Dense(2)]
  pipe = jaxpipe.pipeline(loss, modules, batch, mesh="stage:2", schedule="1f1b", microbatches=2)
  params = pipe.init(KEY, batch)

  made = pipe.modules(params)

  def mean(rnn, dense):
    return loss(nn.Dense(2).apply(dense, rnn(batch["x"])[:, -1]), batch).mean()

  want = nnx.grad(mean)(made[0], made[3]), jax.grad(lambda d: mean(nnx.clone(made[0]), d))(made[3])
  got = pipe.unplace(pipe.value_and_grad(params, batch)[1])["layers"]
  for a, b in ((got[0], nnx.to_pure_dict(want[0])), (got[3], want[1]["params"])):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[0], y, rtol=1e-4, atol=1e-6), a, b)


def test_a_step_without_a_key_and_draws_in_evaluation_are_refused_by_name():
  always = functools.partial(nnx.Dropout, 0.5)
  pipe = jaxpipe.pipeline(
    loss, [always, nn.Dense(2)], BATCH, mesh="stage:2", schedule="gpipe", microbatches=2
  )
  params = pipe.init(KEY, BATCH)
  with pytest.raises(ValueError, match="call the step with a key"):
    pipe.value_and_grad(params, BATCH)

  class Always(nnx.Module):
    def __init__(self, rngs):
      self.rngs = rngs

    def __call__(self, x):
      return x + jax.random.normal(self.rngs.noise(), x.shape)

  pipe = jaxpipe.pipeline(
    loss, [Always, nn.Dense(2)], BATCH, mesh="stage:2", schedule="gpipe", microbatches=2
  )
  with pytest.raises(ValueError, match="draws random numbers in evaluation"):
    pipe.evaluate(pipe.init(KEY, BATCH), BATCH)


class Rows(nnx.Module):
  def __call__(self, batch):
    return batch["x"]


class Total(nnx.Module):
  def __call__(self, x, batch):
    return jnp.sum(x * batch["x"]), 1.0 * len(x), {}


def test_a_run_that_is_resumed_draws_as_one_that_began_here():
  """No `init` had traced its layers, and masks of features [6] were drawn by six rows."""
  batch = {"x": np.ones((6, D), np.float32)}
  schedule, mesh = jaxpipe.make_schedule("gpipe", devices=1, microbatches=1), "stage:1"
  begun, resumed, alone = (
    LayerStack(lambda rngs: Rows(), [ByFeature], lambda rngs: Total()) for _ in range(3)
  )
  params = begun.init(KEY, batch)
  mesh = jaxpipe.make_mesh(mesh)
  losses = [
    jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)(params, batch, KEY)[0][0]
    for stack in (begun, resumed)
  ]
  losses.append(jaxpipe.reference_value_and_grad(alone, 1)(params, batch, KEY)[0][0])
  np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
  # By rows it would be another number: no two of the 36 masks are the same.
  assert losses[0] > 0
