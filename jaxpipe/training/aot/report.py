"""Reports a step that was compiled ahead of time, as JSON and as text.

`describe` and `describe_estimate` make the JSON values of what was read from the compiled program;
`lines` formats them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxpipe.pipeline.compiled.action_paths import SCOPES
from jaxpipe.pipeline.compiled.copies import RingCopy
from jaxpipe.pipeline.compiled.step import CompiledStep
from jaxpipe.pipeline.compiled.transfers import Permute
from jaxpipe.schedules import Schedule
from jaxpipe.training.aot.aot import estimate
from jaxpipe.training.chips import DeviceSpec


def describe(
  found: CompiledStep, predicted: Mapping[str, int], device: DeviceSpec
) -> dict[str, Any]:
  """Returns what was read from a compiled step, beside what was predicted of it.

  Args:
    found: the compiled step, from `read_compiled`.
    predicted: bytes of one device by kind, from `memory_report`.
    device: the limits of one device.

  Returns:
    JSON values by name: `instructions`, `memory` in bytes, `ring_copies`, `permutes` (transfers
    between devices) and `cycles` by action.
  """
  return {
    "instructions": found.instructions,
    "memory": _memory(predicted, found, device),
    "ring_copies": [_copy(copy) for copy in found.copies],
    "permutes": [_permute(permute) for permute in found.permutes],
    "cycles": _cycles(found),
  }


def _memory(known: Mapping[str, int], found: CompiledStep, device: DeviceSpec) -> dict[str, Any]:
  """Bytes of one device: predicted by kind, the compiler's own figures, and the chip's."""
  report: dict[str, Any] = {"predicted": dict(known)}
  if found.memory:
    report["error"] = sum(known.values()) / found.memory.total - 1
    report["compiler"] = {**dataclasses.asdict(found.memory), "total": found.memory.total}
  if device.memory:
    report["chip"] = device.memory
    if found.memory:
      report["fits"] = found.memory.total <= device.memory
  return report


def _copy(copy: RingCopy) -> dict[str, Any]:
  """A copy of a whole ring as JSON values."""
  return {**dataclasses.asdict(copy), "ring": str(copy.ring), "moved": copy.moved}


def _permute(permute: Permute) -> dict[str, Any]:
  """A transfer between devices as JSON values, with what runs under it."""
  under = [{"name": n, "opcode": o, "cycles": c.most} for n, o, _, c in permute.under]
  rest = {k: getattr(permute, k) for k in ("name", "asynchronous", "conditional", "in_loop")}
  return {**rest, "hidden_cycles": [permute.hidden.least, permute.hidden.most], "under": under}


def _cycles(found: CompiledStep) -> dict[str, Any]:
  """Cycles of each action, of every tick besides, and of what runs once a step."""
  actions = {scope: found.action(scope) for scope in SCOPES}
  # Branches without a scope are in no action, and so not in the estimate of a step.
  rest = {"other_branches": found.unscoped, "every_tick": found.every_tick, "once": found.once}
  parts = {**actions, **rest}
  return {name: dataclasses.asdict(cost) for name, cost in parts.items() if cost}


def describe_estimate(
  found: CompiledStep,
  schedule: Schedule,
  device: DeviceSpec,
  flops: float,
  devices: int,
  slack: int,
) -> dict[str, float]:
  """Returns the step time and utilisation that the compiler's cycles imply.

  Args:
    found: the compiled step.
    schedule: that it runs, with all ticks in one loop.
    device: the limits of one device.
    flops: FLOPs of the model in one step.
    devices: how many there are.
    slack: ticks that a transfer may take beyond its own.

  Returns:
    `clock_ghz`, `step_seconds`, `bubble` and `mfu`; empty where cycles, clock or peak are unknown.
  """
  paper = estimate(found, schedule, device, slack)
  if paper is None or device.clock is None or device.peak is None:
    return {}
  return {
    "clock_ghz": round(device.clock / 1e9, 3),
    "step_seconds": round(paper.seconds, 4),
    "bubble": round(paper.timeline.bubble, 4),
    "mfu": round(flops / (paper.seconds * devices * device.peak), 4),
  }


def lines(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields the lines of a report as text.

  Args:
    report: what `describe` returns, `estimate` from `describe_estimate`, and any other values.
  """
  for key, value in report.items():
    if not isinstance(value, dict | list):
      yield f"{key:16} {value}"
  yield from _memory_lines(report["memory"])
  yield from _copy_lines(report["ring_copies"])
  yield f"transfers between devices: {len(report['permutes'])}"
  for permute in report["permutes"]:
    kind = "asynchronous" if permute["asynchronous"] else "SYNCHRONOUS"
    inside = permute["conditional"]
    where = f"INSIDE the conditional {inside}" if inside else "outside conditionals"
    least, most = permute["hidden_cycles"]
    yield f"  {permute['name']}: {kind}, {where}; {least:,} to {most:,} cycles run under it"
    for one in permute["under"]:
      yield f"    {one['opcode']} {one['name']}: at most {one['cycles']:,}"
  yield "cycles, the compiler's estimate"
  for scope, cost in report["cycles"].items():
    unknown = f", and {cost['unknown']} without one" if cost["unknown"] else ""
    yield f"  {scope:20} {cost['least']:>14,} to {cost['most']:,}{unknown}"
  for key, value in report["estimate"].items():
    yield f"  {key:20} {value}  (estimate)"


def _memory_lines(memory: Mapping[str, Any]) -> Iterator[str]:
  """Yields the part about the memory of one device."""
  yield "memory of one device, GB"
  for kind, size in memory["predicted"].items():
    yield f"  {kind:20} {size / 1e9:9.3f}  predicted"
  if "compiler" in memory:
    for kind, size in memory["compiler"].items():
      yield f"  {kind:20} {size / 1e9:9.3f}  compiler"
    yield f"  {'error':20} {memory['error']:9.1%}  predicted over compiler, less one"
  if "chip" in memory:
    fits = "fits" if memory.get("fits") else "does NOT fit"
    yield f"  {'chip':20} {memory['chip'] / 1e9:9.3f}  {fits}"


def _copy_lines(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  copies = [copy for copy in found if not copy["moved"]]
  yield f"whole-ring copies in loops or branches: {len(copies)} (must be 0)"
  yield f"whole rings moved to another memory and back: {len(found) - len(copies)}"
  for copy in copies:
    yield f"  {copy['opcode']} {copy['name']}: {copy['source']} -> {copy['written']}"
    yield f"    in {copy['computation']}, {copy['cycles']} cycles, {copy['op_name']}"
