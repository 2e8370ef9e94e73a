"""Measures with one processor for each device: processes in which XLA cannot share work out.

XLA's CPU backend splits operations over all processors that the process may run on, and runs those
that do not wait for each other at once, so that a "device" is as fast as the machine is idle. Its
flags do not stop all of this (`--xla_cpu_multi_thread_eigen=false` did not, on jax 0.10.2). A
process bound to one processor before JAX makes its devices does: so a pipeline of P devices is P
processes here, and what they exchange goes through JAX's own CPU collectives.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import baselines
import jax
import numpy as np

import jaxpipe

# (number of stages) -> (costs of F, I, W and head for the simulator, seconds of one microbatch on
# one device).
Costs = Callable[[int], tuple[jaxpipe.Costs, float]]


def start_processes(devices: int) -> int:
  """Runs this process's own command once for each device; returns the largest exit status."""
  if len(os.sched_getaffinity(0)) < devices:
    sys.exit(f"{devices} devices want a processor each, which are not there; use fewer --stages")
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
  command = [sys.executable, *sys.argv, f"--port={port}"]
  environment = os.environ | {"XLA_FLAGS": flags}
  running = [
    subprocess.Popen([*command, f"--process={i}"], env=environment) for i in range(devices)
  ]
  return max(process.wait() for process in running)


def join(process: int, devices: int, port: int) -> None:
  """Binds this process to a processor of its own, and joins the other processes by JAX."""
  os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[process]})
  jax.distributed.initialize(
    f"localhost:{port}",
    devices,
    process,
    heartbeat_timeout_seconds=10,
    shutdown_timeout_seconds=60,
    initialization_timeout=60,
  )


def timed_costs(
  stack: Any,
  params: Any,
  batch: Any,
  microbatches: int,
  residuals: str,
  seconds: Callable[..., list[float]],
) -> Costs:
  """Times all layers and the head on one microbatch; a stage has an equal share of the layers.

  Args:
    stack: a `LayerStack`.
    params: canonical.
    batch: leaves `[B, ...]`.
    microbatches: M.
    residuals: as for `jaxpipe.pipeline_value_and_grad`.
    seconds: `(programs) -> times`: runs each `(function, *arguments)`, in interleaved rounds.

  Returns:
    `costs(stages)`: F is a forward, I what the gradient of x adds to it, W what those of the
    weights add to that.
  """
  first_M = jax.tree.map(lambda leaf: leaf[None, : len(leaf) // microbatches], batch)
  first = jax.tree.map(lambda leaf: leaf[0], first_M)
  stage, zero = baselines.rematerialized_stage(stack, stack.depth, residuals), np.int32(0)

  def run(layers: Any, x: Any) -> Any:
    return stage(layers, x, zero, zero, first_M, None)

  layers, head = params["layers"], stack.head_params(params)
  x = jax.jit(stack.apply_embed)(params["embed"], first)
  F, FI, FIW, top = seconds(
    (run, layers, x),
    (lambda layers, x: jax.vjp(lambda x: run(layers, x), x)[1](x), layers, x),
    (lambda layers, x: jax.vjp(run, layers, x)[1](x), layers, x),
    (jax.grad(lambda head, x: stack.apply_head(head, x, first)[0], (0, 1)), head, x),
  )
  times = {"F": F, "I": FI - F, "W": FIW - FI, "head": top}
  print("ms of a microbatch:", {k: round(1e3 * v, 1) for k, v in times.items()}, file=sys.stderr)
  return lambda stages: (
    jaxpipe.Costs(F / stages, (FI - F) / stages, (FIW - FI) / stages, head=top / 3),
    FIW + top,
  )
