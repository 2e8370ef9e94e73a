"""A training loop of one's own: a plain loss, modules in a row, optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxpipe
from jaxpipe.stack.stack import LayerStack


class Convolve(nnx.Module):
  def __init__(self, rngs):
    self.inner, self.norm = nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x, context):
    return x + context.dropout(nnx.relu(self.norm(self.inner(x))), 0.1)


class Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))


def data(rows=32):
  image = np.random.default_rng(0).normal(size=(rows, 6, 6, 1)).astype(np.float32)
  return {"x": image, "label": (image.mean((1, 2, 3)) > 0).astype(np.int32)}


def loss(y, batch):
  return optax.softmax_cross_entropy_with_integer_labels(y, batch["label"])


def make(batch, **options):
  modules = [
    functools.partial(nnx.Conv, 1, 4, (3, 3)),
    Convolve,
    lambda x: x.mean((1, 2)),
    Normed(),
    functools.partial(nnx.Linear, 6, 2),
  ]
  options = dict(mesh="stage:2", microbatches=4) | options
  return jaxpipe.pipeline(loss, modules, batch, **options)


def train(pipe, batch, steps=25):
  params, state = (init(jax.random.key(0), batch) for init in (pipe.init, pipe.init_state))
  optimizer = optax.adam(1e-2)
  moments = optimizer.init(params)
  losses = []
  for step in range(steps):
    key = jax.random.key(step)
    (value, _, state), grads = pipe.value_and_grad(params, batch, key, state)
    updates, moments = optimizer.update(grads, moments, params)
    params = optax.apply_updates(params, updates)
    losses.append(float(value))
  return losses, pipe.unplace(params), pipe.unplace(state)


def test_a_bare_optax_loop_learns_alike_on_any_number_of_stages():
  """NNX with BatchNorm and dropout, Linen with running statistics, shapes that change."""
  batch = data()
  losses, params, state = train(make(batch), batch)
  assert losses[-1] < 0.7 * losses[0]
  others = train(make(batch, mesh="stage:4", schedule="zb-h1", partition=[1, 2, 1, 1]), batch)
  np.testing.assert_allclose(losses, others[0], rtol=1e-4)
  for mine, theirs in ((params, others[1]), (state, others[2])):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), mine, theirs)


def test_the_moving_averages_serve_evaluation():
  batch = data()
  pipe = make(batch)
  key = jax.random.key(0)
  params, state = pipe.init(key, batch), pipe.init_state(key, batch)
  value, _ = pipe.evaluate(params, batch, state)
  shifted = jax.tree.map(lambda leaf: leaf + 1, state)
  assert value != pipe.evaluate(params, batch, shifted)[0]


def test_a_stack_brings_its_own_loss():
  batch = data()
  stack = make(batch).stack
  pipe = jaxpipe.pipeline(None, stack, mesh="stage:2", schedule="gpipe", microbatches=2)
  assert pipe.stack is stack and pipe.schedule.name == "gpipe"
  with pytest.raises(ValueError, match="a LayerStack has a loss"):
    jaxpipe.pipeline(loss, stack)
  with pytest.raises(ValueError, match="need a loss and an example batch"):
    jaxpipe.pipeline(loss, [jnp.tanh])


class Told(nn.Module):
  """Says by its output whether it was told to train."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(6)(x) * (100.0 if train else 1.0)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_linen_module_without_state_is_told_that_it_trains(uniform):
  """It was not: only modules with state had their mode set."""
  batch = {"x": np.ones((4, 6), np.float32), "label": np.zeros(4, np.int32)}
  modules = [Told()] * 2 if uniform else [Told(), lambda x: 2.0 * x]
  pipe = jaxpipe.pipeline(
    lambda y, batch: y.sum(-1) ** 2, modules, batch, mesh="stage:2", microbatches=1
  )
  assert pipe.stack.uniform == uniform
  params = pipe.init(jax.random.key(0), batch)
  trained, evaluated = pipe.value_and_grad(params, batch)[0][0], pipe.evaluate(params, batch)[0]
  assert trained > 2 * evaluated


def test_a_bare_linen_norm_trains_over_all_rows_of_the_microbatch():
  """It was given its context as a flag, and each device the statistics of its own rows."""
  rng = np.random.default_rng(0)
  batch = {"x": rng.normal(size=(8, 6)).astype(np.float32), "label": np.zeros(8, np.int32)}
  pipe = jaxpipe.pipeline(
    loss, [nn.BatchNorm(momentum=0.5), nn.Dense(3)], batch, mesh="stage:2,data:2", microbatches=2
  )
  assert pipe.check(batch).ok
  key = jax.random.key(0)
  params, state = pipe.init(key, batch), pipe.init_state(key, batch)
  (_, _, after), _ = pipe.value_and_grad(params, batch, key, state)
  mean = pipe.unplace(after)["layers"][0]["batch_stats"]["mean"][0]
  np.testing.assert_allclose(mean, 0.5 * batch["x"].mean(0), rtol=1e-5)


class Scaled(nn.Module):
  """Expects 5 features."""

  @nn.compact
  def __call__(self, x):
    return x * self.param("scale", nn.initializers.ones, (5,))


MISFITS = [
  ([nn.Dense(4), Scaled()], loss, r"layers\[1\] \(Scaled\) cannot be made for float32\[8, 4\]"),
  ([lambda x: {"h": x}], lambda y, b: y - b["x"], r"loss\(y, batch\).* with {'h': 'float32\[8, 6"),
  ([nn.Dense(4)], lambda y, b: (y.sum(-1), {}), r"loss returns a tuple of \(8,\), {} for 8 rows"),
  ([nn.Dense(4)], lambda y, b: y.mean(), r"loss returns an array of shape \(\) for 8 rows"),
  ([nn.Dense(4)], lambda y, b: {"loss": y.sum(-1)}, "loss returns a dict for 8 rows"),
  ([nn.Dense(4)], lambda y, b: y.sum(-1) * b["lable"], "with float32.*: KeyError: 'lable'"),
  (
    [nn.Dense(4)],
    lambda y, b: (jnp.sum(y.argmax(-1) != b["label"]), 8.0, {}),
    "loss_sum is int32, which has no gradient",
  ),
]


@pytest.mark.parametrize("modules, loss, said", MISFITS)
def test_what_does_not_fit_is_named_when_it_is_put_together(modules, loss, said):
  batch = {"x": np.ones((8, 6), np.float32), "label": np.zeros(8, np.int32)}
  with pytest.raises(jaxpipe.StackError, match=said):
    jaxpipe.pipeline(loss, modules, batch, mesh="stage:2", microbatches=2)


def test_a_norm_that_is_told_when_it_is_made_is_not_told_again():
  batch = {"x": np.ones((8, 6), np.float32), "label": np.zeros(8, np.int32)}
  norm = nn.BatchNorm(use_running_average=False)
  pipe = jaxpipe.pipeline(loss, [norm, nn.Dense(3)], batch, mesh="stage:2", microbatches=2)
  assert pipe.check(batch).ok
  key = jax.random.key(0)
  params, state = pipe.init(key, batch), pipe.init_state(key, batch)
  value, _ = pipe.evaluate(params, batch, state)  # a norm that goes on training cannot
  np.testing.assert_allclose(
    loss(pipe.predict(params, batch, state), batch).mean(), value, rtol=1e-5
  )


def test_a_linen_module_must_be_told_whether_it_trains_or_knows_a_flag_of_the_same_name():
  class Must(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x, train):
      return nn.Dense(3)(x) * (2.0 if train else 1.0)

  batch = {"x": np.ones((8, 6), np.float32), "label": np.zeros(8, np.int32)}
  summed = lambda y, batch: y.sum(-1) ** 2  # noqa: E731
  pipe = jaxpipe.pipeline(summed, [Must(), lambda x: x], batch, mesh="stage:2", microbatches=2)
  params = pipe.init(jax.random.key(0), batch)
  trained, evaluated = pipe.value_and_grad(params, batch)[0][0], pipe.evaluate(params, batch)[0]
  np.testing.assert_allclose(trained, 4 * evaluated, rtol=1e-5)


@pytest.mark.parametrize(
  "options, said",
  [
    ({"microbatches": 3}, "a batch of 32 rows cannot be cut into 3 microbatches"),
    ({"partition": [2, 2, 1]}, r"partition \[2, 2, 1\] is for 3 stages and the schedule has 2"),
    ({"partition": [6, -1]}, r"partition \[6, -1\] has a stage of less than 0 layers"),
    ({"partition": [2.0, 3]}, r"partition=\[2.0, 3\] is no list of whole numbers"),
    ({"partition": "cleverest"}, "unknown partition 'cleverest'; known: .* best"),
    ({"partition": 2}, "partition=2 is no list of whole numbers"),
    ({"residuals": "fulll"}, "fulll"),
    ({"mesh": "stage:2,tensor:2"}, "tensor:2"),
  ],
)
def test_sizes_that_do_not_fit_are_refused_at_once(options, said):
  with pytest.raises(ValueError, match=said):
    make(data(), **options)


def test_a_partition_may_be_named():
  batch = data()
  pipe = make(batch, partition="best")
  assert len(pipe.stack.partition) == 2 and sum(pipe.stack.partition) == 5
  assert make(batch, partition=np.array([4, 1])).stack.partition == (4, 1)
  assert str(pipe).splitlines()[0] == "1f1b of 4 microbatches over stage:2 (2 stages, 5 layers)"
  assert str(pipe).splitlines()[1].startswith("stage 0: embed Select, layers/0 Conv")


def test_predictions_are_those_that_evaluation_counts():
  batch = data()

  def counted(y, batch):
    correct = jnp.sum(y.argmax(-1) == batch["label"])
    return loss(y, batch).sum(), 1.0 * len(y), {"correct": correct}

  modules = [lambda x: x.reshape(len(x), -1), Normed(), functools.partial(nnx.Linear, 6, 2)]
  pipe = jaxpipe.pipeline(counted, modules, batch, mesh="stage:2", microbatches=4)
  key = jax.random.key(0)
  params, state = pipe.init(key, batch), pipe.init_state(key, batch)
  (_, _, state), _ = pipe.value_and_grad(params, batch, key, state)
  value, metrics = pipe.evaluate(params, batch, state)
  y = pipe.predict(params, batch, state)
  np.testing.assert_allclose(loss(y, batch).mean(), value, rtol=1e-5)
  assert int(metrics["correct"]) == int((y.argmax(-1) == batch["label"]).sum())
  few = pipe.predict(params, data(5), state)
  assert few.shape == (5, 2) and few.devices() == {*pipe.mesh.devices.flat}
  with pytest.raises(ValueError, match="the stack has state"):
    pipe.predict(params, batch)


def test_alike_layers_that_are_best_cut_evenly_stay_a_loop():
  batch = {"x": np.ones((8, 6), np.float32), "label": np.zeros(8, np.int32)}
  modules, options = [nn.Dense(6)] * 4, dict(mesh="stage:2", microbatches=2)
  assert jaxpipe.pipeline(loss, modules, batch, partition="uniform", **options).stack.uniform
  assert not jaxpipe.pipeline(loss, modules, batch, partition=[1, 3], **options).stack.uniform


def test_parameters_go_on_on_another_mesh_and_no_state_is_no_state():
  batch = {"x": np.ones((8, 6), np.float32), "label": np.zeros(8, np.int32)}
  modules = [nn.Dense(6), jnp.tanh, nn.Dense(3)]
  one, other = (
    jaxpipe.pipeline(loss, modules, batch, mesh=mesh, schedule=name, microbatches=2)
    for mesh, name in (("stage:1", "gpipe"), ("stage:2", "zb-h1"))
  )
  key = jax.random.key(0)
  params = one.init(key, batch)
  tree = one.unplace(params)
  like = jax.tree.structure(other.unplace(other.init(jax.random.key(1), batch)))
  moved = other.place(jax.tree.unflatten(like, jax.tree.leaves(tree)))
  np.testing.assert_allclose(
    one.evaluate(params, batch)[0], other.evaluate(moved, batch)[0], rtol=1e-6
  )
  assert other.place(one.unplace(one.init_state(key, batch))) == {}


def test_a_key_in_the_place_of_the_state_is_told():
  batch = data()
  pipe = make(batch)
  key = jax.random.key(0)
  params, state = pipe.init(key, batch), pipe.init_state(key, batch)
  with pytest.raises(ValueError, match="the state is an array, such as a key"):
    pipe.value_and_grad(params, batch, state, key)


class Counter(nnx.BatchStat):
  """Whole numbers that a layer changes."""


class Counted(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(6, 6, rngs=rngs)
    self.seen = Counter(jnp.array([-5, 2], jnp.int32))
    self.mask = nnx.Variable(jnp.array([0.1, jnp.finfo(jnp.float32).min]))

  def __call__(self, x):
    self.seen[...] = self.seen[...] - 1
    return self.inner(x)


def counting(**options):
  batch = {"x": np.ones((6, 6), np.float32), "label": np.zeros(6, np.int32)}
  options = dict(mesh="stage:2", microbatches=3) | options
  return jaxpipe.pipeline(loss, [Counted, nnx.relu], batch, **options), batch


def test_whole_numbers_may_be_negative_and_constants_stay_as_they_are():
  """Largest values began at zero, and means of constants rounded, or overflowed."""
  pipe, batch = counting()
  key = jax.random.key(0)
  params, state = pipe.init(key, batch), pipe.init_state(key, batch)
  (_, _, after), _ = pipe.value_and_grad(params, batch, key, state)
  found = pipe.unplace(after)["layers"][0]
  assert found["seen"][0].tolist() == [-6, 1]
  np.testing.assert_array_equal(found["mask"][0], state_mask(pipe, state))
  assert pipe.check(batch).ok


def state_mask(pipe, state):
  return pipe.unplace(state)["layers"][0]["mask"][0]


def test_counters_of_stages_that_live_twice_are_refused():
  with pytest.raises(jaxpipe.StackError, match="counts in whole numbers"):
    counting(schedule="chimera", microbatches=2, mesh="stage:2")


def test_a_variable_that_changes_in_silence_is_refused():
  class Silent(nnx.Module):
    def __init__(self, rngs):
      self.seen = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
      self.seen[...] = self.seen[...] + 1
      return x

  with pytest.raises(jaxpipe.StackError, match="changes its variable"):
    LayerStack.from_modules([Silent], loss=loss, batch=data(2))


def test_a_state_that_was_not_placed_is_named():
  batch = data(8)
  pipe = make(batch)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match=r"state\['layers'\].*jaxpipe.place\(state"):
    pipe.value_and_grad(pipe.init(key, batch), batch, key, pipe.stack.init_state(key, batch))


def test_a_module_that_stands_twice_shares_its_weights():
  batch = {"x": np.ones((4, 6), np.float32), "label": np.zeros(4, np.int32)}
  one = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
  stack = LayerStack.from_modules([one, nnx.relu, one], loss=loss, batch=batch)
  assert sum(leaf.size for leaf in jax.tree.leaves(stack.param_shapes())) == 6 * 6 + 6


def test_sequences_of_modules_are_layers():
  batch = {"x": np.ones((4, 6), np.float32), "label": np.zeros(4, np.int32)}
  pair = nnx.Sequential(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.relu)
  stack = LayerStack.from_modules([pair, nn.Sequential([nn.Dense(3)])], loss=loss, batch=batch)
  assert len(stack.network.runs) == 2


def test_names_to_keep_may_be_in_one_stage_alone():
  class Named(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
      return checkpoint_name(self.inner(x), "act")

  batch = {"x": np.ones((4, 6), np.float32), "label": np.zeros(4, np.int32)}
  options = dict(mesh="stage:2", microbatches=1, residuals="names:act")
  assert jaxpipe.pipeline(loss, [Named, nnx.relu], batch, **options).check(batch).ok
