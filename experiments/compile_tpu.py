"""Compiles the training step for a TPU without having one, and reads the compiled program.

    .venv/bin/pip install -e '.[tpu]'
    .venv/bin/python experiments/compile_tpu.py --topology=v5p:2x2x1 --mesh=stage:4 --schedule=1f1b

Takes 10 to 100 seconds and holds no parameters: the state is shapes, so that a model of any size
compiles on a laptop. Prints the memory of one device by kind beside the compiler's own analysis,
copies of whole rings (there must be none), each transfer between devices and what runs under it,
and the compiler's estimate of cycles for each action with, for `--unroll=none`, the step time that
they imply.
`--platform=cuda` compiles for the GPUs of this machine; the report then has no cycles.
`--preset` is a shape of `jaxpipe/models/transformer/presets.py`; here it sets bfloat16 and, for the
largest, a mesh and a batch, too. Flags that are given stay.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh

import jaxpipe
from jaxpipe.models.transformer.decoder import training_flops, transformer
from jaxpipe.pipeline.compiled.action_paths import SCOPES
from jaxpipe.pipeline.compiled.step import read_compiled
from jaxpipe.pipeline.execution import Execution
from jaxpipe.pipeline.table.segment import Segment
from jaxpipe.training.aot.aot import on_all, placed_shapes, ring_shapes
from jaxpipe.training.aot.report import describe, describe_estimate, lines
from jaxpipe.training.chips import DeviceSpec
from jaxpipe.training.flags.errors import ConfigError, naming
from jaxpipe.training.flags.flags import define_flags, exit_with_error, parse_flags
from jaxpipe.training.flags.run_config import AUTO
from jaxpipe.training.lm.config import Config
from jaxpipe.training.lm.model_flags import read_config
from jaxpipe.training.lm.run import batch_shapes, build_schedule
from jaxpipe.training.loop.step import make_train_step
from jaxpipe.training.plan.optimizer import learning_rate, placed_optimizer
from jaxpipe.training.plan.plan import build_mesh, choose
from jaxpipe.training.plan.state import state_shapes

Tree = Any

_TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x1", "TPU topology, such as v5p:4x4x4.")
_PLATFORM = flags.DEFINE_enum("platform", "tpu", ["tpu", "cuda"], "What to compile for.")
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "Of the report.")
_OUT = flags.DEFINE_string("out", "", "File of the report; default: printed.")
_HLO = flags.DEFINE_string("hlo", "", "File for the optimized program's text.")

# libtpu, loaded when it is first asked, else looks for the TPU that it believes to be on.
_LIBTPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is touched, so nothing needs its lock
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}

# What the models of `--preset` are compiled for: flags that are set unless they are given.
_JOBS: dict[str, dict[str, Any]] = {
  "tiny": dict(sequence_length=128, dtype="float32"),
  "gpipe-6b": dict(sequence_length=1024),
  "gpt3-175b": dict(sequence_length=2048),
  "megatron-1t": dict(
    **dict(sequence_length=2048, sequence_parallel=True, logits_chunk=512),
    **dict(topology="v5p:8x8x16", mesh="stage:64,data:2,tensor:8", batch_size=128, microbatches=64),
  ),
  "mixtral-8x7b": dict(
    **dict(sequence_length=4096, capacity_factor=1.25, logits_chunk=512),
    **dict(topology="v5p:4x4x4", mesh="stage:4,fsdp:2,expert:8", batch_size=128, microbatches=8),
  ),
  "deepseek-v3": dict(
    **dict(sequence_length=4096, capacity_factor=1.25, logits_chunk=512),
    **dict(topology="v5p:8x8x16", mesh="stage:16,fsdp:2,expert:32", batch_size=2048),
    # A layer's exchanges, kept for all microbatches under way, would take 75 GB.
    **dict(microbatches=32, residuals="full", unroll="none"),
  ),
}


def main(_: Sequence[str]) -> None:
  try:
    report = compile_and_read(prepare(read_config(otherwise=job_flags())))
    text = json.dumps(report, indent=2) if _FORMAT.value == "json" else "\n".join(lines(report))
    with naming(f"--out={_OUT.value}"):
      pathlib.Path(_OUT.value or os.devnull).write_text(text + "\n")
  except ConfigError as error:
    exit_with_error(error)
  if not _OUT.value:
    print(text)


def job_flags() -> dict[str, Any]:
  """Returns the flags of the preset's job; models of that size run in bfloat16."""
  preset = flags.FLAGS.preset
  return {"dtype": "bfloat16", **_JOBS.get(preset, {})} if preset else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A step, traced and not yet compiled.

  Attributes:
    config: the flags.
    device: limits of one device that is compiled for.
    mesh: of such devices.
    schedule: that the step runs.
    flops: model FLOPs of a training token.
    parameters: how many of the model train.
    predicted: bytes of one device by kind, from `memory_report`.
    segments: the schedule's ticks, divided into loops and straight lines.
    step: the traced step.
  """

  config: Config
  device: DeviceSpec
  mesh: Mesh
  schedule: jaxpipe.Schedule
  flops: int
  parameters: int
  predicted: Mapping[str, int]
  segments: Sequence[Segment]
  step: Any


def prepare(config: Config) -> Job:
  """Checks the flags, and traces the training step over shapes.

  Raises:
    ConfigError: whatever does not fit; names the flags.
  """
  devices = find_devices()
  mesh, device = build_mesh(config, devices), DeviceSpec.of(devices)
  named = None if config.schedule == AUTO else build_schedule(config, mesh)
  model = config.model(vocabulary_size=1)
  with naming(config.flag("freeze")):
    stack = transformer(model, config.freeze)
  shapes = batch_shapes(config)
  schedule = named or choose(config, mesh, stack, shapes, ["layers"]).schedule
  optimizer = placed_optimizer(config, stack, schedule, mesh)
  state = state_shapes(stack, optimizer, schedule, averages=config.ema > 0)
  state = placed_shapes(state, stack, schedule, mesh)
  batch = on_all(shapes, mesh)
  options: dict[str, Any] = dict(residuals=config.residuals, slack=config.slack)
  with naming(*config.flags("schedule", "batch_size", "microbatches", "residuals", "slack")):
    run = jaxpipe.pipeline_value_and_grad(stack, schedule, mesh, unroll=config.unroll, **options)
    held = dict(optimizer=optimizer, averages=config.ema > 0)
    known = jaxpipe.memory_report(stack, schedule, mesh, batch, **held, **options)
    step = make_train_step(
      run, optimizer, learning_rate(config), config.seed, state, mesh, config.ema
    )
    traced = step.trace(state, batch)
  return Job(
    config=config,
    device=device,
    mesh=mesh,
    schedule=schedule,
    flops=training_flops(model, stack, config.sequence_length),
    parameters=sum(math.prod(p.shape) for p in jax.tree.leaves(state.params)),
    predicted=known.bytes,
    segments=Execution.of(stack, schedule, mesh, **options).segments(config.unroll),
    step=traced,
  )


def compile_and_read(job: Job) -> dict[str, Any]:
  """Compiles the step, and returns all that is found in the program, as JSON values.

  Raises:
    ConfigError: the compiler refuses, such as a program that the chip cannot hold.
  """
  began = time.perf_counter()
  try:
    program = job.step.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f"the compiler refuses: {str(error)[:400]}") from error
  seconds = time.perf_counter() - began
  if _HLO.value:
    with naming(f"--hlo={_HLO.value}"):
      pathlib.Path(_HLO.value).write_text(program.as_text())
  found = read_compiled(program, list(ring_shapes(job.step.jaxpr)), SCOPES)
  config, names = job.config, ("batch_size", "microbatches", "sequence_length", "residuals")
  tokens = config.batch_size * config.sequence_length
  flops = tokens * job.flops
  return {
    "jax": jax.__version__,
    "device": job.device.kind,
    **({"topology": _TOPOLOGY.value} if _PLATFORM.value == "tpu" else {}),
    **{name: getattr(config, name) for name in ("mesh", *names)},
    "schedule": job.schedule.name,
    "parameters": job.parameters,
    "compile_seconds": round(seconds, 1),
    **describe(found, job.predicted, job.device),
    "estimate": describe_estimate(
      found, job.schedule, job.device, flops, job.mesh.size, config.slack
    )
    if one_loop(job.segments)
    else {},
  }


def one_loop(segments: Sequence[Segment]) -> bool:
  """Whether every tick is a turn of one loop, so that cycles are known by the tick."""
  return len(segments) == 1 and not segments[0].straight


def find_devices() -> list[Any]:
  """Returns the devices to compile for: those of a TPU topology, or this machine's GPUs.

  Raises:
    ConfigError: there are none.
  """
  for name, value in _LIBTPU.items():
    os.environ.setdefault(name, value)
  if _PLATFORM.value == "cuda":
    try:
      return list(jax.devices("cuda"))
    except RuntimeError as error:
      raise ConfigError(f"--platform=cuda: {str(error).splitlines()[0]}") from error
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError("--platform=tpu: libtpu is not installed; .venv/bin/pip install -e '.[tpu]'")
  jax.config.update("jax_platforms", "cpu")  # the TPU is compiled for, never run on
  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=_TOPOLOGY.value)
  except jax.errors.JaxRuntimeError as error:
    message = str(error).splitlines()[0]
    raise ConfigError(f"--topology={_TOPOLOGY.value}: {message}; use one like v5p:2x2x1") from error
  return list(topology.devices)


def parse(arguments: Sequence[str]) -> list[str]:
  try:
    return parse_flags(arguments)
  except ValueError as error:
    exit_with_error(error)


if __name__ == "__main__":
  define_flags(Config(mesh="stage:4", microbatches=8, vocabulary_size=256))
  sys.exit(app.run(main, flags_parser=parse))
