"""A backbone in the pipeline, frozen encoders in its bubbles (DiffusionPipe: Tian et al., 2024).

A diffusion model trains its backbone on what frozen encoders make of the data. They have no
backward pass, and the next step's data is known, so their work for the next step runs in this
step's bubbles: the partition decides the bubbles, and `with_fillers` fills them.

  step    | backbone, microbatches 0 ... M-1, with the encoders of the next step in its gaps |
          [1] the partition: each schedule's best one
          [2] pieces: a layer that takes longer than a piece runs as several of these one after
              another, each for a part of the microbatch (the paper's partial batches)
          [3] where pieces go: `with_fillers`; what finds no bubble, at the ends of the lists

Smaller pieces fill bubbles better, and each costs `overhead`. Which schedule and which length of
pieces end first is found by trying all.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from jaxpipe.schedules.costs import Costs
from jaxpipe.schedules.partition.layer import LayerCost
from jaxpipe.schedules.partition.partition import aligned
from jaxpipe.schedules.partition.plan import Plan
from jaxpipe.schedules.simulate import Timeline, simulate
from jaxpipe.schedules.transforms.fillers import with_fillers

# Lengths of pieces that are tried: the longest layer's, and halves of it down to a sixteenth.
_HALVINGS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilledPlan:
  """A partitioned backbone with frozen layers in its bubbles.

  Attributes:
    backbone: the plan of the backbone, without frozen layers.
    timeline: the step with frozen layers; the pieces of one are Y of consecutive numbers.
    pieces: for each frozen layer, the number of pieces in which it runs a microbatch.
    overhead: time that every piece takes beyond its share of the layer.
    separate: time of a step that runs the frozen layers before the backbone, on all devices at
      once.
  """

  backbone: Plan
  timeline: Timeline
  pieces: tuple[int, ...]
  overhead: float
  separate: float

  @property
  def makespan(self) -> float:
    """Simulated time of a step with everything in it."""
    return self.timeline.makespan

  @property
  def bubble(self) -> float:
    """Idle share that is left; overhead counts as work."""
    return self.timeline.bubble

  @property
  def least_bubble(self) -> float:
    """Idle share that any filling of this plan leaves: there may be more bubbles than work."""
    busy = sum(self.timeline.busy) / len(self.timeline.busy)
    return max(0.0, 1 - busy / self.backbone.makespan) if self.backbone.makespan else 0.0

  @property
  def gain(self) -> float:
    """Share of `separate` that is saved."""
    return 1 - self.makespan / self.separate if self.separate else 0.0

  def report(self) -> str:
    """Returns both bubbles, the gain, and the backbone's own report as text."""
    plan = self.backbone
    return "\n".join(
      [
        f"{plan.timeline.schedule.name}: step {self.makespan:.6g}, bubble {self.bubble:.1%}, with"
        f" any filling {self.least_bubble:.1%} or more; unfilled {plan.makespan:.6g},"
        f" {plan.timeline.bubble:.1%}",
        f"frozen layers before the step: {self.separate:.6g}, {self.gain:.1%} saved; pieces of"
        f" each: {' '.join(map(str, self.pieces))}",
        plan.report(),
      ]
    )


def fill(plan: Plan, frozen: Sequence[LayerCost], *, overhead: float = 0) -> FilledPlan:
  """Fills a plan's bubbles with frozen layers of the next step.

  Args:
    plan: the plan of the backbone.
    frozen: the frozen layers, each running after the one before it; only `forward` counts.
    overhead: time that a piece takes beyond its share of its layer.

  Returns:
    The best filling of those tried.

  Raises:
    ValueError: there are no frozen layers, or one of them has a backward pass.
  """
  _check(frozen)
  M, P = plan.timeline.schedule.microbatches, len(plan.timeline.busy)
  longest = max(layer.forward for layer in frozen)
  lengths = [longest / 2**i for i in range(_HALVINGS)]
  # Several lengths may cut alike.
  cuts = dict.fromkeys(tuple(_pieces(layer, length) for layer in frozen) for length in lengths)
  timelines = {pieces: _timeline(plan, frozen, pieces, overhead) for pieces in cuts}
  pieces = min(timelines, key=lambda pieces: timelines[pieces].makespan)
  # Run before the backbone, frozen layers are whole: one overhead per layer and microbatch.
  work = M * sum(layer.forward for layer in frozen)
  return FilledPlan(
    backbone=plan,
    timeline=timelines[pieces],
    pieces=pieces,
    overhead=overhead,
    separate=plan.makespan + (work + overhead * M * len(frozen)) / P,
  )


def best_filled(
  plans: Sequence[Plan], frozen: Sequence[LayerCost], *, overhead: float = 0
) -> tuple[FilledPlan, str]:
  """Fills several plans of one backbone, and compares the steps.

  Where frozen layers are plenty, the schedule with the smaller bubble is not the better one any
  more: others hold less.

  Args:
    plans: plans of one backbone, such as `best` finds for several schedules.
    frozen: the frozen layers, each running after the one before it; only `forward` counts.
    overhead: time that a piece takes beyond its share of its layer.

  Returns:
    The plan with the shortest step, and a table of all as text.

  Raises:
    ValueError: there are no plans, no frozen layers, or one of them has a backward pass.
  """
  if not plans:
    raise ValueError("there are 0 plans to fill; give 1 or more")
  filled = [fill(plan, frozen, overhead=overhead) for plan in plans]
  rows = [("schedule", "backbone", "bubble", "filled", "bubble", "least", "memory")]
  for plan, done in zip(plans, filled, strict=True):
    rows.append(
      (
        plan.timeline.schedule.name,
        f"{plan.makespan:.6g}",
        f"{plan.timeline.bubble:.1%}",
        f"{done.makespan:.6g}",
        f"{done.bubble:.1%}",
        f"{done.least_bubble:.1%}",
        f"{max(plan.memory):.6g}",
      )
    )
  shortest = min(filled, key=lambda done: (done.makespan, max(done.backbone.memory)))
  return shortest, "\n".join(aligned(rows))


def _check(frozen: Sequence[LayerCost]) -> None:
  """Raises ValueError unless there are layers and none of them has a backward pass."""
  if not frozen:
    raise ValueError("there are 0 frozen layers to fill bubbles with; give 1 or more")
  for layer in frozen:
    if layer.input_grad or layer.weight_grad:
      raise ValueError(
        f"layer {layer.name!r} is not frozen: its gradients take"
        f" {layer.input_grad + layer.weight_grad}; set them to 0, or put it into the backbone"
      )


def _pieces(layer: LayerCost, length: float) -> int:
  """Returns the number of pieces, each of at most this length, that a layer runs in."""
  return max(1, math.ceil(layer.forward / length)) if length else 1


def _timeline(
  plan: Plan, frozen: Sequence[LayerCost], pieces: tuple[int, ...], overhead: float
) -> Timeline:
  """Simulates the backbone with frozen layers that run in so many pieces each."""
  times = itertools.chain(
    *(
      [(layer.forward / n if n > 1 else layer.forward) + overhead] * n
      for layer, n in zip(frozen, pieces, strict=True)
    )
  )
  plain = plan.partition.costs(plan.hop)
  costs = Costs(plain.forward, plain.input_grad, plain.weight_grad, plain.hop, filler=list(times))
  schedule = with_fillers(plan.timeline.schedule, sum(pieces), costs)
  return simulate(schedule, costs, plan.partition.memory)
