"""Compares all registered schedules of given sizes and costs: a table, best first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

from jaxpipe.schedules.build import make_schedule
from jaxpipe.schedules.costs import Costs, Memory, PerStage
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.simulate import Timeline, simulate


@dataclasses.dataclass(frozen=True)
class Entry:
  """One schedule of a comparison.

  Attributes:
    label: name of the schedule, and `split` or `deferred` where its backwards are not as the
      family has them, and `by kind` where its ticks are.
    timeline: the simulated schedule; None where it cannot be built as asked.
    reason: the error where it cannot be built, else empty.
  """

  label: str
  timeline: Timeline | None
  reason: str = ""


def compare(
  *,
  devices: int,
  microbatches: int,
  chunks: int | None = None,
  costs: Costs | None = None,
  memory: Memory = (1, 0, -1),
  memory_limit: float | Sequence[float] | None = None,
  ticks: Sequence[str] = ("early",),
) -> list[Entry]:
  """Builds every registered schedule and simulates it.

  Costs and memory are those of a P-th part of the model, so that schedules with different numbers
  of chunks do equal work: a stage of a schedule with S stages takes P/S of them. Given as one
  number per stage they are taken as they are, and only schedules with as many stages compete.

  Args:
    devices: number of devices, P.
    microbatches: number of microbatches, M.
    chunks: stages per device, V; by default every family's own number.
    costs: durations.
    memory: changes of the memory that a device holds by F, I and W.
    memory_limit: most that a device may hold: one number, or one per device.
    ticks: ways to place ticks, of `TICKS`; by kind only families that have such ticks compete.

  Returns:
    Those that can run, shortest makespan first, then shortest span, then lowest memory; after them
    those that skip stages, in the same order, and those that cannot run, with the reason.
  """
  costs = costs or Costs()
  entries = []
  for name, backward, way in _candidates(chunks, ticks):
    label = ", ".join([name, *([backward] if backward else []), *["by kind"] * (way == "kind")])
    build = functools.partial(make_schedule, name, devices=devices, chunks=chunks, ticks=way)
    try:
      timeline = _run(build, backward, devices, microbatches, costs, memory, memory_limit)
      entries.append(Entry(label, timeline))
    except ValueError as error:
      entries.append(Entry(label, None, str(error)))
  return sorted(entries, key=_rank)


def _candidates(chunks: int | None, ticks: Sequence[str]) -> Iterator[tuple[str, str | None, str]]:
  """Yields names that have V chunks, each with the `backward` values that make a difference."""
  for (name, family), way in itertools.product(FAMILIES.items(), ticks):
    if (chunks is None or family.offers(chunks)) and (way == "early" or family.by_kind):
      yield name, None, way
      if family.backward == "fused":
        yield name, "split", way
        yield name, "deferred", way


def _run(
  build: Callable[..., Schedule],
  backward: str | None,
  devices: int,
  microbatches: int,
  costs: Costs,
  memory: Memory,
  memory_limit: float | Sequence[float] | None,
) -> Timeline:
  """Builds one schedule with costs and memory scaled to its number of stages, and simulates it."""
  # How many stages a family has does not depend on anything else.
  stages = build(microbatches=1).stages
  scaled = scale_costs(costs, devices, stages)
  held = tuple(_scale(change, devices, stages) for change in memory)
  schedule = build(
    microbatches=microbatches,
    backward=backward,
    costs=scaled,
    memory=held,
    memory_limit=memory_limit,
  )
  return simulate(schedule, scaled, held)


def scale_costs(costs: Costs, devices: int, stages: int) -> Costs:
  """Converts the costs of a P-th part of the model to those of one of S stages.

  Args:
    costs: durations, each of a P-th part of the model or a list with one per stage.
    devices: number of devices, P.
    stages: number of stages, S.

  Returns:
    The durations times P/S; lists stay as they are.
  """
  return dataclasses.replace(
    costs,
    forward=_scale(costs.forward, devices, stages),
    input_grad=_scale(costs.input_grad, devices, stages),
    weight_grad=_scale(costs.weight_grad, devices, stages),
    recompute=None if costs.recompute is None else _scale(costs.recompute, devices, stages),
    gather=_scale(costs.gather, devices, stages),
    update=_scale(costs.update, devices, stages),
  )


def _scale(value: PerStage, devices: int, stages: int) -> PerStage:
  """Multiplies a number by P/S, with an integer result where that is one; lists stay."""
  if isinstance(value, Sequence):
    return value
  whole = value * devices
  return whole // stages if whole % stages == 0 else whole / stages


def _rank(entry: Entry) -> tuple[float, ...]:
  """Returns the key by which a comparison is sorted."""
  if entry.timeline is None:
    return (2,)
  timeline = entry.timeline
  # Who leaves work out is not the better for being earlier done.
  skips = timeline.schedule.paths is not None
  return skips, timeline.makespan, timeline.span, max(timeline.peak_memory)


def format_table(entries: Sequence[Entry]) -> str:
  """Writes a comparison as text: a row per schedule, then one line for each that cannot run."""
  head = ("schedule", "V", "makespan", "bubble", "span", "span bubble", "peak chunks", "memory")
  rows = [head, *(_row(e.label, e.timeline) for e in entries if e.timeline is not None)]
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
  ]
  lines += [f"cannot run: {e.label}: {e.reason}" for e in entries if e.timeline is None]
  return "\n".join(lines)


def _row(label: str, timeline: Timeline) -> tuple[str, ...]:
  """Returns one row of the table as text."""
  return (
    label,
    str(timeline.schedule.chunks),
    f"{timeline.makespan:.6g}",
    f"{timeline.bubble:.1%}",
    f"{timeline.span:.6g}",
    f"{timeline.span_bubble:.1%}",
    str(max(timeline.peak_activations)),
    f"{max(timeline.peak_memory):.6g}",
  )
