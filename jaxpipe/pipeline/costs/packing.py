"""Bytes that padding costs where stages are not alike: what devices hold, and what they need.

One program runs on all devices, so their arrays have one shape: of each kind of memory, every
device holds as much as the device that needs most of that kind. Which device that is may differ
from kind to kind. The waste of a kind is the bytes that all devices hold over those that all
devices need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpipe.parallel.flat import ROW, Flat
from jaxpipe.parallel.replicas import owned
from jaxpipe.pipeline.costs.workspace import slice_peak, tree_bytes
from jaxpipe.pipeline.device.device import Device
from jaxpipe.pipeline.device.switched_stages import SwitchedStages
from jaxpipe.pipeline.execution import Execution
from jaxpipe.pipeline.layer.residuals import AUTO, Policy
from jaxpipe.pipeline.mode import mode_of
from jaxpipe.pipeline.storage.rings import wide
from jaxpipe.schedules import Placement, Schedule
from jaxpipe.stack.stack import LayerStack

Tree = Any


@dataclasses.dataclass(frozen=True)
class PackingReport:
  """Bytes of one device by kind.

  Attributes:
    held: kind -> bytes that every device holds. `workspace`, the inside of an action, is an
      estimate; `shared` are weights that stages borrow, and their gradients.
    needed: kind -> bytes that each device's own stages need, without padding.
  """

  held: Mapping[str, int]
  needed: Mapping[str, Sequence[int]]

  @property
  def waste(self) -> dict[str, float]:
    """Kind -> held over needed, of all devices; of what nobody needs, 1."""
    devices = len(next(iter(self.needed.values())))
    found = {kind: (devices * held, sum(self.needed[kind])) for kind, held in self.held.items()}
    return {kind: held / needed if needed else 1.0 for kind, (held, needed) in found.items()}

  @property
  def hungriest(self) -> int:
    """Bytes that the device needs which needs most."""
    return max(map(sum, zip(*self.needed.values(), strict=True)))

  @property
  def ratio(self) -> float:
    """What a device holds over what the hungriest needs."""
    return sum(self.held.values()) / self.hungriest

  def __str__(self) -> str:
    lines = ["kind                held KiB  needed by each device, KiB"]
    for kind, held in self.held.items():
      each = " ".join(f"{n / 2**10:10,.0f}" for n in self.needed[kind])
      lines.append(f"{kind:14} {held / 2**10:13,.0f} {each}  x {self.waste[kind]:.2f}")
    lines.append(
      f"total {sum(self.held.values()) / 2**10:,.0f} KiB, {self.ratio:.2f} of what the hungriest"
      f" device needs ({self.hungriest / 2**10:,.0f})"
    )
    return "\n".join(lines)


def packing_report(
  stack: LayerStack,
  schedule: Schedule,
  mesh: Mesh,
  example_batch: Tree,
  *,
  residuals: str | Policy = AUTO,
  moments: int = 2,
) -> PackingReport:
  """Counts what a packed stack holds and needs; compiles nothing.

  Args:
    stack: a `LayerStack` of unlike layers.
    schedule, mesh, residuals: as for `pipeline_value_and_grad`.
    example_batch: a batch or its shapes.
    moments: float32 copies of the parameters that the optimizer keeps, such as Adam's two.

  Raises:
    ValueError: the stack is uniform, and nothing is packed.
  """
  if mode_of(stack.laid_out(schedule)).looped:
    raise ValueError("the stack's layers are alike: they lie stacked, and nothing is packed")
  execution = Execution.of(stack, schedule, mesh, residuals=residuals)

  def report(device: Device) -> PackingReport:
    assert isinstance(device.stage, SwitchedStages)
    return _report(device, device.stage, schedule, moments)

  found: PackingReport = execution.inspect(example_batch, report)
  return found


def _report(
  device: Device, stages: SwitchedStages, schedule: Schedule, moments: int
) -> PackingReport:
  """Counts what a device holds, and what each device's own stages need; inside `shard_map`."""
  inside = [
    max(map(slice_peak, (s.forward, s.recompute, s.backward, s.input_grad, s.weight_grad)))
    for s in stages.splits
  ]
  return PackingReport(
    _held(device, stages, moments, len(owned(schedule.placement)[0]), max(inside)),
    _needed(device, stages, moments, schedule.placement, inside),
  )


def _held(
  device: Device, stages: SwitchedStages, moments: int, rows: int, workspace: int
) -> dict[str, int]:
  """Kind -> bytes that every device holds, padding included.

  Args:
    device, stages: the device and its actions, traced.
    moments: float32 copies of the parameters that the optimizer keeps.
    rows: packed rows that a device owns, one for each of its stages.
    workspace: bytes of the inside of the largest action of any stage.
  """
  packed, carry = stages.packed, device.start()
  arenas = carry.pools[: len(stages.layout.arenas.pools)]
  return {
    "parameters": rows * _row_bytes(packed.widths),
    "optimizer": moments * rows * _row_bytes(packed.widths, widened=True),
    "state": rows * _row_bytes(packed.state_widths),
    "gradients": tree_bytes(carry.grads["layers"]),
    "activations": tree_bytes(carry.activations),
    "gradient_ring": tree_bytes(carry.gradients),
    "saved": tree_bytes(arenas),
    "workspace": workspace,
    "shared": tree_bytes(dict(stages.shared)) + tree_bytes(carry.grads["shared"]),
  }


def _needed(
  device: Device,
  stages: SwitchedStages,
  moments: int,
  placement: Placement,
  inside: Sequence[int],
) -> dict[str, list[int]]:
  """Kind -> bytes that the stages of each device need, without padding.

  Args:
    device, stages, moments: as for `_held`.
    placement: which device holds which stages; with replicas, a device holds more than it owns.
    inside: for each stage, bytes of the inside of its largest action.
  """
  program, packed = device.context.program, stages.packed
  own = owned(placement)
  holds = [
    [placement.stage(d, v) for v in range(placement.chunks)] for d in range(placement.devices)
  ]
  slots, flats = program.slots, stages.boundaries.flats
  bytes_of_row = [ROW * shape.dtype.itemsize for shape in stages.layout.arenas.shapes]
  rows_used = stages.layout.arenas.cells(program)[1]
  return {
    "parameters": [sum(_used(packed.params[s]) for s in mine) for mine in own],
    "optimizer": [
      moments * sum(_used(packed.params[s], widened=True) for s in mine) for mine in own
    ],
    "state": [sum(_used(packed.state[s]) for s in mine) for mine in own],
    "gradients": [sum(_used(packed.params[s], widened=True) for s in mine) for mine in holds],
    "activations": [slots["activations"] * max(_used(flats[s]) for s in mine) for mine in holds],
    "gradient_ring": [
      slots["gradients"] * max(_used(flats[s + 1], floats_only=True) for s in mine)
      for mine in holds
    ],
    "saved": [int(sum(n * b for n, b in zip(row, bytes_of_row, strict=True))) for row in rows_used],
    "workspace": [max(inside[s] for s in mine) for mine in holds],
    # Each borrowed leaf, and the sum of its gradient.
    "shared": [
      2 * sum(tree_bytes(stages.shared[of]) for s in mine for of in packed.borrowed[s].values())
      for mine in holds
    ],
  }


def _row_bytes(widths: Mapping[str, int], *, widened: bool = False) -> int:
  """Bytes of one packed row; `widened`, in the precision in which sums are kept."""
  dtypes = {name: jnp.dtype(name) for name in widths}
  return sum(
    widths[name] * (wide(dtype) if widened else dtype).itemsize for name, dtype in dtypes.items()
  )


def _used(flat: Flat, *, widened: bool = False, floats_only: bool = False) -> int:
  """Bytes of a layout's leaves without padding.

  Args:
    flat: the layout.
    widened: count in the precision in which sums are kept.
    floats_only: leave out leaves that have no gradient.
  """
  used = {
    name: n
    for name, n in flat.used.items()
    if not floats_only or jnp.issubdtype(jnp.dtype(name), jnp.inexact)
  }
  return _row_bytes(used, widened=widened)
