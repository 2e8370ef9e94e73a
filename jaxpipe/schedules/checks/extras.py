"""Legality of the optional actions: vocabulary passes, moves of weights, fillers, optimizer.

A schedule may do without any of them; one that has some of these actions must have all that belong
together.

  S T  one of each on every device for every microbatch         _check_vocabulary
  G X  in turn on each stage, with the passes in between        _check_weights
  Y    every frozen layer once for every microbatch             _check_fillers
  U    once for every stage, on the right side of its backward  _check_updates
"""

import collections
from collections.abc import Iterator

from jaxpipe.schedules.actions import Action, ScheduleError
from jaxpipe.schedules.kinds import STAGE_KINDS, Kind
from jaxpipe.schedules.protocol import OrderedActions


def check_extras(schedule: OrderedActions) -> None:
  """Raises ScheduleError for the first S, T, G, X, Y or U that is missing or misplaced."""
  kinds = {action.kind for row in schedule.order for step in row for action in step.parts}
  if schedule.vocabulary or kinds & {Kind.S, Kind.T}:
    _check_vocabulary(schedule)
  if kinds & {Kind.G, Kind.X}:
    _check_weights(schedule)
  if Kind.Y in kinds:
    _check_fillers(schedule)
  if Kind.U in kinds:
    _check_updates(schedule)


def _actions(schedule: OrderedActions, *kinds: Kind) -> Iterator[tuple[int, Action]]:
  """Yields the device and the action of everything that is of one of the kinds."""
  for d, row in enumerate(schedule.order):
    for step in row:
      for action in step.parts:
        if action.kind in kinds:
          yield d, action


def _check_vocabulary(schedule: OrderedActions) -> None:
  """Raises unless every device has one S and one T for every microbatch."""
  if schedule.vocabulary not in (1, 2):
    raise ScheduleError(
      f"vocabulary={schedule.vocabulary} although there are S or T passes; use 1 or 2 barriers"
    )
  seen = set()
  for d, action in _actions(schedule, Kind.S, Kind.T):
    # Shards are numbered like devices: device d holds shard d.
    if action.stage != d:
      raise ScheduleError(
        f"{action} on device {d} is misplaced: shard {action.stage} of the vocabulary lives on"
        f" device {action.stage}"
      )
    if action in seen:
      raise ScheduleError(f"{action} on device {d} is a duplicate: device {d} runs it already")
    seen.add(action)
  for kind in (Kind.S, Kind.T):
    for d in range(schedule.devices):
      for m in range(schedule.microbatches):
        if Action(d, kind, m) not in seen:
          raise ScheduleError(
            f"{d}{kind.value}{m} is missing on device {d}: every device runs its shard of the"
            " vocabulary for every microbatch"
          )


def _check_weights(schedule: OrderedActions) -> None:
  """Raises unless gathers and releases alternate, with F, R, I and B of the stage in between."""
  for d, row in enumerate(schedule.order):
    gathered: dict[int, Action] = {}
    for step in row:
      for action in step.parts:
        _follow_weights(action, d, gathered)
    if gathered:
      raise ScheduleError(f"{min(map(str, gathered.values()))} on device {d} is never released")


def _follow_weights(action: Action, d: int, gathered: dict[int, Action]) -> None:
  """Updates which stages' weights device d has gathered, by the G of each, after one action."""
  stage = action.stage
  if action.kind is Kind.G:
    if stage in gathered:
      raise ScheduleError(f"{action} on device {d} is a duplicate of the work of {gathered[stage]}")
    gathered[stage] = action
  elif action.kind is Kind.X:
    if gathered.pop(stage, None) is None:
      raise ScheduleError(f"{action} on device {d} releases weights that were not gathered")
  # W multiplies what F and I have saved, and needs no weights.
  elif action.kind in STAGE_KINDS and action.kind is not Kind.W and stage not in gathered:
    raise ScheduleError(f"{action} on device {d} runs without its weights; put {stage}G before it")


def _check_fillers(schedule: OrderedActions) -> None:
  """Raises unless every frozen layer runs once for every microbatch, on whichever device."""
  seen: dict[Action, int] = {}
  for d, action in _actions(schedule, Kind.Y):
    if action.microbatch >= schedule.microbatches:
      raise ScheduleError(
        f"{action} on device {d} is beyond the last of {schedule.microbatches} microbatches,"
        f" {schedule.microbatches - 1}"
      )
    if action in seen:
      raise ScheduleError(
        f"{action} on device {d} is a duplicate: device {seen[action]} runs it already"
      )
    seen[action] = d
  # The highest number decides how many layers there are: one that is left out is missing.
  for layer in range(1 + max(action.stage for action in seen)):
    for m in range(schedule.microbatches):
      if Action(layer, Kind.Y, m) not in seen:
        raise ScheduleError(f"{layer}Y{m} is missing: frozen layer {layer} needs every microbatch")


def _check_updates(schedule: OrderedActions) -> None:
  """Raises unless each stage steps after its gradients, and validates before its first one."""
  # A chain of Us runs from device to device; stages with replicas have no single place in it.
  if schedule.placement.replicated:
    raise ScheduleError("optimizer actions need stages that live on one device each")
  for d, row in enumerate(schedule.order):
    _follow_updates([action for step in row for action in step.parts], d)
  seen = collections.Counter(action for _, action in _actions(schedule, Kind.U))
  for number in sorted({action.microbatch for action in seen}):
    for stage in range(schedule.stages):
      if seen[Action(stage, Kind.U, number)] != 1:
        raise ScheduleError(f"{stage}U{number} must stand once; the other stages have one")


def _follow_updates(actions: list[Action], d: int) -> None:
  """Raises where a U of device d stands on the wrong side of its stage's gradients."""
  gradients = [a for a in actions if a.kind in (Kind.I, Kind.W, Kind.B)]
  first = {a.stage: a for a in reversed(gradients)}
  last = {a.stage: a for a in gradients}
  begun: set[int] = set()
  ended: set[int] = set()
  for action in actions:
    stage = action.stage
    if action is first.get(stage):
      begun.add(stage)
    if action is last.get(stage):
      ended.add(stage)
    if action.kind is not Kind.U:
      continue
    if action.microbatch > 1:
      raise ScheduleError(f"{action} on device {d} is neither a step (U0) nor a validation (U1)")
    if action.microbatch == 0 and stage in last and stage not in ended:
      raise ScheduleError(f"{action} on device {d} is misplaced: it stands before {last[stage]}")
    if action.microbatch == 1 and stage in begun:
      raise ScheduleError(f"{action} on device {d} is misplaced: it stands after {first[stage]}")
