"""Placement moves labels, so that where a layer went can be read off it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpipe
from jaxpipe.parallel.mesh import MeshError, make_mesh, parse_mesh
from jaxpipe.parallel.placing import layer_order
from jaxpipe.parallel.rules import NONE
from jaxpipe.schedules import Placement, Schedule


class Stack:
  depth = 12
  rules = NONE
  uniform = True

  def laid_out(self, schedule):
    return self


def schedule(placement):
  return Schedule("labels", placement, 1, ((),) * placement.devices)


@pytest.mark.parametrize(
  "placement, want",
  [
    (Placement.loop(3), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    (Placement.loop(3, 2), [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
    (Placement.v(3), [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]),
    (Placement.loop(1, 4), [list(range(12))]),
  ],
)
def test_every_device_holds_its_own_layers(placement, want):
  plan, mesh = schedule(placement), make_mesh({"stage": placement.devices})
  labels = {"embed": jnp.zeros(2), "layers": jnp.arange(12), "head": jnp.zeros(2)}
  placed = jaxpipe.place(labels, Stack(), plan, mesh)
  shards = sorted(placed["layers"].addressable_shards, key=lambda s: s.index[0].start or 0)
  assert [s.data.tolist() for s in shards] == want
  assert [s.device for s in shards] == list(mesh.devices.flat)
  assert jaxpipe.unplace(placed, Stack(), plan)["layers"].tolist() == list(range(12))
  assert labels["layers"].tolist() == list(range(12))


def test_layer_counts_that_do_not_divide_name_what_does():
  with pytest.raises(ValueError, match=r"12 layers cannot fill 5 stages evenly; use 4 stages"):
    layer_order(12, schedule(Placement.loop(5)))


@pytest.mark.parametrize(
  "text, message",
  [
    ("stage:2,stage:2", "axis 'stage' stands twice"),
    ("stages:2", "no axis 'stages'; the axes are stage, data"),
    ("stage:0", "stage:0 is not a size"),
    ("stage:two", "stage:two is not a size"),
    ("stage", "stage: is not a size"),
    ("stage:4,data:3", "needs 12 devices but there are 8"),
  ],
)
def test_meshes_that_cannot_be(text, message):
  with pytest.raises(MeshError, match=message):
    make_mesh(text)


def test_stage_is_the_outermost_axis():
  names = ["stage", "data", "fsdp", "expert", "sequence", "tensor"]
  assert list(parse_mesh("data:2,stage:4")) == names
  mesh = make_mesh("data:2,stage:4")
  assert np.array_equal(mesh.devices[0].flat, np.array(jax.devices()[:2]))
