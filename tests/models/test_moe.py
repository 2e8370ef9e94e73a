"""Mixture of experts: every mesh gives the values and gradients of a loop over tokens."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxpipe import make_mesh
from jaxpipe.models.moe import Experts, MoeConfig, check_experts, expert_dims
from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import AXES, ROWS
from jaxpipe.pipeline import hlo
from jaxpipe.pipeline.varying import collectives, vary

B, T, D, F, E, K = 8, 32, 4, 6, 8, 2
DROPLESS = dict(capacity_factor=0.0, group=0)
TIGHT = dict(capacity_factor=1.0, group=2)  # one slot each: two positions that agree clash
ROOMY = dict(capacity_factor=1.1, group=8)  # three slots each


def config(**changes):
  return MoeConfig(**{**dict(experts=E, top_k=K, balance=0.3, z=0.2, **DROPLESS), **changes})


def module(config, positions_cut=False, dtype=jnp.float64):
  options = dict(dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), out_scale=0.5)
  return Experts(config, D, F, positions_cut=positions_cut, **options)


def inputs():
  """Parameters far from zero, and what y and aux are multiplied by in the loss."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
  return draw(B, T, D), draw(B, T, D), draw(B)


def parameters(experts):
  rng = np.random.default_rng(2)
  return jax.tree.map(lambda p: rng.standard_normal(p.shape), nnx.split(experts)[1])


def seats(chosen_BTK, config):
  """Who finds a slot, token by token, bool [B, T, K]."""
  if not config.capacity_factor:
    return np.ones(chosen_BTK.shape, bool)
  S = config.group or T
  C = math.ceil(round(config.capacity_factor * S * config.top_k / config.experts, 6))
  found = np.zeros(chosen_BTK.shape, bool)
  for b in range(B):
    for start in range(0, T, S):
      taken = [0] * config.experts
      for k in range(config.top_k):
        for t in range(start, start + S):
          e = chosen_BTK[b, t, k]
          found[b, t, k] = taken[e] < C
          taken[e] += 1
  return found


def oracle(params, x, config):
  """Every expert is applied to every token; NumPy decides which of the results count."""
  p = dict(params)
  logits = x @ p["router"]
  chosen = np.argsort(-np.asarray(jax.lax.stop_gradient(logits)), axis=-1, kind="stable")
  chosen = chosen[..., : config.top_k]
  probability = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
  weights = jnp.stack([probability[b, t, chosen[b, t]] for b in range(B) for t in range(T)])
  if config.normalize:
    weights = weights / weights.sum(-1, keepdims=True)
  weights = weights.reshape(chosen.shape) * seats(chosen, config)
  every = [mlp(x, *(p[name][e] for name in ("gate", "up", "down"))) for e in range(config.experts)]
  y = sum(
    jnp.sum(jnp.where(chosen == e, weights, 0), axis=-1)[..., None] * out
    for e, out in enumerate(every)
  )
  if config.shared:
    y = y + mlp(x, *(p[f"shared_{name}"] for name in ("gate", "up", "down")))
  return y, losses(logits, probability, chosen, config)


def mlp(x, gate, up, down):
  opened = x @ gate
  return (opened / (1 + jnp.exp(-opened)) * (x @ up)) @ down


def losses(logits, probability, chosen, config):
  rows = []
  for b in range(B):
    often = np.bincount(chosen[b].ravel(), minlength=config.experts)
    often = often * config.experts / (config.top_k * T)
    uneven = jnp.sum(often * probability[b].mean(axis=0))
    top = jnp.log(jnp.exp(logits[b]).sum(axis=-1))
    rows.append(config.balance * T * uneven + config.z * jnp.sum(top**2))
  return jnp.stack(rows)


def specs(experts, positions_cut):
  """Where parameters lie, by their dims, and x."""
  config = experts.config
  lies = {"experts": config.axes, "mlp": () if config.folded else ("tensor",)}
  of = lambda dims: PartitionSpec(*(lies.get(dim, ()) for dim in dims))  # noqa: E731
  params = {name: of(dims) for name, dims in expert_dims(config).items()}
  return params, PartitionSpec(ROWS, ("sequence", "tensor") if positions_cut else "sequence")


def zigzag(count):
  """Positions in the order in which `count` devices hold them: chunk i and the i-th from the end."""
  chunks = np.arange(T).reshape(2 * count, -1) if count > 1 else np.arange(T)[None]
  order = [i for d in range(count) for i in (d, 2 * count - 1 - d)] if count > 1 else [0]
  return np.concatenate([chunks[i] for i in order])


def on_mesh(config, text, positions_cut):
  """Values and gradients over a mesh: y and aux of every tensor device, gradients summed."""
  mesh, experts = make_mesh(text), module(config, positions_cut)
  graph, state = nnx.split(experts)
  of_params, of_x = specs(experts, positions_cut)
  of_y = PartitionSpec(("stage", "tensor"), ROWS, "sequence")
  of_aux = PartitionSpec(("stage", "tensor"), ROWS)

  def local(params, x, w_y, w_aux):
    params, x, w_y, w_aux = vary((params, x, w_y, w_aux), AXES)

    def loss(params, x):
      y, aux = nnx.merge(graph, nnx.State(params))(x)
      if positions_cut:
        y = axes.gather(y, "tensor", 1)
      return jnp.sum(y * w_y) + jnp.sum(aux * w_aux), vary((y, aux), AXES)

    (_, (y, aux)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    grads = jax.tree.map(whole, grads, (of_params, of_x))
    return y[None], jax.lax.psum(aux, "sequence")[None], *grads

  def whole(grad, spec):
    named = {a for entry in spec for a in ([entry] if isinstance(entry, str) else entry or ())}
    return jax.lax.psum(grad, tuple(a for a in AXES if a not in named)) / axes.size("tensor")

  out = (of_y, of_aux, of_params, of_x)
  given = (of_params, of_x, PartitionSpec(ROWS, "sequence"), PartitionSpec(ROWS))
  step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=out))
  order = zigzag(mesh.shape["sequence"])
  x, w_y, w_aux = inputs()
  params = {name: parameters(experts)[name] for name in of_params}
  params = jax.tree.map(lambda v: v[...], params, is_leaf=lambda v: isinstance(v, nnx.Variable))
  y, aux, g_params, g_x = jax.device_get(step(params, x[:, order], w_y[:, order], w_aux))
  back = np.argsort(order)
  return y[:, :, back], aux, g_params, g_x[:, back]


CACHE = {}


def expected(config):
  if config not in CACHE:
    experts = module(config)
    state = parameters(experts)
    params = {name: jnp.asarray(state[name][...]) for name in expert_dims(config)}
    x, w_y, w_aux = inputs()
    x = jnp.asarray(x)

    chosen = np.argsort(-np.asarray(x @ params["router"]), axis=-1, kind="stable")

    def loss(params, x):
      y, aux = fixed(params, x)
      return jnp.sum(y * w_y) + jnp.sum(aux * w_aux), (y, aux)

    fixed = lambda params, x: oracle(params, x, config)
    grads, (y, aux) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    dropped = int(np.sum(~seats(chosen[..., : config.top_k], config)))
    CACHE[config] = (y, aux, *grads), dropped
  return CACHE[config]
