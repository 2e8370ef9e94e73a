"""Exactness of the models that stress corners: five schedules over two devices, float64."""

import jax
import jax.numpy as jnp

import jaxpipe

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-v", "chimera")


def shaken(params, scale=0.3):
  """Parameters away from where they start: gates that start at zero hide what is behind them."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  moved = [
    p + scale * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(structure, moved)


def check(stack, name, batch, microbatches=2):
  """Every gradient leaf of the pipeline against the unpipelined model's."""
  schedule = jaxpipe.make_schedule(name, devices=2, microbatches=microbatches)
  params = shaken(stack.init(jax.random.key(1), batch))
  report = jaxpipe.check(stack, schedule, jaxpipe.make_mesh("stage:2"), batch, params=params)
  assert report.ok and report.tolerance == 1e-12, str(report)


def float64_leaves(batch):
  """The batch with floats in double precision."""
  return {
    name: jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
    for name, leaf in batch.items()
  }
