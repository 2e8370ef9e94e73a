"""Cross-entropy over a cut vocabulary, a chunk of positions at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as Spec

import jaxpipe
from jaxpipe.models.transformer.cross_entropy import cross_entropy, look_up
from jaxpipe.pipeline.layer.interpret import bodies

B, T, D, V = 2, 64, 8, 16


def arrays(dtype, T=T):
  rng = np.random.default_rng(0)
  h, table = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
  targets = rng.integers(0, V, (B, T), np.int32)
  weights = (rng.random((B, T)) < 0.7).astype(np.float32)
  return jnp.asarray(h, dtype), jnp.asarray(table), jnp.asarray(targets), jnp.asarray(weights)


def plain(h, table, targets, weights):
  logits = h @ table.T
  own = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
  return -jnp.sum(own * weights), jnp.sum((logits.argmax(-1) == targets) * weights)


@pytest.mark.parametrize("chunk", [0, 1, 16])
@pytest.mark.parametrize("t", [1, 4])
def test_it_is_the_whole_softmaxs(float64, chunk, t):
  args = arrays(jnp.float64)

  def local(*args):
    # As inside the pipeline, where everything varies; each of t devices counts the loss.
    have = [jax.typeof(x).manual_axis_type.varying for x in args]
    h, table, targets, weights = (
      x if "tensor" in axes else jax.lax.pcast(x, ("tensor",), to="varying")
      for x, axes in zip(args, have, strict=True)
    )

    def loss(h, table):
      return cross_entropy(h, table, targets, weights, chunk)

    dh, dtable = jax.grad(lambda *a: loss(*a).loss, (0, 1))(h, table)
    sums = loss(h, table)
    alike = jax.lax.psum((sums.loss, sums.correct, dh), "tensor")
    return jax.tree.map(lambda x: x / t, (*alike, dtable))

  run = jax.shard_map(
    local,
    mesh=jaxpipe.make_mesh(f"tensor:{t}"),
    in_specs=(Spec(), Spec("tensor"), Spec(), Spec()),
    out_specs=(Spec(), Spec(), Spec(), Spec("tensor")),
  )
  loss, correct, *gradients = jax.jit(run)(*args)
  want, right = plain(*args)
  assert abs(loss - want) < 1e-12 * abs(want) and correct == right
  for got, true in zip(gradients, jax.grad(lambda *a: plain(*a)[0], (0, 1))(*args), strict=True):
    np.testing.assert_allclose(got, true, rtol=1e-12, atol=1e-12)


def test_chunks_sum_the_tables_gradient_in_its_own_precision():
  h, table, targets, weights = arrays(jnp.bfloat16, T=512)

  def gradient(chunk):
    return jax.grad(lambda table: cross_entropy(h, table, targets, weights, chunk).loss)(table)

  whole, chunked = gradient(0), gradient(8)
  assert whole.dtype == chunked.dtype == jnp.float32
  true = jax.grad(lambda table: plain(h.astype(jnp.float32), table, targets, weights)[0])(table)
  far_whole, far_chunked = (jnp.abs(g - true).max() / jnp.abs(true).max() for g in (whole, chunked))
  assert far_chunked < 2 * far_whole < 0.02


@pytest.mark.parametrize("target", [-1, V])
def test_a_target_without_a_row_is_nan_unless_it_is_padding(target):
  h, table, targets, weights = arrays(jnp.float32)
  odd = targets.at[0, 0].set(target)

  def loss(weight):
    return cross_entropy(h, table, odd, weights.at[0, 0].set(weight), 0).loss

  assert jnp.isnan(loss(1.0)) and jnp.isfinite(loss(0.0))


def test_an_id_without_a_row_is_nan_on_a_cut_table_as_on_a_whole_one():
  table, ids = jnp.ones((V, D)), jnp.array([[0, -1, V]])
  cut = jax.shard_map(
    lambda table: jax.lax.psum(look_up(table, ids), "tensor"),
    mesh=jaxpipe.make_mesh("tensor:4"),
    in_specs=Spec("tensor"),
    out_specs=Spec(),
  )
  for rows in (look_up(table, ids), cut(table)):
    assert jnp.isnan(rows).all(axis=-1).tolist() == [[False, False, True]]


def largest(jaxpr):
  """Elements of the largest array that a program makes, loops and calls included."""
  sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
  return max([0, *sizes, *(largest(body) for e in jaxpr.eqns for body in bodies(e))])


def test_no_array_of_tokens_and_vocabulary_is_ever_whole():
  h, table, targets, weights = arrays(jnp.float32)

  def most(chunk):
    def loss(h, table):
      return cross_entropy(h, table, targets, weights, chunk).loss

    return largest(jax.make_jaxpr(jax.grad(loss, (0, 1)))(h, table).jaxpr)

  assert most(0) >= B * T * V
  # The largest are then the activations themselves.
  assert most(8) == B * T * D < B * T * V
