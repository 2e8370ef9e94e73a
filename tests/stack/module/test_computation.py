"""Layers are of one kind by what they compute; functions with weights inside are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxpipe
from jaxpipe.stack.context import Context
from jaxpipe.stack.stack import LayerStack, StackError

BATCH = {"x": np.ones((8, 4), np.float32)}


def loss(y, batch):
  return y.sum(-1)


class Numbered(nnx.Module):
  """A layer that keeps its number, as those of most decoders do, and an initializer of its own."""

  def __init__(self, layer_idx, rngs, function=jnp.tanh):
    self.layer_idx, self.function = layer_idx, function
    init = lambda key, shape, dtype: jnp.ones(shape, dtype)  # noqa: E731
    self.inner = nnx.Linear(4, 4, kernel_init=init, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return x + self.drop(self.function(nnx.gelu(self.inner(x))))


class Linen(nn.Module):
  number: int

  @nn.compact
  def __call__(self, x, train=False):
    return jax.nn.relu(nn.Dense(4)(x))


@jax.custom_vjp
def halved(x):
  return x


halved.defvjp(lambda x: (x, None), lambda _, g: (g / 2,))


@jax.custom_vjp
def doubled(x):
  return x


doubled.defvjp(lambda x: (x, None), lambda _, g: (g * 2,))


def kinds(modules):
  return LayerStack.from_modules(modules, loss=loss, batch=BATCH)


ALIKE = {
  "numbers": [functools.partial(Numbered, i) for i in range(4)],
  "lambdas": [functools.partial(Numbered, 0, function=lambda x: 2 * x) for _ in range(3)],
  "instances": [Numbered(i, nnx.Rngs(i)) for i in range(3)],
  "linen": [Linen(i) for i in range(3)],
  "custom gradients": [functools.partial(Numbered, i, function=halved) for i in range(2)],
}


@pytest.mark.smoke
@pytest.mark.parametrize("modules", ALIKE.values(), ids=ALIKE)
def test_layers_that_compute_the_same_are_one_kind(modules):
  assert len(kinds(modules).network.runs) == 1


UNLIKE = {
  "functions": (
    [functools.partial(Numbered, 0, function=f) for f in (jnp.tanh, jnp.sin)],
    "one does tanh where the other does sin",
  ),
  "constants": (
    [functools.partial(Numbered, 0, function=lambda x, c=c: c * x) for c in (2.0, 3.0)],
    "their mul read other values",
  ),
  "arrays": (
    [
      functools.partial(Numbered, 0, function=lambda x, c=c: np.full((1, 4), c, np.float32) * x)
      for c in (2, 3)
    ],
    "they read other constants",
  ),
  "gradients": (
    [functools.partial(Numbered, 0, function=f) for f in (halved, doubled)],
    "one does div where the other does mul",
  ),
  "number": (
    [functools.partial(Numbered, 0), Linen(0)],
    "Linen after Numbered",
  ),
}


@pytest.mark.parametrize("modules, why", UNLIKE.values(), ids=UNLIKE)
def test_layers_that_compute_otherwise_say_how(modules, why):
  network = kinds(modules).network
  assert len(network.runs) == 2 and why in network.reasons[1]


def test_a_number_that_is_computed_with_makes_a_kind():
  class Scaled(Numbered):
    def __call__(self, x):
      return x * (self.layer_idx + 1)

  pipe = jaxpipe.pipeline(
    loss, [functools.partial(Scaled, i) for i in range(4)], BATCH, mesh="stage:2", microbatches=2
  )
  assert "layers/1 is of another kind than layers/0: their mul read other values" in str(pipe)
  np.testing.assert_allclose(pipe.predict(pipe.init(jax.random.key(0), BATCH), BATCH), 24)


def test_numbered_layers_of_a_stack_are_compared_by_the_batch():
  class Embed(nnx.Module):
    def __init__(self, rngs):
      pass

    def __call__(self, batch):
      return batch["x"]

  class Head(Embed):
    def __call__(self, x, batch):
      return x.sum(), 1.0 * len(x), {}

  stack = LayerStack(Embed, ALIKE["numbers"], Head)
  assert not stack.uniform
  pipe = jaxpipe.pipeline(None, stack, BATCH, mesh="stage:2", schedule="zb-h1", microbatches=2)
  assert pipe.stack.uniform and pipe.check(BATCH).ok


WEIGHT = jnp.ones((4, 4))
INNER = nnx.Linear(4, 4, rngs=nnx.Rngs(0))


class Callable:
  def __init__(self):
    self.inner = INNER

  def __call__(self, x):
    return self.inner(x)

  def method(self, x):
    return self.inner(x)


class Outside(nnx.Module):
  """Calls a module that is none of its own."""

  def __init__(self, rngs):
    pass

  def __call__(self, x):
    return INNER(x)


CAPTURED = {
  "lambda": lambda x: nnx.relu(INNER(x)),
  "partial": functools.partial(jnp.dot, b=WEIGHT),
  "object": Callable(),
  "method": Callable().method,
  "jitted": jax.jit(lambda x: x @ WEIGHT),
  "default": lambda x, inner=INNER: inner(x),
  "module": Outside,
}


@pytest.mark.smoke
@pytest.mark.parametrize("module", CAPTURED.values(), ids=CAPTURED)
def test_weights_that_nothing_would_train_are_refused(module):
  with pytest.raises(StackError, match=r"layers\[1\] .* reads an array float32\[4, 4\] that is no"):
    kinds([nnx.relu, module])


def test_weights_in_the_loss_and_in_inputs_are_refused():
  with pytest.raises(StackError, match=r"loss reads an array float32\[4, 4\]"):
    LayerStack.from_modules([nnx.relu], loss=lambda y, b: INNER(y).sum(-1), batch=BATCH)
  with pytest.raises(StackError, match=r"inputs reads an array float32\[4, 4\]"):
    LayerStack.from_modules(
      [nnx.relu], loss=loss, batch=BATCH, inputs=lambda batch: batch["x"] @ WEIGHT
    )


def test_constants_of_numpy_and_bound_methods_of_modules_are_used_as_given():
  network = kinds([lambda x: x @ np.ones((4, 4), np.float32), INNER.__call__]).network
  assert set(network.specs["layers/1"].shapes["module"]) == {"kernel", "bias"}


class Embed(nnx.Module):
  def __init__(self, rngs):
    pass

  def __call__(self, batch):
    return batch["x"] @ INNER.kernel[...]


class Head(nnx.Module):
  def __init__(self, rngs):
    pass

  def __call__(self, x, batch):
    return INNER(x).sum(), 1.0 * len(x), {}


class Plain(Head):
  def __call__(self, x, batch):
    return x.sum(), 1.0 * len(x), {}


@pytest.mark.parametrize("embed, head", [(Embed, Plain), (lambda rngs: Select(), Head)])
def test_weights_from_outside_are_refused_in_the_ends_of_a_stack(embed, head):
  stack = LayerStack(embed, [lambda rngs: nnx.Linear(4, 4, rngs=rngs)], head)
  with pytest.raises(StackError, match=r"(embed|head) reads an array float32\[4, 4\]"):
    stack.init(jax.random.key(0), BATCH)


class Select(nnx.Module):
  def __call__(self, batch):
    return batch["x"]


def test_layers_that_differ_in_evaluation_are_of_several_kinds():
  """They were compared in training alone, and the first layer's evaluation ran for all."""

  class Evaluated(Numbered):
    def __call__(self, x, train):
      y = self.inner(x)
      return y if train else y * (self.layer_idx + 1)

  layers = [Evaluated(i, nnx.Rngs(i)) for i in range(2)]
  assert len(kinds(layers).network.runs) == 2


class Normalizing(nnx.Module):
  """Scales its own kernel in the call."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x):
    self.inner.kernel[...] = self.inner.kernel[...] / 2
    return self.inner(x)


class Remat(nnx.Module):
  """Passes its variables through `nnx.remat`, which writes all of them back."""

  def __init__(self, rngs):
    self.inner = nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)

  @nnx.remat
  def __call__(self, x):
    return self.norm(self.inner(x))


def test_a_change_of_a_parameter_is_refused_and_passing_it_on_is_none():
  with pytest.raises(
    StackError, match=r"layers\[0\] \(Normalizing\) changes its variable .*kernel"
  ):
    kinds([Normalizing])
  stack = LayerStack.from_modules([Remat], loss=loss, batch=BATCH, trainable=nnx.LoRAParam)
  spec = stack.network.specs["layers/0"]
  params, state = spec.init(jax.random.key(0))
  context = Context(BATCH, True, None, jnp.arange(8))
  x = jax.random.normal(jax.random.key(1), (8, 4))
  _, after = jax.jit(lambda p, s: spec.run(p, s, True, x, context=context))(params, state)
  assert (after["norm"]["mean"] != 0).any()
  jax.tree.map(np.testing.assert_array_equal, after["inner"], state["inner"])


def test_what_a_filter_names_is_trained_and_nothing_else():
  """A filter that matched nothing trained nothing, and no layer could be frozen by its place."""
  modules = [functools.partial(nnx.Linear, 4, 4)] * 3 + [nn.Dense(2)]
  make = functools.partial(LayerStack.from_modules, modules, loss=loss, batch=BATCH)
  frozen = make(trainable=nnx.All(nnx.Param, nnx.Not(nnx.PathContains("layers/1"))))
  owned = frozen.network.param_shapes()
  assert [bool(owned[f"layers/{i}"]) for i in range(4)] == [True, False, True, True]
  assert set(frozen.network.specs["layers/1"].state) == {"kernel", "bias"}
  last = make(trainable=lambda path, value: path == ("layers/3", "bias"))
  assert jax.tree.leaves(last.network.param_shapes()) == [jax.ShapeDtypeStruct((2,), jnp.float32)]
  for nothing in (
    nnx.PathContains("kernal"),
    nnx.LoRAParam,
    nnx.Not(nnx.PathContains("layers/4")),
    nnx.All(nnx.Param, nnx.Not(nnx.PathContains("layer/1"))),
    nnx.Any(nnx.Param, nnx.PathContains("typo")),
  ):
    with pytest.raises(
      StackError, match=r"matches no variable of the stack, whose paths are layer"
    ):
      make(trainable=nothing)


def test_statistics_are_never_trained():
  """`Not(...)` and `...` meant them, too: their updates were lost, and evaluation used zeros."""
  norms = [functools.partial(nnx.BatchNorm, 4), nn.Dense(2)]
  for everything in (..., nnx.Not(nnx.PathContains("layers/1"))):
    stack = LayerStack.from_modules(norms, loss=loss, batch=BATCH, trainable=everything)
    assert set(stack.network.specs["layers/0"].shapes) == {"bias", "scale"}
    assert set(stack.network.specs["layers/0"].state) == {"mean", "var"}
