"""The device mesh and the names of its axes.

`stage` is always the outermost axis: neighbours on it exchange one activation a tick, far less than
what the inner axes reduce, so that it can lie on the slowest network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

STAGE = "stage"
DATA = "data"
AXES = (STAGE, DATA)


class MeshError(ValueError):
  """The mesh that was asked for does not exist, or does not fit the devices."""


def parse_mesh(text: str) -> dict[str, int]:
  """Reads `stage:4,data:2` into `{"stage": 4, "data": 2}`, always in the order of `AXES`.

  Raises:
    MeshError: an unknown axis, an axis twice, or a size below 1.
  """
  sizes: dict[str, int] = {}
  for item in filter(None, text.split(",")):
    name, _, size = item.partition(":")
    if name not in AXES:
      raise MeshError(f"mesh {text!r}: no axis {name!r}; the axes are {', '.join(AXES)}")
    if name in sizes:
      raise MeshError(f"mesh {text!r}: axis {name!r} stands twice")
    if not (size.isascii() and size.isdecimal()) or int(size) < 1:
      raise MeshError(
        f"mesh {text!r}: {name}:{size} is not a size; write {name}:N with N at least 1"
      )
    sizes[name] = int(size)
  if not sizes:
    raise MeshError("the mesh is empty; write stage:N")
  return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(sizes: str | dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with the axes `stage` and `data`, over the first devices that it needs.

  Args:
    sizes: `"stage:4,data:2"`, or the same as a dict; an axis left out has size 1.
    devices: default, all of `jax.devices()`.

  Raises:
    MeshError: see `parse_mesh`; or fewer devices than the mesh needs.
  """
  text = sizes if isinstance(sizes, str) else ",".join(f"{k}:{v}" for k, v in sizes.items())
  shape = parse_mesh(text)
  found = list(jax.devices() if devices is None else devices)
  need = math.prod(shape.values())
  if need > len(found):
    raise MeshError(
      f"mesh {text} needs {need} devices but there are {len(found)} ({found[0].platform});"
      f" take a smaller mesh, or on CPU force {need}: ./launch/local.sh --devices={need} SCRIPT"
    )
  grid = np.array(found[:need], dtype=object).reshape(tuple(shape.values()))
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
