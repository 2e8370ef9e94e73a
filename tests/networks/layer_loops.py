"""Layers with loops, branches and derivative rules of their own; most start from a constant."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from networks.layer_ends import D, T, dense, layer


@layer(dense, dense)
def recurrent(h, gate, candidate):
  """A gated recurrence over positions, its state starting from zeros."""

  def step(state, token):
    z = jax.nn.sigmoid(gate(token + state))
    state = z * state + (1 - z) * jnp.tanh(candidate(token + state))
    return state, state

  start = jnp.zeros((len(h), D))
  return lax.scan(step, start, h.swapaxes(0, 1))[1].swapaxes(0, 1)


@jax.custom_vjp
def softmax_attention(q, k, v):
  return _attend(q, k, v)[0]


def _attend(q, k, v):
  scores = jnp.einsum("btd,bsd->bts", q, k)
  best = jnp.argmax(scores, axis=-1)  # saved: the backward pass computes the scores again
  top = jnp.take_along_axis(scores, best[..., None], axis=-1)
  total = jnp.sum(jnp.exp(scores - top), axis=-1, keepdims=True)
  return jnp.einsum("bts,bsd->btd", jnp.exp(scores - top) / total, v), best, total


def _attend_backward(saved, dy):
  q, k, v, y, best, total = saved
  scores = jnp.einsum("btd,bsd->bts", q, k)
  top = jnp.take_along_axis(scores, best[..., None], axis=-1)
  p = jnp.exp(scores - top) / total
  dp = jnp.einsum("btd,bsd->bts", dy, v)
  ds = p * (dp - jnp.sum(y * dy, axis=-1, keepdims=True))
  products = (("bts,bsd->btd", ds, k), ("bts,btd->bsd", ds, q), ("bts,btd->bsd", p, dy))
  return tuple(jnp.einsum(*product) for product in products)


def _attend_forward(q, k, v):
  y, best, total = _attend(q, k, v)
  return y, (q, k, v, y, best, total)


softmax_attention.defvjp(_attend_forward, _attend_backward)


@layer(dense, dense, dense)
def custom_vjp(h, q, k, v):
  return softmax_attention(q(h), k(h), v(h))


@jax.custom_vjp
def doubled(h, mask):
  return 2 * h


# Its rule returns a fresh zero for the mask, and its gradient is not that of the function.
doubled.defvjp(lambda h, mask: (2 * h, mask), lambda mask, dy: (3 * dy, jnp.zeros(mask.shape)))


@layer(dense)
def custom_vjp_in_a_loop(h, inner):
  body = lambda sum, t: (sum + doubled(inner(t), jnp.cos(t)), None)  # noqa: E731
  return lax.scan(body, jnp.zeros((len(h), D)), h.swapaxes(0, 1))[0][:, None]


@jax.custom_jvp
def crooked(h):
  return jnp.sin(h)


crooked.defjvp(lambda primals, tangents: (crooked(*primals), 2 * tangents[0]))


@layer(dense)
def custom_jvp(h, inner):
  return crooked(inner(h))


@layer(dense)
def while_in_scan(h, inner):
  def body(state, token):
    more = lambda n: n[0] < 3  # noqa: E731
    count = lambda n: (n[0] + 1, n[1] + (token[:, 0] > n[0] - 1))  # noqa: E731
    above = lax.while_loop(more, count, (0, jnp.zeros(len(h))))[1]  # carries no gradient
    state = lax.fori_loop(0, 2, lambda i, s: jnp.tanh(inner(s) + token), state)
    return state, state * above[:, None]

  return lax.scan(body, jnp.zeros((len(h), D)), h.swapaxes(0, 1))[1].swapaxes(0, 1)


class DropoutInScan(nnx.Module):
  """Other masks at each position, in a loop that starts from zeros."""

  def __init__(self, rngs):
    self.inner = dense(rngs)

  def __call__(self, x, context):
    def step(state, numbered):
      i, token = numbered
      state = jnp.tanh(self.inner(context.dropout(token + state, 0.3, iteration=i)))
      return state, state

    steps = x["h"].swapaxes(0, 1)
    states = lax.scan(step, jnp.zeros(steps.shape[1:]), (jnp.arange(T), steps))[1]
    return {**x, "h": x["h"] + states.swapaxes(0, 1)}


@layer(dense)
def cond(h, inner):
  return lax.cond(jnp.sum(h) > 0, lambda: inner(h), lambda: jnp.zeros(h.shape))


@layer(dense)
def switch(h, inner):
  branches = [lambda h: inner(h), lambda h: jnp.ones(h.shape), lambda h: jnp.sin(h)]
  which = jnp.argmax(jnp.sum(h, axis=(0, 1))[:3])
  return lax.switch(which, branches, h)
