"""The limits of accelerators, where their makers publish them: FLOP/s, memory, clock.

Two things are derived from these figures: the utilisation of a run (MFU, achieved over peak FLOP/s)
and, for a step compiled ahead of time, whether it fits into a device and how long it should take. A
device that is not listed gets no figure: a guessed peak would make a guessed utilisation look
measured.

Peaks are dense bfloat16 FLOP/s, without sparsity.

References:
  Cloud TPU documentation, system architecture: v4 275, v5e 197, v5p 459, v6e 918 TFLOP/s a chip;
  HBM and matrix units of each generation.
  NVIDIA data sheets: A100 312, H100 SXM 989, H100 PCIe 756, H200 SXM 989 TFLOP/s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

# By `jax.Device.device_kind`. JAX calls v5e "v5 lite", v6e "v6 lite" and v5p plain "v5"; newer
# versions may use the names.
_PEAKS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
  """Returns dense bfloat16 FLOP/s of a device, None where unknown.

  Args:
    device_kind: `jax.Device.device_kind`, matched whole.

  >>> peak_flops("TPU v5p"), peak_flops("cpu")
  (459000000000000.0, None)
  """
  return _PEAKS.get(device_kind)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU generation.

  Attributes:
    memory: bytes of high-bandwidth memory (HBM) of one chip.
    flops_per_cycle: FLOPs of one chip in one clock cycle, 2 * 128 * 128 for each of its matrix
      units; None where the clock that would follow from it is not credible.
  """

  memory: float
  flops_per_cycle: int | None


_MXU = 2 * 128 * 128  # FLOPs of one matrix unit in one cycle
# By `jax.Device.device_kind`. v6e has no clock: its documented matrix units and peak would make it
# 3.5 GHz, far from what its compiler's own estimate of a large matmul allows.
_CHIPS = {
  "TPU v4": Chip(32e9, 8 * _MXU),
  "TPU v5 lite": Chip(16e9, 4 * _MXU),
  "TPU v5": Chip(95e9, 8 * _MXU),
  "TPU v6 lite": Chip(32e9, None),
}


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
  """The limits of one JAX device: of a whole chip, or of the core of a chip that is a device.

  Attributes:
    kind: its `jax.Device.device_kind`, such as `TPU v5`.
    memory: bytes that the device may hold; None if unknown.
    peak: dense bfloat16 FLOP/s of the device; None if unknown.
    clock: cycles per second, the chip's peak over its FLOPs per cycle; None if unknown.
  """

  kind: str
  memory: int | None
  peak: float | None
  clock: float | None

  @classmethod
  def of(cls, devices: Sequence[Any]) -> DeviceSpec:
    """Returns the limits of each of some devices, which are all of one kind.

    Args:
      devices: `jax.Device`s, at least one; of a TPU also those of a topology that is not there. The
        cores of one chip are told by their equal `coords`.
    """
    kind = devices[0].device_kind
    chip, peak = _CHIPS.get(kind), peak_flops(kind)
    if chip is None:
      # Not a TPU that is listed: a device that is there says itself what it may hold, CPUs do not.
      stats = devices[0].memory_stats() or {}
      return cls(kind, stats.get("bytes_limit"), peak, None)
    # On v4 each of a chip's two cores may be a device of its own, with half of the chip's memory.
    each = len(devices) // len({tuple(device.coords) for device in devices})
    clock = peak / chip.flops_per_cycle if peak and chip.flops_per_cycle else None
    return cls(kind, int(chip.memory / each), peak and peak / each, clock)
