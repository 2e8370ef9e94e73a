"""Linen modules as modules of a stack."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxpipe
from jaxpipe.stack.linen import linen
from jaxpipe.stack.stack import LayerStack, StackError

BATCH = {"signal": np.ones((4, 3), np.float32), "gain": np.arange(4, dtype=np.float32)}
X = jax.ShapeDtypeStruct((4, 5), jnp.float32)


class Embed(nn.Module):
  @nn.compact
  def __call__(self, batch):
    return nn.Dense(5, name="project")(batch["signal"])


class Block(nn.Module):
  """Takes x alone."""

  width: int = 8
  sizes: tuple[int, ...] = (1, 2)

  def setup(self):
    self.mlp = nn.Sequential([nn.Dense(self.width), nn.tanh, nn.Dense(5)])
    self.norm = nn.LayerNorm()

  def __call__(self, x):
    return x + self.mlp(self.norm(x))


class Gated(nn.Module):
  """Takes x and the context, and reads its batch."""

  @nn.compact
  def __call__(self, x, context):
    y = context.dropout(Block(name="inner")(x), 0.5)
    return x + y * context.batch["gain"][:, None]


class Head(nn.Module):
  @nn.compact
  def __call__(self, x, batch):
    loss = jnp.sum(nn.Dense(1)(x)[:, 0] * batch["gain"])
    return loss, jnp.float32(len(x)), {}


def stack(*layers):
  return LayerStack(embed=linen(Embed(), BATCH), layers=layers, head=linen(Head(), X, BATCH))


@pytest.mark.smoke
def test_parameters_have_linens_names_and_values():
  params = stack(*[linen(Block(), X)] * 3).init(jax.random.key(0), BATCH)
  assert set(params["embed"]) == {"project"} and set(params["head"]) == {"Dense_0"}
  layers = params["layers"]
  assert set(layers) == {"mlp", "norm"} and set(layers["mlp"]) == {"layers_0", "layers_2"}
  assert layers["mlp"]["layers_0"]["kernel"].shape == (3, 5, 8)
  first = jax.tree.map(lambda leaf: leaf[1], layers)
  x = jnp.arange(20.0).reshape(4, 5)
  got = stack(linen(Block(), X)).apply_layer(first, x, True, inputs(None))
  assert (got == Block().apply({"params": first}, x)).all()


def inputs(key):
  return dict(batch=BATCH, key=key, layer=0, microbatch=0, rows=jnp.arange(4, dtype=jnp.int32))


@pytest.mark.smoke
@pytest.mark.sampled(
  "layer, schedule",
  [
    pytest.param(layer, schedule, id=f"{takes}-{schedule}")
    for takes, layer in (("x", linen(Block(), X)), ("both", linen(Gated(), X, batch=BATCH)))
    for schedule in ("gpipe", "zb-h1")
  ],
  2,
)
def test_gradients_are_those_of_the_unpipelined_model(layer, schedule):
  schedule = jaxpipe.make_schedule(schedule, devices=2, microbatches=2)
  report = jaxpipe.check(
    stack(*[layer] * 2), schedule, jaxpipe.make_mesh("stage:2"), BATCH, unroll="none"
  )
  assert report.ok, str(report)


def test_dropout_follows_the_context():
  gated = stack(linen(Gated(), X, batch=BATCH))
  params = jax.tree.map(lambda p: p[0], gated.init(jax.random.key(0), BATCH)["layers"])
  x = jnp.ones((4, 5))

  def run(training, key):
    return gated.apply_layer(params, x, training, inputs(key))

  assert (run(False, None) == run(False, None)).all()
  assert (run(True, jax.random.key(0)) != run(False, None)).any()


def test_equal_modules_are_layers_of_one_kind():
  assert stack(linen(Block(), X), linen(Block(), X)).uniform
  assert not stack(linen(Block(), X), linen(Block(sizes=(3,)), X)).uniform


class Sown(nn.Module):
  """Keeps its output to be looked at, or a loss that somebody should add."""

  collection: str
  options: Any = None

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(5)(x)
    self.sow(self.collection, "kept", jnp.sum(y), **(self.options or {}))
    return y


def test_what_is_sown_to_be_looked_at_is_dropped_and_a_loss_is_refused():
  """The collection became model state, whose structure the step then changed."""
  sown = stack(linen(Sown("intermediates"), X))
  assert sown.uniform
  first = jax.tree.map(lambda p: p[0], sown.init(jax.random.key(0), BATCH)["layers"])
  x = jnp.arange(20.0).reshape(4, 5)
  got = sown.apply_layer(first, x, True, inputs(None))
  np.testing.assert_array_equal(got, Sown("other").apply({"params": first}, x))
  with pytest.raises(StackError, match="module Sown sows into the collection 'losses', which"):
    stack(linen(Sown("losses"), X))
  added = dict(init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
  with pytest.raises(StackError, match="sows into the collection 'losses'"):
    stack(linen(Sown("losses", added), X))  # whose collection holds an array, as variables do


class SownNnx(nnx.Module):
  def __init__(self, kind, rngs):
    self.inner, self.kind = nnx.Linear(5, 5, rngs=rngs), kind

  def __call__(self, x):
    y = self.inner(x)
    self.sow(self.kind, "kept", y)
    return y


class Losses(nnx.Variable):
  pass


@pytest.mark.filterwarnings("ignore:.*sow:DeprecationWarning")
def test_what_an_nnx_module_sows_is_dropped_or_refused_by_its_type():
  module = SownNnx(nnx.Intermediate, nnx.Rngs(0))
  x = jnp.arange(20.0).reshape(4, 5)
  want = module(x)  # which leaves in it what it has sown
  rows = {"x": x}
  make = functools.partial(LayerStack.from_modules, loss=lambda y, b: y.sum(-1), batch=rows)
  network = make([module]).network
  spec = network.specs["layers/0"]
  assert spec.state == {} and hasattr(module, "kept")
  got, _ = network.call("layers/0", *spec.init(jax.random.key(0)), x, True, inputs(None))
  np.testing.assert_array_equal(got, want)
  with pytest.raises(
    StackError, match=r"layers\[0\] \(SownNnx\) makes the variable kept \(Losses\)"
  ):
    make([functools.partial(SownNnx, Losses)])


def test_partitioned_parameters_are_unboxed():
  kernel_init = nn.with_partitioning(nn.initializers.ones_init(), (None, "tensor"))
  params = stack(linen(nn.Dense(5, kernel_init=kernel_init), X)).init(jax.random.key(0), BATCH)
  assert params["layers"]["kernel"].shape == (1, 5, 5)
