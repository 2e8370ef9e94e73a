"""Writes docs/unlike.md: what it costs that layers are not alike.

    .venv/bin/python docs/make_unlike.py

Bytes held and needed by every experiment whose layers are not alike, the partition of AmoebaNet,
and its CPU seconds beside those of one device. About ten minutes on two cores.
"""

from __future__ import annotations

import os
import pathlib
import resource
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np

import jaxpipe
from experiments import diffusion, gnn, image_amoebanet, segment, speech, translate
from jaxpipe.models.amoebanet import amoebanet
from jaxpipe.models.amoebanet_cells import AmoebaNetConfig
from jaxpipe.models.pictures import CONVOLUTIONS
from jaxpipe.models.stack import LayerStack
from jaxpipe.schedules.partition import Partition, best, uniform

PAGE = pathlib.Path(__file__).with_name("unlike.md")
P, M, ROUNDS = 4, 8, 9
ROWS, SIZE, FILTERS = 128, 8, 16
EXPERIMENTS = (image_amoebanet, segment, translate, diffusion, gnn, speech)
KIB = 2**10
Tree = Any


class Packing(NamedTuple):
  """One experiment: its network, what packing costs it, the memory report over the compiler."""

  name: str
  depth: int
  partition: tuple[int, ...]
  report: jaxpipe.PackingReport
  error: float


def packing(module: Any) -> Packing:
  """Of an experiment at its defaults, partitioned for P devices by counted FLOPs."""
  task = module.build(module.DEFAULTS)
  rows = module.DEFAULTS.batch_size
  batch = task.batches(0)
  schedule = jaxpipe.make_schedule("1f1b", devices=P, microbatches=4 if module is gnn else M)
  mesh = jaxpipe.make_mesh(f"stage:{P}")
  stack, found = jaxpipe.partitioned(task.stack, schedule, batch)
  report = jaxpipe.packing_report(stack, schedule, mesh, batch)
  args = arguments(stack, batch, schedule, mesh)
  compiled = jax.jit(jaxpipe.pipeline_value_and_grad(stack, schedule, mesh)).lower(*args).compile()
  error = jaxpipe.memory_report(stack, schedule, mesh, batch).error(compiled)
  print(module.__name__, rows, found.sizes, f"{error:+.1%}", report, sep="\n", flush=True)
  return Packing(module.__name__.split(".")[-1], stack.depth, found.sizes, report, error)


def arguments(stack: LayerStack, batch: Tree, *where: Any) -> tuple[Any, ...]:
  """What a step takes."""
  key = jax.random.key(0)
  state = (stack.init_state(key, batch, *where),) if stack.has_state else ()
  return stack.init(key, batch, *where), batch, key, *state


class Cut(NamedTuple):
  """AmoebaNet cut by one rule: stages, simulated step, bytes held over needed by the hungriest."""

  name: str
  partition: Partition
  makespan: float
  packing: jaxpipe.PackingReport
