"""Leaves laid end to end."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpipe.parallel.flat import ROW, TILE, Flat, read_span, widest, write_span

TREE = {
  "a": jnp.arange(6.0).reshape(2, 3),
  "b": (jnp.arange(2 * TILE, dtype=jnp.float32), jnp.arange(3), jnp.float32(7)),
  "c": jnp.zeros((0, 4)),
}


def test_a_tree_comes_back_as_it_was_packed():
  flat = Flat.of(TREE)
  other = Flat.of({"x": jnp.zeros(5000)})
  widths = widest([flat, other])
  packed = flat.pack(TREE, widths)
  assert {name: len(buffer) for name, buffer in packed.items()} == widths
  back = flat.unpack(packed)
  jax.tree.map(np.testing.assert_array_equal, back, TREE)
  stacked = {name: jnp.stack([buffer, buffer]) for name, buffer in packed.items()}
  jax.tree.map(np.testing.assert_array_equal, flat.unpack(stacked, 1), TREE)


def test_no_two_leaves_overlap_and_large_ones_begin_at_tiles():
  flat = Flat.of(TREE)
  spans = sorted(
    (offset, offset + leaf.size)
    for leaf, offset in zip(flat.leaves, flat.offsets, strict=True)
    if leaf.dtype == jnp.float32
  )
  assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
  assert all(offset % ROW == 0 for offset in flat.offsets)
  assert flat.used["float32"] == 6 + 2 * TILE + 1 and flat.widths["int32"] == ROW


def test_padding_is_zero():
  flat = Flat.of({"a": jnp.ones(3)})
  assert flat.pack({"a": jnp.ones(3)}, {"float32": 300})["float32"].sum() == 3


def test_moments_may_be_wider_than_parameters():
  flat = Flat.of({"a": jnp.ones(3, jnp.bfloat16)})
  assert flat.pack({"a": jnp.ones(3, jnp.float32)}, flat.widths)["bfloat16"].dtype == jnp.float32


@pytest.mark.parametrize("offset", [0, 128])
def test_spans_are_read_where_they_were_written(offset):
  buffer = write_span(jnp.zeros((2, 512)), jnp.ones((4, 8)), offset, 1)
  assert buffer.sum() == buffer[1, offset : offset + 32].sum() == 32
  np.testing.assert_array_equal(read_span(buffer, (4, 8), offset, 1), np.ones((4, 8)))
