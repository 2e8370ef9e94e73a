"""Modules that exist already: their values, what they share, and how they come back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxpipe
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack, StackError

BATCH = {"x": np.arange(8) % 5, "label": (np.arange(8) + 1) % 5}
KEY = jax.random.key(0)


def loss(y, batch):
  return optax.softmax_cross_entropy_with_integer_labels(y, batch["label"])


def make(modules, **options):
  return jaxpipe.pipeline(
    loss, modules, BATCH, mesh="stage:2", schedule="zb-h1", microbatches=2, **options
  )


class Uses(nnx.Module):
  """Holds another module under a name of its own."""

  def __init__(self, inner):
    self.inner = inner

  def __call__(self, x):
    return jnp.tanh(self.inner(x))


def test_variables_shared_in_any_way_are_one():
  """Each holder trained a table of its own, with its own part of the gradient."""
  table = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
  linear = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
  bare = Uses(nnx.Linear(4, 4, rngs=nnx.Rngs(2)))
  bare.inner.kernel = linear.kernel  # one variable of several
  modules = [Uses(table), linear, nnx.List([Uses(linear)])[0], bare, linear, table.attend]
  pipe = make(modules)
  params = pipe.init(KEY, BATCH)

  def mean(models):
    x = BATCH["x"]
    for model in models[:-1]:
      x = model(x)
    return loss(models[0].inner.attend(x), BATCH).mean()

  want = nnx.grad(mean)(nnx.List([*modules[:-1], Uses(table)]))
  want = nnx.to_pure_dict(want)
  got = pipe.unplace(pipe.value_and_grad(params, BATCH)[1])["layers"]
  assert [len(jax.tree.leaves(run)) for run in got] == [1, 2, 0, 1, 0, 0]
  pairs = [
    (got[0]["inner"]["embedding"], want[0]["inner"]["embedding"]),
    (got[1]["kernel"], want[1]["kernel"]),
    (got[1]["bias"], want[1]["bias"]),
    (got[3]["inner"]["bias"], want[3]["inner"]["bias"]),
  ]
  for a, b in pairs:
    np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-7)

  again = pipe.modules(params)
  assert again[0].inner.embedding is again[5].__self__.embedding
  assert again[1] is again[4] and again[2].inner.kernel is again[3].inner.kernel is again[1].kernel
  assert again[1].kernel is not linear.kernel
  np.testing.assert_array_equal(again[1].kernel[...], linear.kernel[...])
  np.testing.assert_allclose(
    pipe.predict(params, BATCH), table.attend(run(modules[:-1], BATCH["x"])), rtol=1e-5
  )


def run(modules, x):
  for module in modules:
    x = module(x)
  return x


class Numbered(nn.Module):
  """A submodule has a number for a name, as in most models of transformers."""

  inner: nn.Module

  def setup(self):
    self.own = nn.Dense(4, name="0")

  def __call__(self, x):
    return jnp.tanh(self.inner(self.own(x)))


def test_bound_linen_modules_that_hold_one_array_share_it():
  """Each started from the values and trained them by itself, as if they had been copied."""
  dense, first = nn.Dense(4), nn.Embed(5, 4)
  x = np.ones((8, 4), np.float32)
  table = first.init(jax.random.key(1), BATCH["x"])
  inner = dense.init(jax.random.key(2), x)["params"]
  own = dense.init(jax.random.key(3), x)["params"]
  block = Numbered(nn.Dense(4)).bind({"params": {"inner": inner, "0": own}})
  equal = jax.tree.map(jnp.copy, inner)  # of the same values, and not the same arrays
  head = Attend(nn.Embed(5, 4)).bind({"params": {"table": table["params"]}})
  modules = [
    first.bind(table),
    block,
    dense.bind({"params": inner}),
    block,
    dense.bind({"params": equal}),
    head,
  ]
  pipe = make(modules)
  params = pipe.init(KEY, BATCH)

  def mean(table, inner, own, equal):
    run = lambda x: jnp.tanh(dense.apply({"params": inner}, dense.apply({"params": own}, x)))  # noqa: E731
    x = run(dense.apply({"params": inner}, run(first.apply(table, BATCH["x"]))))
    x = dense.apply({"params": equal}, x)
    return loss(first.apply(table, x, method="attend"), BATCH).mean()

  want = jax.grad(mean, (0, 1, 2, 3))(table, inner, own, equal)
  got = pipe.unplace(pipe.value_and_grad(params, BATCH)[1])["layers"]
  got = jax.tree.map(lambda leaf: leaf[0], got)
  pairs = [
    (got[0], want[0]["params"]), (got[1]["inner"], want[1]), (got[1]["0"], want[2]),
    (got[4], want[3]),
  ]  # fmt: skip
  for a, b in pairs:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), a, b)
  assert [len(jax.tree.leaves(run)) for run in got] == [1, 4, 0, 0, 2, 0]
  made = pipe.modules(params)
  want = [
    table,
    block.variables,
    {"params": inner},
    block.variables,
    {"params": equal},
    head.variables,
  ]
  jax.tree.map(np.testing.assert_array_equal, made, want)


def test_leaves_of_one_linen_module_that_begin_as_one_array_are_several_variables():
  own = nn.Dense(4).init(KEY, np.ones((8, 4)))["params"]
  twice = Numbered(nn.Dense(4)).bind({"params": {"inner": own, "0": own}})
  batch = {"x": np.ones((8, 4), np.float32)}
  stack = LayerStack.from_modules([twice, twice], loss=lambda y, b: y.sum(-1), batch=batch)
  leaves = [f"{name}/{leaf}" for name in ("0", "inner") for leaf in ("bias", "kernel")]
  assert stack.network.ties == {f"layers/1/{leaf}": f"layers/0/{leaf}" for leaf in leaves}


class Attend(nn.Module):
  table: nn.Embed

  def __call__(self, x):
    return self.table.attend(x)


def test_what_is_shared_and_frozen_stays_alike():
  table = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
  modules = [Uses(table), functools.partial(nnx.Linear, 4, 4), table.attend]
  pipe = make(modules, trainable=nnx.All(nnx.Param, nnx.Not(nnx.PathContains("embedding"))))
  params, state = pipe.init(KEY, BATCH), pipe.init_state(KEY, BATCH)
  made = pipe.modules(params, state)
  assert made[0].inner.embedding is made[2].__self__.embedding
  np.testing.assert_array_equal(made[0].inner.embedding[...], table.embedding[...])


def test_a_statistic_that_two_modules_change_is_refused():
  norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
  with pytest.raises(StackError, match=r"layers/2/inner/mean and layers/1/inner/mean are one nnx"):
    make([functools.partial(nnx.Embed, 5, 4), Uses(norm), Uses(norm), nn.Dense(5)])


class Ends(nnx.Module):
  def __init__(self, inner):
    self.inner = inner

  def __call__(self, batch):
    return self.inner(batch["x"])


class Head(nnx.Module):
  def __init__(self, inner):
    self.inner = inner

  def __call__(self, x, batch):
    return loss(self.inner.attend(x), batch).sum(), 1.0 * len(x), {}


def test_factories_that_close_over_one_module_share_it():
  """A copy of the module was trained for each of them."""
  table, linear = nnx.Embed(5, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1))
  stack = LayerStack(
    embed=lambda rngs: Ends(table),
    layers=[
      lambda rngs: linear,
      lambda rngs: Uses(linear),
      lambda rngs: nnx.Linear(4, 4, rngs=rngs),
    ],
    head=Head(table),
  )
  assert set(stack.network.ties) == {
    "head/inner/embedding", "layers/1/inner/kernel", "layers/1/inner/bias"
  }  # fmt: skip
  params = stack.init(KEY, BATCH)
  np.testing.assert_array_equal(params["embed"]["inner"]["embedding"], table.embedding[...])


class Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))


def test_bound_linen_modules_start_from_their_variables_and_give_them_back():
  x = np.ones((8, 4), np.float32)
  first, second = nn.Embed(5, 4), Normed()
  a, b = first.init(jax.random.key(5), BATCH["x"]), second.init(jax.random.key(6), x)
  b = jax.tree.map(lambda leaf: leaf + 0.5, b)
  pipe = make(
    [first.bind(a), functools.partial(second.apply, b), nnx.Linear(5, 5, rngs=nnx.Rngs(1))]
  )
  params, state = pipe.init(KEY, BATCH), pipe.init_state(KEY, BATCH)
  made = pipe.modules(params, state)
  jax.tree.map(np.testing.assert_array_equal, made[:2], [a, b])
  want = made[2](second.apply(b, first.apply(a, BATCH["x"])))
  np.testing.assert_allclose(pipe.predict(params, BATCH, state), want, rtol=1e-5)


def test_modules_come_back_in_the_mode_they_were_given_in():
  off = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
  off.eval()
  pipe = make([functools.partial(nnx.Embed, 5, 4), off, jnp.tanh, nn.Dense(5)])
  params, state = pipe.init(KEY, BATCH), pipe.init_state(KEY, BATCH)
  assert "1 norms or dropouts were given in evaluation mode" in str(pipe)
  (_, _, after), _ = pipe.value_and_grad(params, BATCH, KEY, state)
  jax.tree.map(np.testing.assert_array_equal, after, state)
  _, norm, function, dense = pipe.modules(params, after)
  assert norm.layers[1].use_running_average and function is jnp.tanh and set(dense) == {"params"}


@pytest.mark.parametrize(
  "name", ["label", "train", "set_attributes", "batch_stats", "eval", "mean", "linen module"]
)
def test_linen_submodules_may_have_any_name(name):
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.BatchNorm(use_running_average=not train)(nn.Dense(5, name=name)(x))

  batch = {"x": np.ones((4, 3), np.float32)}
  stack = LayerStack.from_modules([Block()], loss=lambda y, b: y.sum(-1), batch=batch)
  spec = stack.network.specs["layers/0"]
  params, state = spec.init(KEY)
  want = Block().init(KEY, batch["x"])
  assert jax.tree.structure((params, state["batch_stats"])) == jax.tree.structure(
    (want["params"], want["batch_stats"])
  )
  for training in (True, False):
    context = Context(batch, training, KEY, jnp.arange(4))
    got, _ = spec.run(params, state, training, batch["x"], context=context)
    variables = {"params": params, **state}
    want = Block().apply(variables, batch["x"], training, mutable=["batch_stats"])[0]
    np.testing.assert_array_equal(got, want)


def ties(modules, **options):
  stack = LayerStack.from_modules(modules, loss=loss, batch=BATCH, **options)
  return set(stack.network.ties)


def embedded(*modules):
  return [functools.partial(nnx.Embed, 5, 4), *modules, nn.Dense(5)]


def test_ways_of_sharing_that_are_easily_missed():
  linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  two = {"layers/2/kernel", "layers/2/bias"}
  assert ties(embedded(linear, linear)) == two
  dense = nn.Dense(4)
  bound = dense.bind(dense.init(KEY, np.ones((8, 4))))
  assert ties(embedded(bound, bound)) == two
  on_host = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  on_host.kernel, on_host.bias = nnx.Param(np.ones((4, 4), np.float32)), nnx.Param(np.ones(4))
  factories = [lambda rngs: on_host, lambda rngs: Uses(on_host)]
  assert ties(embedded(*factories)) == {"layers/2/inner/kernel", "layers/2/inner/bias"}


def test_a_variable_that_is_trained_at_one_of_its_places_only_is_refused():
  linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
  for place in (1, 2):
    only = nnx.All(nnx.Param, nnx.Not(nnx.PathContains(f"layers/{place}")))
    with pytest.raises(StackError, match=r"layers/2/\w+ and layers/1/\w+ are one variable, and"):
      ties(embedded(linear, linear), trainable=only)


def test_a_factory_of_a_module_that_is_partly_older_is_refused():
  linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

  class Two(nnx.Module):
    def __init__(self, rngs):
      self.old, self.fresh = linear, nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
      return self.fresh(self.old(x))

  with pytest.raises(StackError, match="of which some variables are older than it"):
    ties(embedded(Two))


def test_a_norm_that_is_switched_off_may_be_shared_and_come_back_from_a_dict():
  norm = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))

  class Held(nnx.Module):
    def __init__(self):
      self.norms = nnx.Dict({"0": norm})

    def __call__(self, x):
      return self.norms["0"](x)

  pipe = make(embedded(Held(), Uses(norm)))
  params, state = pipe.init(KEY, BATCH), pipe.init_state(KEY, BATCH)
  _, held, uses, _ = pipe.modules(params, state)
  assert held.norms["0"].mean is uses.inner.mean and held.norms["0"].scale is uses.inner.scale
