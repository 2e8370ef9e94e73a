"""Positions are labels, so that where one lies can be read off it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpipe.parallel import sequence
from jaxpipe.parallel.mesh import AXES, make_mesh

OTHERS = tuple(axis for axis in AXES if axis != "sequence")


def on_devices(function, *arrays, c):
  """The function's result on each of c devices, joined along its first dim."""
  whole = (P(),) * len(arrays)

  def local(*xs):
    return function(*(jax.lax.pcast(x, AXES, to="varying") for x in xs))

  mapped = jax.shard_map(
    local, mesh=make_mesh({"sequence": c}), in_specs=whole, out_specs=P(("sequence", *OTHERS))
  )
  return np.asarray(jax.jit(mapped)(*arrays))


def test_a_device_holds_an_early_and_a_late_chunk():
  got = on_devices(lambda x: sequence.take_own(x)[None], jnp.arange(16)[None], c=4)
  want = np.array([[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]])
  assert np.array_equal(got[:, 0], want)
  assert np.array_equal(sequence.order(16, 4), want.reshape(16))


@pytest.mark.parametrize("c", [1, 2, 3, 8])
def test_own_positions_are_places_of_the_order(c):
  def take(x):
    own = sequence.own_positions(4 * c) + 0 * x[0]
    return jnp.stack([own, sequence.take_own(x, dim=0)], axis=1)

  got = on_devices(take, jnp.arange(4 * c, dtype=jnp.int32), c=c)
  assert got.dtype == np.int32 and sequence.order(4 * c, c).dtype == np.int32
  assert got[:, 0].tolist() == got[:, 1].tolist() == sequence.order(4 * c, c).tolist()
  assert sorted(got[:, 0].tolist()) == list(range(4 * c))


def test_outside_of_a_mesh_a_device_has_all():
  x = jnp.arange(5)
  assert sequence.own_positions(5).tolist() == x.tolist()
  assert sequence.take_own(x, dim=0) is x
  assert sequence.order(5, 1).tolist() == x.tolist()


@pytest.mark.parametrize("c, ulysses", [(2, 2), (4, 2), (4, 4), (6, 2), (6, 3), (8, 4)])
def test_a_group_holds_two_runs_in_natural_order_with_its_share_of_the_heads(c, ulysses):
  T, N = 4 * c, 2 * ulysses
  positions, heads = jnp.arange(T)[None, :, None, None], 100 * jnp.arange(N)[None, None, :, None]

  def trade(x):
    x = sequence.to_heads(sequence.take_own(x), ulysses)
    return x, sequence.to_positions(x, ulysses)

  label = positions + heads
  got = on_devices(lambda x: trade(x)[0], label, c=c)[..., 0]
  back = on_devices(lambda x: jnp.abs(trade(x)[1] - sequence.take_own(x)), label, c=c)
  r, run = c // ulysses, T // (2 * c // ulysses)
  for device in range(c):
    group, place = divmod(device, ulysses)
    late = 2 * r - 1 - group
    at = [*range(group * run, (group + 1) * run), *range(late * run, (late + 1) * run)]
    assert got[device].tolist() == [[t + 100 * n for n in (2 * place, 2 * place + 1)] for t in at]
  assert not back.any()


@pytest.mark.parametrize("r", [2, 4, 6, 8, 12])
def test_in_a_tournament_all_meet_all(r):
  rounds = sequence.tournament(r)
  for partners in rounds:
    assert partners[partners].tolist() == list(range(r))
  for player, met in enumerate(rounds.T):
    assert sorted(met.tolist()) == [other for other in range(r) if other != player]


@pytest.mark.parametrize("c, ulysses", [(4, 1), (5, 1), (6, 2), (8, 2), (3, 3), (8, 4)])
def test_what_arrives_is_of_the_group_that_is_named(c, ulysses):
  def visit(x):
    blocks = list(sequence.arriving(sequence.take_own(x, dim=0), ulysses))
    named = sequence.others(ulysses)
    assert len(blocks) == len(named) == c // ulysses - 1
    pairs = [jnp.stack([g, b[0]]) for g, b in zip(named, blocks, strict=True)]
    return jnp.concatenate([x[:0], *pairs])

  got = on_devices(visit, jnp.arange(2 * c, dtype=jnp.int32), c=c).reshape(c, -1, 2)
  for device in range(c):
    group, place = divmod(device, ulysses)
    # The early position of a device is its index: it comes from the same place in the other group.
    assert all(early == other * ulysses + place for other, early in got[device].tolist())
    met = sorted(other for other, _ in got[device].tolist())
    assert met == [g for g in range(c // ulysses) if g != group]


@pytest.mark.parametrize(
  "T, c, tensor, message",
  [
    (10, 4, 1, r"10 positions cannot be cut into 8 chunks.*sequence:4; use a length of 8 or 16"),
    (3, 2, 1, r"3 positions cannot be cut into 4 chunks.*sequence:2; use a length of 4"),
    (16, 4, 3, r"the 4 positions of a device \(16 over sequence:4\).*tensor:3; .* of 24$"),
    (7, 1, 2, r"the 7 positions of a device.*tensor:2; use a length of 6 or 8"),
  ],
)
def test_lengths_that_do_not_divide_name_what_does(T, c, tensor, message):
  with pytest.raises(ValueError, match=message):
    sequence.check_divides(T, c, tensor)


def test_lengths_that_divide():
  for T, c, tensor in [(7, 1, 1), (16, 4, 4), (24, 4, 3), (6, 1, 3)]:
    sequence.check_divides(T, c, tensor)


def test_taking_from_a_length_that_does_not_divide():
  take = functools.partial(on_devices, lambda x: sequence.take_own(x, dim=0), c=4)
  with pytest.raises(ValueError, match="10 positions cannot be cut into 8 chunks"):
    take(jnp.arange(10))
