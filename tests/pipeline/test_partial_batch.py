"""The last batch of an epoch, which has fewer rows than the microbatches divide."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpipe


def rows(B):
  rng = np.random.default_rng(B)
  return {
    "x": rng.normal(size=(B, 6)).astype(np.float32),
    "y": rng.normal(size=B).astype(np.float32),
  }


def each_row(y, batch):
  return (y[:, 0] - batch["y"]) ** 2


def each_place(y, batch):
  return jnp.abs(y - batch["y"][:, None]) * jnp.arange(1.0, 4.0)[None]


def modules(kind):
  linear = functools.partial(nnx.Linear, rngs=nnx.Rngs(0))
  if kind == "alike":
    return [linear(6, 6) for _ in range(2)]
  return [linear(6, 5), nnx.relu, linear(5, 3)]


def made(loss, layers, mesh="stage:2", example=8, name="1f1b"):
  pipe = jaxpipe.pipeline(loss, layers, rows(example), mesh=mesh, schedule=name, microbatches=2)
  return dataclasses.replace(pipe, options={**pipe.options, "unroll": "none"})


@pytest.mark.parametrize(
  "kind, loss, mesh, sizes",
  [
    ("alike", each_row, "stage:2", (7, 3)),
    ("unlike", each_place, "stage:2,data:2", (5, 2)),  # of two rows, one device has all
    ("unlike", each_row, "stage:2", (1, 9)),
  ],
)
def test_loss_and_gradients_are_those_of_the_rows_that_are_there(kind, loss, mesh, sizes):
  layers = modules(kind)
  pipe = made(loss, layers, mesh)
  params = pipe.init(jax.random.key(0), rows(8))
  for B in sizes:
    batch = rows(B)

    def mean(layers, batch=batch):
      x = batch["x"]
      for layer in layers:
        x = layer(x)
      return loss(x, batch).mean()

    own = nnx.List([layer for layer in layers if isinstance(layer, nnx.Module)])
    true, true_grads = nnx.value_and_grad(lambda own, mean=mean: mean(own_in_place(layers, own)))(
      own
    )
    given = batch if B % 2 else jax.tree.map(jnp.asarray, batch)  # NumPy, and JAX's arrays
    (value, _), grads = pipe.value_and_grad(params, given)
    np.testing.assert_allclose(value, true, rtol=1e-6)
    np.testing.assert_allclose(pipe.evaluate(params, given)[0], true, rtol=1e-6)
    trees = pipe.stack.network.split(pipe.unplace(grads))
    found = [trees[name] for name in trees if name.startswith("layers/") and trees[name]]
    for mine, theirs in zip(found, (true_grads[i] for i in range(len(own))), strict=True):
      for name in ("kernel", "bias"):
        np.testing.assert_allclose(mine[name], theirs[name][...], rtol=1e-5, atol=1e-6)


def own_in_place(layers, own):
  """The row of modules with those of `own` in the places of theirs."""
  new = iter(own)
  return [next(new) if isinstance(layer, nnx.Module) else layer for layer in layers]


def sums(y, batch):
  return each_row(y, batch).sum(), 1.0 * len(y), {}


def test_rows_that_fill_up_are_refused_where_they_would_count():
  params_of = lambda pipe: pipe.init(jax.random.key(0), rows(8))  # noqa: E731
  pipe = made(sums, modules("unlike"))
  for call in (pipe.value_and_grad, pipe.evaluate):
    with pytest.raises(ValueError, match="the loss returns sums, from which rows that only fill"):
      call(params_of(pipe), rows(7))
  own = jaxpipe.pipeline(
    None,
    jaxpipe.LayerStack(embed=Take, layers=[Same] * 2, head=Sums),
    mesh="stage:2",
    microbatches=2,
  )
  with pytest.raises(ValueError, match=r"7 rows cannot be cut .* 2 rows, the last of .* weight 0"):
    own.evaluate(params_of(own), rows(7))


class Take(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, batch):
    return self.inner(batch["x"])


class Same(nnx.Module):
  def __init__(self, rngs):
    self.inner = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x, context):
    return self.inner(x)


class Sums(nnx.Module):
  def __init__(self, rngs):
    pass

  def __call__(self, y, batch):
    return sums(y, batch)


def test_statistics_of_rows_that_fill_up_are_refused_in_training_alone():
  norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
  pipe = made(each_row, [norm, nnx.Linear(6, 1, rngs=nnx.Rngs(1))])
  key, batch = jax.random.key(0), rows(7)
  params, state = pipe.init(key, batch), pipe.init_state(key, batch)
  with pytest.raises(ValueError, match=r"7 rows cannot be filled up .* for layers\[0\] would"):
    pipe.value_and_grad(params, batch, key, state)
  value, _ = pipe.evaluate(params, batch, state)
  y = pipe.predict(params, batch, state)
  np.testing.assert_allclose(value, each_row(y, batch).mean(), rtol=1e-5)


class Tabled(nnx.Module):
  """Reads a table and a scalar of the batch beside its x."""

  def __init__(self, rngs):
    self.inner = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x, context):
    return self.inner(x) * context.batch["heat"] @ context.batch["a_table"]


def heated(y, batch):
  return (y[:, 0] - batch["y"]) ** 2 * batch["heat"] + batch["a_table"].sum()


@pytest.mark.parametrize("kind", ["alike", "unlike"])
def test_entries_without_rows_are_passed_whole(kind):
  """A scalar, and a table that says so; its name comes first, and it has as many rows as B."""
  table = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
  tables = {**rows(6), "heat": np.float32(0.5), "a_table": jaxpipe.Whole(table)}
  layers = [Tabled(nnx.Rngs(i)) for i in range(2)] + ([] if kind == "alike" else [nnx.relu])
  mesh = "stage:2" if kind == "alike" else "stage:2,data:3"
  pipe = jaxpipe.pipeline(
    heated, layers, tables, mesh=mesh, schedule="1f1b", microbatches=2, partition="uniform"
  )
  pipe = dataclasses.replace(pipe, options={**pipe.options, "unroll": "none"})
  params = pipe.init(jax.random.key(0), tables)
  for B in (6, 4):
    batch = {**rows(B), "heat": np.float32(0.25 * B), "a_table": table}

    def mean(layers, batch=batch):
      x, context = batch["x"], SimpleNamespace(batch=batch)
      for layer in layers:
        x = layer(x, context)
      return heated(x if kind == "alike" else nnx.relu(x), batch).mean()

    true, true_grads = nnx.value_and_grad(mean)(nnx.List(layers[:2]))
    given = {**batch, "a_table": jaxpipe.Whole(table)}
    (value, _), grads = pipe.value_and_grad(params, given)
    np.testing.assert_allclose(value, true, rtol=1e-5)
    np.testing.assert_allclose(pipe.evaluate(params, given)[0], true, rtol=1e-5)
    assert pipe.predict(params, given).shape == (B, 6)
    found = pipe.stack.network.split(pipe.unplace(grads))
    for i in range(2):
      mine, theirs = found[f"layers/{i}"]["inner"]["kernel"], true_grads[i]["inner"]["kernel"]
      np.testing.assert_allclose(mine, theirs[...], rtol=1e-4, atol=1e-5)
  assert pipe.check(tables).ok


def test_entries_of_another_number_of_rows_are_refused_with_the_word_for_them():
  table = {**rows(8), "table": np.ones((5, 2), np.float32)}
  with pytest.raises(ValueError, match=r"batch\['table'\] has 5.*; use .*jaxpipe\.Whole\(array\)"):
    jaxpipe.pipeline(each_row, modules("alike"), table, mesh="stage:2", microbatches=2)
  nothing = {"x": np.float32(1), "y": np.float32(2)}
  with pytest.raises(ValueError, match="has rows"):
    jaxpipe.pipeline(each_row, modules("alike"), nothing, mesh="stage:2", microbatches=2)
