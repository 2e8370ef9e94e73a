"""The ends between which every layer of the zoo stands, and how such a layer is written.

All are modules `(rngs)` called with `(x, context)`, where x is `{"h": [rows, T, D], "aux": [rows],
"more": (int [rows, T], bool [rows, T])}`; most know only h.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

T, D = 6, 4
Param = nnx.Param


def dense(rngs, out=D):
  return nnx.Linear(D, out, rngs=rngs, param_dtype=jnp.float64)


class Embed(nnx.Module):
  """Starts x: floats, and leaves that no parameter touches."""

  def __init__(self, rngs):
    self.project = dense(rngs)

  def __call__(self, batch):
    h = self.project(batch["signal"])
    aux, order = jnp.zeros(len(h)), jnp.argsort(batch["signal"][..., 0], axis=1)
    return {"h": h, "aux": aux, "more": (order, h[:, :, 0] > 0)}


class Head(nnx.Module):
  def __init__(self, rngs):
    self.weight = Param(jax.random.normal(rngs.params(), (D,), jnp.float64))

  def __call__(self, x, batch):
    loss = jnp.sum(jnp.sin(x["h"]) @ self.weight[...]) + 0.1 * jnp.sum(x["aux"])
    return loss, 1.0 * len(x["h"]), {"positive": jnp.sum(x["more"][1])}


def of_h(build):
  """A layer of h alone, from `build(rngs)`, which returns submodules and a function of them."""

  class Layer(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.List(build.parts(rngs))

    def __call__(self, x, context):
      return {**x, "h": x["h"] + build(x["h"], *self.inner)}

  return Layer


def layer(*parts):
  """Decorates a function of `h, *modules`, given the modules' factories."""

  def wrap(function):
    function.parts = lambda rngs: [part(rngs) for part in parts]
    return of_h(function)

  return wrap


def batch(rows=4):
  rng = np.random.default_rng(0)
  return {"signal": rng.normal(size=(rows, T, D))}


def example():
  """An x, as shapes."""
  return jax.eval_shape(lambda b: Embed(nnx.Rngs(0))(b), batch())
