"""How fast a device can be at most, where its maker says so.

Dense bfloat16 FLOP/s from the makers' data sheets (no sparsity). A device that is not listed has no
utilisation figure: a guessed peak makes a guessed number look measured.

References:
  Cloud TPU documentation, system architecture: v4 275, v5e 197, v5p 459, v6e 918 TFLOP/s a chip.
  NVIDIA data sheets: A100 312, H100 SXM 989, H100 PCIe 756, H200 SXM 989 TFLOP/s.
"""

from __future__ import annotations

_PEAKS = {
  "TPU v4": 275e12,
  # JAX calls v5e "v5 lite", v6e "v6 lite" and v5p plain "v5"; newer versions may use the names.
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
