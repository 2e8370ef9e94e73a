"""The flags that every training run has, whatever it trains.

They come in three groups, in this order: what decides the numbers (batch size, seed, optimizer; a
resumed run must repeat them, all but the number of steps), where and in which order the run
computes (mesh, schedule, microbatches, residuals), and the run directory with what is written to it
and when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpipe.models.transformer.completep import CompleteP
from jaxpipe.parallel.mesh import SLOW
from jaxpipe.pipeline.layer.residuals import residual_policy
from jaxpipe.pipeline.table.unroll import SHAPES
from jaxpipe.schedules.build import TICKS
from jaxpipe.training.flags.errors import naming
from jaxpipe.training.flags.settings import Settings, free, same


class Defaults(NamedTuple):
  """What an optimizer takes where flags do not say otherwise.

  Attributes:
    beta1: decay of the first moment; None where there is none.
    beta2: decay of the second moment; None where there is none.
    epsilon: what is added to the divisor; None where there is none.
    decays: whether its decoupled weight decay is that of the flag's default, and not 0.
  """

  beta1: float | None
  beta2: float | None
  epsilon: float | None
  decays: bool


OPTIMIZERS = {
  # Decays as in GPT-3 (arXiv:2005.14165, appendix B), here and for its kin.
  "adamw": Defaults(0.9, 0.95, 1e-8, True),
  "nadamw": Defaults(0.9, 0.95, 1e-8, True),
  "adam": Defaults(0.9, 0.95, 1e-8, False),
  "sgd": Defaults(0.0, None, None, False),
  "lion": Defaults(0.9, 0.99, None, True),
  "rmsprop": Defaults(None, 0.9, 1e-8, False),
  "adafactor": Defaults(None, None, None, False),
  "lamb": Defaults(0.9, 0.999, 1e-6, True),
  "muon": Defaults(0.95, 0.95, 1e-8, True),
}
_FINAL_RATE = 0.1
RATES = ("cosine", "linear", "constant", "wsd")
_UNSET = -1.0  # in place of a value that the optimizer chooses itself
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

  optimizer: str = same("adamw", f"one of {', '.join(OPTIMIZERS)}")
  learning_rate: float = same(2e-3, "peak learning rate")
  warmup_steps: int = same(100, "steps of linear warm-up; then the rate has the shape of --rate")
  rate: str = same(
    "cosine",
    "cosine or linear, down to --final_rate at --steps; constant; or wsd, which stays and"
    " falls in the last --decay_steps",
  )
  final_rate: float = same(_FINAL_RATE, "share of the peak rate that is left at the last step")
  decay_steps: int = same(0, "steps in which wsd falls; 0: a tenth of those after the warm-up")
  beta1: float = same(
    _UNSET, "decay of the first moment, sgd's momentum; default: the optimizer's own"
  )
  beta2: float = same(_UNSET, "decay of the second moment; default: the optimizer's own")
  epsilon: float = same(_UNSET, "what is added to the divisor; default: the optimizer's own")
  weight_decay: float = same(
    0.1,
    "decoupled decay of matrices; norm scales have none. On a command line without it, 0 for"
    f" {', '.join(name for name, own in OPTIMIZERS.items() if not own.decays)}",
  )
  clip_norm: float = same(1.0, "largest global norm of the gradient; 0: not clipped")
  gradient_noise: float = same(
    0.0, "eta of noise added to gradients, of variance eta / (1 + step)^0.55; 0: none"
  )
  ema: float = same(
    0.0,
    "decay of a moving average of the parameters, which validation, samples and exports then use;"
    " 0: none",
  )
  steps: int = free(
    2000, "updates in total, those before a resume included; another number bends --rate anew"
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
  ticks: str = free(
    "early",
    "early: each action as soon as it can run; kind: all devices do the same kind of action on a"
    " tick, for schedules that have such ticks",
  )
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
    self._check_amounts("final_rate", "decay_steps", "gradient_noise")
    self._check_optimizer()
    self._check("seed", 0 <= self.seed < 2**32, "is no seed; use 0 to 4294967295")
    self._check_choice("unroll", ("auto", *SHAPES))
    self._check_choice("ticks", TICKS)
    self._check("slack", self.slack in (0, 1), "ticks cannot be executed; use 0 or 1")
    with naming(self.flag("residuals")):
      residual_policy(self.residuals)
    if self.schedule == AUTO:
      by_name = {"chunks": 0, "backward": "", "recompute": False, "ticks": TICKS[0]}
      for name, unset in by_name.items():
        self._check_by_name_only(name, unset)
    slow = self.slow_axis in ("", *SLOW)
    self._check("slow_axis", slow, f"cannot lie between hosts; use {' or '.join(SLOW)}")
    self._check("run_dir", bool(self.run_dir), "names no folder; use --run_dir=runs/NAME")
    self.profile_range()

  @classmethod
  def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """On a command line without `--weight_decay`, the decay of an optimizer that has none: 0."""
    own = OPTIMIZERS.get(given.get("optimizer", ""))
    return {} if own is None or own.decays else {"weight_decay": 0.0}

  def _check_optimizer(self) -> None:
    """Refuses an unknown optimizer or rate, and flags that the optimizer would not read."""
    self._check_choice("optimizer", OPTIMIZERS)
    self._check_choice("rate", RATES)
    self._check("ema", 0 <= self.ema < 1, "is no decay; use 0 or more, below 1")
    alone = self.rate == "wsd" or not self.decay_steps
    self._check("decay_steps", alone, "is for --rate=wsd; give that, too, or leave it out")
    left = max(self.steps - self.warmup_steps, 1)
    most = f"is more than the {left} steps after the warm-up; use {left} or fewer"
    self._check("decay_steps", self.decay_steps <= left, most)
    self._check("final_rate", self.final_rate <= 1, "is more than the peak; use 1 or less")
    falls = self.rate != "constant" or self.final_rate == _FINAL_RATE
    self._check("final_rate", falls, "is not read by --rate=constant; leave it out")
    for name in ("beta1", "beta2", "epsilon"):
      value, own = getattr(self, name), getattr(OPTIMIZERS[self.optimizer], name)
      if value == _UNSET:
        continue
      self._check(name, own is not None, f"is not read by {self.optimizer}; leave it out")
      good = value >= 0 if name == "epsilon" else 0 <= value < 1
      self._check(
        name, good, f"is out of range; use 0 or more{'' if name == 'epsilon' else ', below 1'}"
      )

  def moments(self) -> tuple[float, float, float]:
    """Decays of both moments, and epsilon: as given, or the optimizer's own; 0 for one it lacks."""
    own = OPTIMIZERS[self.optimizer]
    first, second, epsilon = (
      (getattr(own, name) or 0.0) if getattr(self, name) == _UNSET else getattr(self, name)
      for name in ("beta1", "beta2", "epsilon")
    )
    return first, second, epsilon

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
