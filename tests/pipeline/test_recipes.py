"""The recipes of docs/guide.md, run as they stand there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpipe

GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "guide.md"


def recipe(name: str) -> str:
  """The block that imports something of this library."""
  blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
  (found,) = [block for block in blocks if re.match(rf"(from|import) {name}\b", block)]
  return found


@pytest.mark.parametrize("name", ["orbax", "safetensors"])
def test_a_recipe_carries_values_to_another_mesh(tmp_path, name):
  batch = {"x": np.ones((8, 4), np.float32)}
  modules = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3)] + [jnp.tanh]

  def pipeline(mesh, schedule):
    return jaxpipe.pipeline(
      lambda y, batch: y.sum(-1), modules, batch, mesh=mesh, schedule=schedule, microbatches=2
    )

  pipe, other, key = pipeline("stage:4", "1f1b"), pipeline("stage:2", "zb-h1"), jax.random.key(0)
  tx = optax.lamb(1e-3)
  params = jax.tree.map(lambda p: 2 * p, pipe.init(key, batch))
  opt_state = jax.tree.map(lambda p: 3 + p, pipe.optimizer(tx).init(params))
  known = dict(
    jax=jax, np=np, folder=tmp_path, pipe=pipe, other=other, key=key, batch=batch, tx=tx,
    params=params, opt_state=opt_state,
  )  # fmt: skip
  exec(recipe(name), known)
  same = np.testing.assert_array_equal
  jax.tree.map(same, other.unplace(known["params"]), pipe.unplace(params))
  # `pipe`'s rows are other ones than `other`'s.
  assert jax.tree.leaves(params)[0].shape != jax.tree.leaves(known["params"])[0].shape
  if name == "orbax":
    jax.tree.map(same, other.unplace(known["opt_state"]), pipe.unplace(opt_state))
