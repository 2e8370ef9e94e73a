"""Parameters, or their shapes alone, without compiling what a stack would draw them by."""

import jax
import numpy as np

from jaxpipe.parallel.placing import shardings
from jaxpipe.stack.stack import LayerStack


def drawn(stack: LayerStack, seed: int = 1) -> dict:
  """Canonical parameters: scales of norms about 1, all else normal with deviation 0.4."""
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    about = 1.0 if jax.tree_util.keystr(path[-1:], simple=True) == "scale" else 0.0
    values = np.asarray(about + 0.4 * rng.standard_normal(shape.shape), shape.dtype)
    return jax.numpy.asarray(values)

  return jax.tree_util.tree_map_with_path(leaf, stack.param_shapes())


def placed_shapes(stack: LayerStack, schedule, mesh) -> dict:
  """Shapes of placed parameters that are never made: enough to compile a step."""
  shapes = stack.param_shapes()
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    shapes,
    shardings(shapes, stack, schedule, mesh),
  )


def drawn_state(stack: LayerStack, seed: int = 2) -> dict:
  """Canonical statistics of a stack whose state is floats: variances positive, the rest normal."""
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    values = 0.4 * rng.standard_normal(shape.shape)
    if jax.tree_util.keystr(path[-1:], simple=True) == "var":
      values = 0.5 + np.abs(values)
    return jax.numpy.asarray(np.asarray(values, shape.dtype))

  return jax.tree_util.tree_map_with_path(leaf, stack.state_shapes())
