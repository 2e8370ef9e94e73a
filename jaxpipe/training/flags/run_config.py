"""The flags that every training run has, whatever it trains.

They come in three groups, in this order: what decides the numbers (batch size, seed, optimizer; a
resumed run must repeat them, all but the number of steps), where and in which order the run
computes (mesh, schedule, microbatches, residuals), and the run directory with what is written to it
and when.
"""

from __future__ import annotations

import dataclasses

from jaxpipe.models.transformer.completep import CompleteP
from jaxpipe.parallel.mesh import SLOW
from jaxpipe.pipeline.layer.residuals import residual_policy
from jaxpipe.pipeline.table.unroll import SHAPES
from jaxpipe.training.flags.errors import naming
from jaxpipe.training.flags.settings import Settings, free, same

AUTO = "auto"  # in place of a schedule's name: `plan/choose.py` chooses one
RUN_DIR = "folder of checkpoints, metrics and plots; resumed if it is ours"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
  """The flags of every training run; an experiment's own configuration is a subclass.

  Each field is a flag, and its help text says what it means.

  Raises:
    ConfigError: a value that is impossible whatever the others are.
  """

  batch_size: int = same(8, "rows B of a batch, over all microbatches and data shards")
  seed: int = same(0, "of parameters, data order and dropout")

  learning_rate: float = same(2e-3, "peak learning rate")
  warmup_steps: int = same(100, "steps of linear warm-up; then cosine, to a tenth at --steps")
  weight_decay: float = same(0.1, "decoupled decay of matrices; norm scales have none")
  clip_norm: float = same(1.0, "largest global norm of the gradient; 0: not clipped")
  steps: int = free(
    2000, "updates in total, those before a resume included; another number bends the cosine anew"
  )

  mesh: str = free(
    "stage:4",
    "devices along each axis, such as stage:4,data:2: stage, data, fsdp, expert, sequence, tensor;"
    " one may be -1, all that the others leave",
  )
  slow_axis: str = free(
    "", "axis that lies between hosts or TPU slices: stage or data; default: any"
  )
  schedule: str = free(
    "1f1b",
    "pipeline schedule, from python -m jaxpipe.schedules --list; auto: the fastest by estimate that"
    " a device holds, or one as fast that holds less",
  )
  memory_limit: float = free(
    0.0, "GB (1e9 bytes) of a device that --schedule=auto may plan with; 0: all that it says it has"
  )
  chunks: int = free(0, "stages V that each device holds; 0: the schedule's own number")
  microbatches: int = free(4, "microbatches M of a step")
  backward: str = free("", "fused, split or deferred; default: the schedule's own")
  recompute: bool = free(False, "recompute as an action of its own, which the schedule places")
  residuals: str = free(
    "auto",
    "what forwards keep for backwards: auto (dots, of unlike layers full), dots,"
    " selective, all, full, a policy of"
    " jax.checkpoint_policies such as"
    " nothing_saveable, or names:A,B, such as names:attention,mlp_up",
  )
  unroll: str = free("auto", "program shape: none, one loop; ends; all, one straight line; auto")
  slack: int = free(0, "ticks that a transfer may take beyond its own, to run beside other work")

  run_dir: str = free("", RUN_DIR)
  checkpoint_every: int = free(500, "steps between checkpoints; 0: only at the end")
  validate_every: int = free(500, "steps between validations; 0: only at the end")
  profile_steps: str = free("", "START:STOP, steps traced for Perfetto into the run directory")
  compilation_cache: str = free("", "folder of compiled programs; default: in the user's cache")
  dry_run: bool = free(False, "print what the run would cost, from its compiled step, and stop")

  def __post_init__(self) -> None:
    self._check_counts("batch_size", "steps", "microbatches")
    self._check_amounts("learning_rate", "warmup_steps", "weight_decay", "clip_norm", "chunks")
    self._check_amounts("checkpoint_every", "validate_every", "memory_limit")
    self._check("seed", 0 <= self.seed < 2**32, "is no seed; use 0 to 4294967295")
    self._check_choice("unroll", ("auto", *SHAPES))
    self._check("slack", self.slack in (0, 1), "ticks cannot be executed; use 0 or 1")
    with naming(self.flag("residuals")):
      residual_policy(self.residuals)
    if self.schedule == AUTO:
      for name, unset in (("chunks", 0), ("backward", ""), ("recompute", False)):
        self._check_by_name_only(name, unset)
    slow = self.slow_axis in ("", *SLOW)
    self._check("slow_axis", slow, f"cannot lie between hosts; use {' or '.join(SLOW)}")
    self._check("run_dir", bool(self.run_dir), "names no folder; use --run_dir=runs/NAME")
    self.profile_range()

  def completep(self) -> CompleteP | None:
    """The rules by which learning rate, decay and epsilon differ between parameters; None: alike.

    Only language models have them (`--completep_base`).
    """
    return None

  def _check_by_name_only(self, name: str, unset: object) -> None:
    """Refuses a flag that shapes a schedule where `--schedule=auto` is to choose one."""
    message = f"is for a schedule by name, --schedule=auto decides it; leave --{name} out"
    self._check(name, getattr(self, name) == unset, message)

  def profile_range(self) -> range:
    """Steps to trace, from `--profile_steps=START:STOP`; empty where none are."""
    if not self.profile_steps:
      return range(0)
    start, _, stop = self.profile_steps.partition(":")
    good = start.isdecimal() and stop.isdecimal() and int(start) < int(stop)
    self._check("profile_steps", good, "is not START:STOP with START below STOP; use 10:13")
    inside = int(start) < self.steps
    self._check("profile_steps", inside, f"begins after --steps={self.steps}; begin before")
    return range(int(start), int(stop))
