"""Writes a section of docs/exactness.md and its picture: losses of pipelines and of one device.

    .venv/bin/python docs/make/curves.py

GPipe's two tasks, AmoebaNet and translation, trained from the same weights on the same batches by
`jax.grad` on one device, and over 2, 4 and 8 devices. About fifteen minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import tempfile
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from section import DOCS, write_section

import jaxpipe
from experiments import image_amoebanet, translate
from jaxpipe.models.vision.amoebanet import amoebanet
from jaxpipe.models.vision.amoebanet_cells import AmoebaNetConfig
from jaxpipe.models.vision.pictures import CONVOLUTIONS
from jaxpipe.training.command.task_run import build_run
from jaxpipe.training.plan.optimizer import decay_mask, make_optimizer, placed_mask

DEVICES, MICROBATCHES = (2, 4, 8), 8
# Experiment, its name, steps, and the schedule of each number of devices.
RUNS = (
  (image_amoebanet, "AmoebaNet", 200, ("gpipe", "1f1b", "zb-h1")),
  (translate, "translation", 200, ("gpipe", "1f1b", "zb-h1")),
)
EARLY = 20  # steps in which rounding has not grown yet
Curve = np.ndarray


def config(module: Any, steps: int, devices: int, schedule: str) -> Any:
  """Returns the experiment's own configuration with other steps, devices and schedule."""
  return dataclasses.replace(
    module.DEFAULTS,
    steps=steps,
    mesh=f"stage:{devices}",
    schedule=schedule,
    microbatches=MICROBATCHES,
    run_dir=tempfile.mkdtemp(),
  )


def curve(value_and_grad: Any, optimizer: Any, params: Any, state: Any, run: Any) -> Curve:
  """Trains for all steps of the run and returns the losses, float64 [steps].

  Args:
    value_and_grad: (params, batch, key, *state) -> ((loss, metrics, *state), grads).
    optimizer: an optax transformation.
    params: the first parameters, as `value_and_grad` takes them.
    state: the first model state in a list, which is empty where the model has none.
    run: its `config.steps` and `task.batches`.
  """

  @jax.jit
  def step(params, moments, state, batch, key):
    (loss, _, *state), grads = value_and_grad(params, batch, key, *state)
    updates, moments = optimizer.update(grads, moments, params)
    return optax.apply_updates(params, updates), moments, state, loss

  moments, losses = jax.jit(optimizer.init)(params), []
  for i in range(run.config.steps):
    key = jax.random.fold_in(jax.random.key(1), i)
    params, moments, state, loss = step(params, moments, state, run.task.batches(i), key)
    losses.append(float(loss))
  return np.array(losses)


def curves(module: Any, steps: int, schedules: tuple[str, ...]) -> list[Curve]:
  """Returns the losses of one device, then those of the pipelines over `DEVICES`."""
  found = []
  for devices, schedule in zip((1, *DEVICES), ("gpipe", *schedules), strict=True):
    run = build_run(config(module, steps, devices, schedule), module.build)
    stack, batch, key = run.stack, run.task.batches(0), jax.random.key(0)
    where = (run.schedule, run.mesh) if found else ()
    params = stack.init(key, batch, *where)
    state = [stack.init_state(key, batch, *where)] if stack.has_state else []
    # On one device nothing of the pipeline is used.
    one = jaxpipe.reference_value_and_grad(stack, MICROBATCHES)
    how = (run.value_and_grad, run.optimizer) if found else (one, make_optimizer(run.config))
    found.append(curve(*how, params, state, run))
    print(module.__name__, devices, schedule, found[-1][[0, -1]], flush=True)
  return found


def double(steps: int) -> float:
  """Returns the largest relative difference of a loss: AmoebaNet, float64, 4 devices against 1."""
  run = build_run(config(image_amoebanet, steps, 4, "1f1b"), image_amoebanet.build)
  types = dict(dtype=jnp.float64, param_dtype=jnp.float64)
  matmul = dict(image_channels=1, stem_cells=0, convolution=CONVOLUTIONS["matmul"])
  stack = amoebanet(AmoebaNetConfig(layers=3, filters=16, classes=10, **matmul, **types))
  stack = dataclasses.replace(stack, partition=run.stack.partition)
  key, batch = jax.random.key(0), run.task.batches(0)
  found = []
  for where in ((), (run.schedule, run.mesh)):
    one = jaxpipe.reference_value_and_grad(stack, MICROBATCHES)
    step = jaxpipe.pipeline_value_and_grad(stack, *where) if where else one
    params = stack.init(key, batch, *where)
    state = [stack.init_state(key, batch, *where)]
    mask = placed_mask(stack, run.schedule) if where else decay_mask
    found.append(curve(step, make_optimizer(run.config, mask), params, state, run))
  return float(np.max(np.abs(found[0] - found[1]) / found[0]))


def gap(a: Curve, b: Curve) -> str:
  """Returns four cells of the table: `early`, both losses at the end, and their difference."""
  early = np.max(np.abs(a - b)[:EARLY] / a[:EARLY])
  last = len(a) // 10
  late = abs(a[-last:].mean() - b[-last:].mean()) / a[-last:].mean()
  return f"{early:.1e} | {a[-last:].mean():.4f} | {b[-last:].mean():.4f} | {late:.1%}"


def main() -> None:
  """Trains both tasks, draws their losses and writes the section."""
  figure, axes = plt.subplots(1, len(RUNS), figsize=(10, 3.6), layout="constrained")
  lines = []
  for axis, (module, name, steps, schedules) in zip(axes, RUNS, strict=True):
    one, *others = curves(module, steps, schedules)
    axis.plot(one, color="0.7", linewidth=5, label="one device, jax.grad")
    for i, (devices, schedule, found) in enumerate(zip(DEVICES, schedules, others, strict=True)):
      axis.plot(found, f"C{i}", linewidth=1, label=f"{devices} devices, {schedule}")
      lines.append(f"| {name} | {devices} | {schedule} | {gap(one, found)} |")
    axis.set(title=name, xlabel="step", ylabel="loss")
    axis.legend(fontsize=8)
  figure.savefig(DOCS / "images" / "curves.png", dpi=130)
  with jax.enable_x64(True):
    exact = double(EARLY)
  print(exact, flush=True)
  write_section("exactness.md", "curves.py", section(lines, exact))


def section(lines: list[str], exact: float) -> str:
  """Returns the section, from the table's rows and the largest difference in float64."""
  table = "\n".join(lines)
  return f"""## Loss curves

GPipe's two tasks from the same weights on the same batches: by `jax.grad` on one device, with
microbatches summed in order and nothing of the pipeline, and by the pipeline over 2, 4 and 8 CPU
devices, {MICROBATCHES} microbatches, float32. No two layers of AmoebaNet are alike, and it has
fewer than eight: some stages are empty. Written by `.venv/bin/python docs/make/curves.py`,
jax {jax.__version__}.

![losses](images/curves.png)

*Early*: the largest difference of a loss in the first {EARLY} steps, over the loss. Sums in another
order round otherwise. Translation hardly lets that grow. AmoebaNet does, by Adam: weights before a
norm have gradients that are rounding alone. In float64 the largest difference of these steps is
{exact:.0e}. The ends are compared by the mean loss of the last tenth of the steps.

| task | devices | schedule | early | one device, at the end | pipeline, at the end | difference |
|---|---|---|---|---|---|---|
{table}
"""


if __name__ == "__main__":
  main()
