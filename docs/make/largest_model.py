"""Writes a section of docs/memory.md: the largest networks that fit on 1, 2, 4 and 8 devices.

    .venv/bin/python docs/make/largest_model.py

GPipe's Table 1 (Huang et al., arXiv:1811.06965) for its two networks, AmoebaNet and a Transformer:
cells or layers are added until `jaxpipe.memory_report` says that a device needs more than it has.
Nothing is compiled; some minutes on two cores.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax
from section import write_section

import jaxpipe
from jaxpipe.models.transformer.decoder import TransformerConfig, transformer
from jaxpipe.models.vision.amoebanet import amoebanet
from jaxpipe.models.vision.amoebanet_cells import AmoebaNetConfig
from jaxpipe.stack.stack import LayerStack

DEVICES, MICROBATCHES = (1, 2, 4, 8), 32
FILTERS = 512
GB = 1e9


class Growing(NamedTuple):
  """A family of networks that grow layer by layer.

  Attributes:
    make: number of layers -> stack.
    step: layers that are added at a time, times the number of devices where `even`.
    even: whether every stage has as many layers.
    batch: name -> shape and dtype of an entry of the batch, all microbatches together.
    limit: bytes that a device has.
  """

  make: Callable[[int], LayerStack]
  step: int
  even: bool
  batch: dict[str, jax.ShapeDtypeStruct]
  limit: float


class Size(NamedTuple):
  """How large a network is.

  Attributes:
    layers: normal cells of AmoebaNet, or layers of the Transformer.
    parameters: number of trained values.
    bytes: what `jaxpipe.memory_report` says that each device holds.
  """

  layers: int
  parameters: int
  bytes: int


def amoebanet_of(layers: int) -> LayerStack:
  """Returns AmoebaNet-D (layers, FILTERS) for ImageNet."""
  return amoebanet(AmoebaNetConfig(layers=layers, filters=FILTERS, classes=1000))


def transformer_of(layers: int) -> LayerStack:
  """Returns GPipe's Transformer-L with so many layers."""
  return transformer(
    TransformerConfig(
      vocabulary_size=32_000,
      layers=layers,
      width=2048,
      heads=32,
      kv_heads=32,
      mlp="gelu",
      mlp_width=8192,
    )
  )


def _shapes(rows: int, **dims: tuple[tuple[int, ...], Any]) -> dict[str, jax.ShapeDtypeStruct]:
  return {name: jax.ShapeDtypeStruct((rows, *rest), kind) for name, (rest, kind) in dims.items()}


NETWORKS = {
  "AmoebaNet": Growing(
    amoebanet_of,
    3,
    False,
    _shapes(
      128,
      image=((224, 224, 3), jnp.float32),
      label=((), jnp.int32),
      weights=((), jnp.float32),
    ),
    8 * GB,
  ),
  "Transformer": Growing(
    transformer_of,
    1,
    True,
    _shapes(
      32,
      tokens=((1024,), jnp.int32),
      targets=((1024,), jnp.int32),
      weights=((1024,), jnp.float32),
    ),
    16 * GB,
  ),
}
# GPipe's Table 1: devices -> shape, millions of parameters.
PAPER: dict[str, dict[int, tuple[str, float]]] = {
  "AmoebaNet": {
    1: ("(18, 416)", 318),
    2: ("(18, 544)", 542),
    4: ("(36, 544)", 1050),
    8: ("(72, 512)", 1800),
  },
  "Transformer": {1: ("13", 785.8), 8: ("103", 5300)},
}


def measure(network: Growing, layers: int, devices: int) -> Size:
  """Returns the size of a network of so many layers in a step of GPipe's schedule.

  F keeps a stage's input alone, as in the paper.
  """
  schedule = jaxpipe.make_schedule("gpipe", devices=devices, microbatches=MICROBATCHES)
  mesh = jaxpipe.make_mesh(f"stage:{devices}", devices=jax.devices()[:devices])
  stack = network.make(layers)
  if not network.even:
    stack, _ = jaxpipe.partitioned(stack, schedule, network.batch, "parameters")
  report = jaxpipe.memory_report(
    stack,
    schedule,
    mesh,
    network.batch,
    residuals="full",
    optimizer=optax.rmsprop(1e-3, momentum=0.9),
  )
  parameters = sum(leaf.size for leaf in jax.tree.leaves(stack.param_shapes()))
  size = Size(layers, parameters, report.total)
  print(f"{devices} devices: {size} {stack.partition}\n{report}", flush=True)
  return size


def largest(network: Growing, devices: int) -> Size:
  """Returns the largest size that fits: guessed from two sizes, then found step by step."""
  step = network.step * (devices if network.even else 1)

  @functools.cache
  def at(n: int) -> Size:
    return measure(network, n * step, devices)

  slope = (at(12).bytes - at(6).bytes) / 6
  n = max(1, 6 + int((network.limit - at(6).bytes) // slope))
  while n > 1 and at(n).bytes > network.limit:
    n -= 1
  while at(n + 1).bytes <= network.limit:
    n += 1
  return at(n)


def table(name: str, found: dict[int, Size]) -> str:
  """Returns the table of a network: sizes by number of devices, beside the paper's."""
  unit = found[1].parameters
  paper = PAPER[name]
  lines = [
    "| devices | layers | parameters | over one device | GB a device | GPipe: shape | parameters"
    " | over one device |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for devices, size in found.items():
    shape, millions = paper.get(devices, ("", 0))
    theirs = (f"{millions:,}M", f"{millions / paper[1][1]:.2f}") if millions else ("", "")
    lines.append(
      f"| {devices} | {size.layers} | {size.parameters / 1e6:,.0f}M |"
      f" {size.parameters / unit:.2f} | {size.bytes / GB:.2f} | {shape} | {theirs[0]} |"
      f" {theirs[1]} |"
    )
  return "\n".join(lines)


def main() -> None:
  """Searches, and writes the section."""
  found = {
    name: {devices: largest(network, devices) for devices in DEVICES}
    for name, network in NETWORKS.items()
  }
  write_section("memory.md", "largest_model.py", section(found))


def section(found: dict[str, dict[int, Size]]) -> str:
  """Returns the section: the text around both tables."""
  return f"""## The largest model that fits

How large a network grows until a device is full, by `jaxpipe.memory_report`, before anything is
compiled: GPipe's Table 1 ([arXiv:1811.06965](https://arxiv.org/abs/1811.06965)) for both of its
networks. GPipe's schedule with {MICROBATCHES} microbatches, only the input of a stage is kept,
RMSProp with momentum: 12 bytes a parameter as in the paper, and 4 for the sum of its gradients.
Written by `.venv/bin/python docs/make/largest_model.py`, jax {jax.__version__}.

### AmoebaNet-D (L, {FILTERS})

Normal cells are added, three at a time; 8 GB a device, 128 pictures of 224x224, as in the paper,
whose shapes (L, D) grow in both numbers. Stages are cut so that the largest has the fewest
parameters.

{table("AmoebaNet", found["AmoebaNet"])}

### Transformer-L

Layers of width 2,048 and 8,192 hidden units are added, as many to each stage; 16 GB a device, 32
rows of 1,024 tokens out of 32,000, as in the paper. Every device holds both ends.

{table("Transformer", found["Transformer"])}

Parameters grow less than the devices do, as in the paper: AmoebaNet's cells differ, and the ends of
the Transformer are on every device; per layer it is linear (14, 28, 56, 112). The paper measured
what trains. Here it is predicted: [how well](#predicted-and-compiled). For layers that are not
alike the report is too low ([by so much at small sizes on CPU](partition.md#bytes)), so that these
sizes are optimistic.
"""


if __name__ == "__main__":
  main()
