"""Rows of several documents give what each document gives alone, with learned positions too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from networks import lm

import jaxpipe
from jaxpipe.models.transformer.ends import places
from jaxpipe.parallel import sequence
from jaxpipe.parallel.mesh import AXES
from jaxpipe.parallel.tensor import own_piece

T = 8
LENGTHS = [[3, 5], [8], [1, 1, 4, 2], [4, 4]]


def rows():
  """Packed rows, and the same documents, each alone in a row of its own with padding behind."""
  rng = np.random.default_rng(0)
  zeros = dict(tokens=np.int32(0), targets=np.int32(0), weights=0.0)
  alone = {name: np.full((sum(map(len, LENGTHS)), T), zero) for name, zero in zeros.items()}
  packed = {name: np.full((len(LENGTHS), T), zero) for name, zero in zeros.items()}
  packed["segments"] = np.zeros((len(LENGTHS), T), np.int32)
  document = 0
  for row, lengths in enumerate(LENGTHS):
    start = 0
    for i, n in enumerate(lengths):
      tokens = rng.integers(0, lm.VOCABULARY, n + 1)
      for batch, at in ((packed, (row, slice(start, start + n))), (alone, (document, slice(n)))):
        batch["tokens"][at], batch["targets"][at] = tokens[:-1], tokens[1:]
        batch["weights"][at] = 1
      packed["segments"][row, start : start + n] = 7 - i  # names of documents, in no order
      start, document = start + n, document + 1
  return packed, alone


def test_packed_documents_with_learned_positions_are_those_alone(float64):
  """Positions went on through the row, so that a document's depended on what stood before it."""
  options = dict(layers=2, dropout=0.0, positions="learned", max_positions=T, kv_heads=2)
  packed, alone = rows()
  whole = lm.stack(**options)
  params = whole.init(jax.random.key(0), packed)
  (loss, _), grads = jaxpipe.reference_value_and_grad(whole, 1)(params, alone)
  schedule = jaxpipe.make_schedule("1f1b", devices=2, microbatches=2)
  pipe = jaxpipe.pipeline(None, whole, mesh="stage:2,sequence:2", schedule=schedule)
  step = jaxpipe.pipeline_value_and_grad(pipe.stack, schedule, pipe.mesh, unroll="none")
  (value, _), mine = step(pipe.place(params), packed)
  assert abs(float(value - loss)) < 1e-12
  for a, b in zip(jax.tree.leaves(pipe.unplace(mine)), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("c, t", [(1, 1), (2, 1), (4, 2), (1, 4)])
def test_places_are_cut_as_positions_are(c, t):
  packed, _ = rows()
  want = np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in LENGTHS])
  mesh = jaxpipe.make_mesh(f"sequence:{c},tensor:{t}")

  def local(segments):
    return own_piece(sequence.take_own(places(segments)).T, t > 1)

  cut = P((*AXES[:4], "sequence", "tensor"))
  run = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=cut, check_vma=False)
  found = np.asarray(jax.jit(run)(jnp.asarray(packed["segments"])))
  np.testing.assert_array_equal(found.T[:, np.argsort(sequence.order(T, c))], want)
