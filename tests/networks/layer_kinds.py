"""Layers of every kind that a user may bring."""

import functools

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import lax
from networks import layer_loops, lm
from networks.layer_ends import D, Embed, Head, Param, T, dense, example, layer

from jaxpipe.stack.linen import linen as from_linen
from jaxpipe.stack.stack import LayerStack


@layer(dense)
def linear(h, inner):
  return jnp.tanh(inner(h))


def wide(rngs):
  return nnx.Linear(D, 64, rngs=rngs, param_dtype=jnp.float64)


def narrow(rngs):
  return nnx.Linear(64, D, rngs=rngs, param_dtype=jnp.float64)


@layer(wide, narrow)
def perceptron(h, up, down):
  return down(jax.nn.relu(up(h)))


@layer(lambda rngs: nnx.Conv(D, D, (3,), rngs=rngs, param_dtype=jnp.float64))
def conv(h, inner):
  return jnp.tanh(inner(h))


@layer(lambda rngs: nnx.LayerNorm(D, rngs=rngs, param_dtype=jnp.float64), dense)
def layer_norm(h, norm, inner):
  return inner(norm(h))


@layer(lambda rngs: nnx.GroupNorm(D, 2, rngs=rngs, param_dtype=jnp.float64), dense)
def group_norm(h, norm, inner):
  return inner(norm(h))


def scores(query, key, value, **unused):
  return lm.attention(query, key, value, is_causal=False)  # nnx's own softmaxes in float32


@layer(
  lambda rngs: nnx.MultiHeadAttention(
    2, D, decode=False, attention_fn=scores, rngs=rngs, param_dtype=jnp.float64
  )
)
def attention(h, inner):
  return inner(h)


@layer(dense, dense)
def rematerialized(h, a, b):
  return nnx.remat(lambda a, b, h: b(jnp.tanh(a(h))))(a, b, h)


@layer(dense)
def shared(h, inner):
  return inner(jnp.tanh(inner(h)))


class Mixture(nnx.Module):
  """Two of three experts a token, and a loss that keeps them in balance."""

  def __init__(self, rngs):
    self.router = dense(rngs, 3)
    draw = functools.partial(jax.random.normal, dtype=jnp.float64)
    self.experts = Param(draw(rngs.params(), (3, D, D)) / 2)

  def __call__(self, x, context):
    gates = jax.nn.softmax(self.router(x["h"]))
    values, chosen = lax.top_k(gates, 2)
    weights = jnp.take(self.experts[...], chosen, axis=0)  # [rows, T, 2, D, D]
    y = jnp.einsum("btd,btkde,btk->bte", x["h"], weights, values)
    share = jnp.mean(jax.nn.one_hot(chosen[..., 0], 3), axis=1)
    balance = jnp.sum(share * jnp.mean(gates, axis=1), axis=1)
    return {**x, "h": x["h"] + jnp.tanh(y), "aux": x["aux"] + balance}


class Nested(nnx.Module):
  """Reads the integer and boolean leaves of x, changes them, and passes them on."""

  def __init__(self, rngs):
    self.inner = dense(rngs)

  def __call__(self, x, context):
    order, flags = x["more"]
    turned = jnp.take_along_axis(x["h"], order[..., None], axis=1)
    h = x["h"] + jnp.where(flags[..., None], self.inner(turned), 0.5 * turned)
    return {"h": h, "aux": x["aux"], "more": (jnp.roll(order, 1, axis=1), h[..., 0] > 0.1)}


@layer(dense, dense)
def state_space(h, a, b):
  decay = jax.nn.sigmoid(a(h))
  combine = lambda one, two: (one[0] * two[0], one[1] * two[0] + two[1])  # noqa: E731
  states = lax.associative_scan(combine, (decay, b(h)), axis=1)[1]
  return jnp.cumsum(states, axis=1) / T


@layer(dense)
def fourier(h, inner):
  return jnp.real(jnp.fft.fft2(inner(h))) / T


@layer(dense)
def sorting(h, inner):
  return jnp.sort(inner(h), axis=1)


@layer(dense)
def bfloat16(h, inner):
  return jnp.tanh(inner(h).astype(jnp.bfloat16)).astype(h.dtype)


class LinenBlock(linen.Module):
  @linen.compact
  def __call__(self, x, context):
    normed = linen.LayerNorm(param_dtype=jnp.float64)(x["h"])
    y = linen.Dense(D, param_dtype=jnp.float64)(context.dropout(jnp.tanh(normed), 0.3))
    return {**x, "h": x["h"] + y}


def linen_block(rngs):
  return from_linen(LinenBlock(), example())(rngs)


LAYERS = dict(
  linear=linear,
  perceptron=perceptron,
  conv=conv,
  layer_norm=layer_norm,
  group_norm=group_norm,
  attention=attention,
  recurrent=layer_loops.recurrent,
  rematerialized=rematerialized,
  shared=shared,
  mixture=Mixture,
  nested=Nested,
  custom_vjp=layer_loops.custom_vjp,
  custom_vjp_in_a_loop=layer_loops.custom_vjp_in_a_loop,
  custom_jvp=layer_loops.custom_jvp,
  while_in_scan=layer_loops.while_in_scan,
  dropout_in_scan=layer_loops.DropoutInScan,
  cond=layer_loops.cond,
  switch=layer_loops.switch,
  state_space=state_space,
  fourier=fourier,
  sorting=sorting,
  bfloat16=bfloat16,
  linen=linen_block,
)


def stack(name, layers=2):
  return LayerStack(embed=Embed, layers=[LAYERS[name]] * layers, head=Head)
