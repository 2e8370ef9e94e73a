"""Meshes: sizes, the one that is inferred, and what lies on the slow network."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxpipe.parallel.mesh import MeshError, _grid, make_mesh, parse_mesh


def test_one_size_is_inferred_from_the_devices():
  assert parse_mesh("data:-1,stage:2", 8)["data"] == 4
  assert dict(make_mesh("stage:-1").shape)["stage"] == 8
  assert parse_mesh("tensor:2,stage:-1,sequence:2", 8) == {
    **dict.fromkeys(("data", "fsdp", "expert"), 1),
    **dict(stage=2, sequence=2, tensor=2),
  }


@pytest.mark.parametrize(
  "text, devices, message",
  [
    ("stage:-1,data:-1", 8, "stage and data are both -1; only one can be inferred"),
    ("stage:3,data:-1", 8, "3 does not divide the 8 devices, .* let the others multiply to 2"),
    ("stage:-1", None, "needs the number of devices"),
    ("stage:-2", 8, "stage:-2 is not a size"),
  ],
)
def test_what_cannot_be_inferred_says_why(text, devices, message):
  with pytest.raises(MeshError, match=message):
    parse_mesh(text, devices)


def hosts(*sizes, slices=None):
  """Devices of several hosts, as JAX lists them."""
  return [
    SimpleNamespace(
      platform="cpu",
      device_kind="cpu",
      process_index=p,
      name=f"{p}.{i}",
      slice_index=slices[p] if slices else None,
    )
    for p, n in enumerate(sizes)
    for i in range(n)
  ]


@pytest.mark.parametrize("slow, axis", [("stage", 0), ("data", 1)])
def test_only_the_slow_axis_leaves_a_host(slow, axis):
  shape = (2, 2, 1, 1, 1, 2)
  grid = _grid(shape, hosts(4, 4), "stage:2,data:2,tensor:2", slow)
  places = np.vectorize(lambda d: d.process_index)(grid)
  for other in range(len(shape)):
    along = np.moveaxis(places, other, 0)
    same = all((along[0] == one).all() for one in along)
    assert same == (other != axis)


def test_hosts_of_one_slice_share_its_fast_network():
  devices = hosts(2, 2, 2, 2, slices=[0, 0, 1, 1])
  grid = _grid((2, 1, 1, 1, 1, 4), devices, "stage:2,tensor:4", "stage")
  slices = np.vectorize(lambda d: d.slice_index)(grid).reshape(2, 4)
  assert slices.tolist() == [[0] * 4, [1] * 4]


@pytest.mark.parametrize(
  "shape, devices, slow, message",
  [
    ((2, 2, 1, 1, 1, 1), hosts(3, 1), "stage", r"hosts have \[1, 3\] devices of it"),
    ((2, 3, 1, 1, 1, 1), hosts(2, 2, 2), "stage", r"3 hosts or slices do not divide stage:2"),
    ((4, 1, 1, 1, 1, 1), hosts(2, 2), "tensor", r"'tensor' cannot lie on the slow network"),
  ],
)
def test_what_cannot_lie_between_hosts(shape, devices, slow, message):
  with pytest.raises(MeshError, match=message):
    _grid(shape, devices, "the mesh", slow)
