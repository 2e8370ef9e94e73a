"""The device mesh and its six axes: what each of them cuts, and what devices along it exchange.

    axis       devices along it hold different ...     and send
    stage      stages of the model                     activations to the neighbour, each tick
    data       rows of a microbatch                    gradients (summed), once a step
    fsdp       rows; pieces of every parameter         weights (all-gather) and gradients
                                                       (reduce-scatter), once a step, or where the
                                                       schedule has an action for it
    expert     rows; experts of a layer                tokens to their experts and back, each layer
    sequence   positions of a row                      keys and values in attention, each layer
    tensor     heads, hidden units, the vocabulary     partial sums, several times a layer

The order is from the outside in. `stage` sends the least and may lie on the slowest network;
devices along `tensor` wait for each other most often and should be neighbours. Every mesh has all
six axes, most of them of one device.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

STAGE = "stage"
DATA = "data"
FSDP = "fsdp"
EXPERT = "expert"
SEQUENCE = "sequence"
TENSOR = "tensor"
AXES = (STAGE, DATA, FSDP, EXPERT, SEQUENCE, TENSOR)
# Devices along these hold different rows of every microbatch.
ROWS = (DATA, FSDP, EXPERT)
# Axes that may lie between hosts or slices, over the slow network.
SLOW = (STAGE, DATA)


class MeshError(ValueError):
  """The mesh that was asked for does not exist, or does not fit the devices."""


def parse_mesh(text: str, devices: int | None = None) -> dict[str, int]:
  """Reads `stage:4,data:2` into `{"stage": 4, "data": 2, ...}`, all axes in the order of `AXES`.

  Args:
    text: a size for each axis that has more than one device; one of them may be -1, which takes
      all devices that the others leave.
    devices: how many there are; only for -1.

  Returns:
    Axis -> number of devices along it, 1 for those that the text leaves out.

  Raises:
    MeshError: an unknown axis, an axis twice, a size below 1, more than one -1, or devices that the
      other sizes do not divide.

  >>> parse_mesh("data:-1,stage:4", devices=8)["data"]
  2
  """
  sizes: dict[str, int] = {}
  for item in filter(None, text.split(",")):
    name, _, size = item.partition(":")
    if name not in AXES:
      raise MeshError(f"mesh {text!r}: no axis {name!r}; the axes are {', '.join(AXES)}")
    if name in sizes:
      raise MeshError(f"mesh {text!r}: axis {name!r} stands twice")
    # `isdecimal` alone also holds for digits of other scripts.
    if size != "-1" and (not (size.isascii() and size.isdecimal()) or int(size) < 1):
      raise MeshError(
        f"mesh {text!r}: {name}:{size} is not a size; write {name}:N with N at least 1"
        " (or -1 for all that the others leave)"
      )
    sizes[name] = int(size)
  if not sizes:
    raise MeshError("the mesh is empty; write stage:N")
  return {name: 1 for name in AXES} | _inferred(text, sizes, devices)


def _inferred(text: str, sizes: dict[str, int], devices: int | None) -> dict[str, int]:
  """Replaces a size of -1 by the number of devices that the other sizes leave."""
  free = [name for name, size in sizes.items() if size == -1]
  if not free:
    return sizes
  given = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1:
    raise MeshError(f"mesh {text!r}: {' and '.join(free)} are both -1; only one can be inferred")
  if devices is None:
    raise MeshError(f"mesh {text!r}: {free[0]}:-1 needs the number of devices; write the size")
  if devices % given:
    near = max(n for n in range(1, devices + 1) if devices % n == 0 and n <= given)
    raise MeshError(
      f"mesh {text!r}: {given} does not divide the {devices} devices, so that {free[0]}:-1 has no"
      f" size; let the others multiply to {near}"
    )
  return {**sizes, free[0]: devices // given}


def make_mesh(
  sizes: str | Mapping[str, int],
  devices: Sequence[jax.Device] | None = None,
  *,
  slow: str | None = None,
) -> Mesh:
  """Returns a mesh with all the axes of `AXES`.

  Args:
    sizes: `"stage:4,data:2,tensor:2"`, or the same as a dict; an axis left out has size 1, and one
      may be -1 (all devices that the others leave).
    devices: default, all of `jax.devices()`; the first that the mesh needs are taken.
    slow: axis that lies across hosts or slices, `stage` or `data`: devices of one host (of one
      slice, on TPU) then stand together along all others. None takes the devices in order.

  Returns:
    A mesh whose axes are all of type `Auto`, as the executor's `shard_map` takes it.

  Raises:
    MeshError: see `parse_mesh`; fewer devices than the mesh needs, or hosts that do not divide the
      slow axis.
  """
  text = sizes if isinstance(sizes, str) else ",".join(f"{k}:{v}" for k, v in sizes.items())
  found = list(jax.devices() if devices is None else devices)
  shape = parse_mesh(text, len(found))
  need = math.prod(shape.values())
  if need > len(found):
    raise MeshError(
      f"mesh {text} needs {need} devices but there are {len(found)} ({found[0].platform});"
      f" take a smaller mesh, or on CPU force {need}: ./launch/local.sh --devices={need} SCRIPT,"
      f" or XLA_FLAGS=--xla_force_host_platform_device_count={need}"
    )
  grid = _grid(tuple(shape.values()), found[:need], text, slow)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def stages_of(mesh: Mesh) -> int:
  """Returns P, the number of devices along the axis `stage`.

  Everything that takes a mesh asks this before it reads one of the axes, so that a mesh which the
  executor cannot run on is refused in the same words everywhere.

  Raises:
    MeshError: no `Mesh` of devices, an axis that is none of `AXES` or not of type `Auto`, or no
      axis `stage`.
  """
  remedy = f"build it with jaxpipe.make_mesh, whose axes are {', '.join(AXES)}, all of type Auto"
  if not isinstance(mesh, Mesh):
    raise MeshError(f"mesh {mesh!r} is no jax.sharding.Mesh of devices; {remedy}")
  if {*mesh.axis_names} - {*AXES} or {*mesh.axis_types} - {AxisType.Auto}:
    types = [kind.name for kind in mesh.axis_types]
    raise MeshError(f"mesh axes {dict(mesh.shape)} of types {types} cannot be used; {remedy}")
  if STAGE not in mesh.axis_names:
    raise MeshError(f"mesh axes {dict(mesh.shape)} lack the axis `{STAGE}`; {remedy}")
  return mesh.shape[STAGE]


def row_shards(mesh: Mesh) -> int:
  """Returns D, the number of data shards into which the rows of every microbatch are cut."""
  return math.prod(dict(mesh.shape).get(axis, 1) for axis in ROWS)


def _grid(
  shape: tuple[int, ...], devices: Sequence[Any], text: str, slow: str | None
) -> np.ndarray:
  """The devices as an array of the mesh's shape, those of one host or slice side by side."""
  if slow is None:
    return _near(shape, devices)
  if slow not in SLOW:
    raise MeshError(f"axis {slow!r} cannot lie on the slow network; use {' or '.join(SLOW)}")
  # Hosts of one TPU slice share its fast network, so that a slice counts as one there, and a host
  # everywhere else.
  sliced = getattr(devices[0], "slice_index", None) is not None
  sizes = collections.Counter(d.slice_index if sliced else d.process_index for d in devices)
  if len(members := sorted(set(sizes.values()))) > 1:
    raise MeshError(f"mesh {text}: hosts have {members} devices of it; use as many of every host")
  axis, groups = AXES.index(slow), len(sizes)
  if shape[axis] % groups:
    raise MeshError(
      f"mesh {text}: {groups} hosts or slices do not divide {slow}:{shape[axis]}; use"
      f" {slow}:{-(-shape[axis] // groups) * groups}, or another slow axis"
    )
  # A hybrid mesh is a small mesh for each host, times a mesh of hosts: here hosts differ along the
  # slow axis alone.
  outer = [groups if i == axis else 1 for i in range(len(shape))]
  return mesh_utils.create_hybrid_device_mesh(
    [n // m for n, m in zip(shape, outer, strict=True)],
    outer,
    devices,
    process_is_granule=not sliced,
    allow_split_physical_axes=True,
  )


def _near(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """The devices as an array; on TPU, neighbours in it are neighbours of the torus."""
  if devices[0].platform == "tpu" and len(devices) > 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return np.array(devices, dtype=object).reshape(shape)
