"""The transfers of a schedule: which device sends what to which, when, and into which slot.

F sends its output to the device of the next stage of the microbatch's path, I and B send the input
gradient to the device of the stage before. A transfer leaves at the end of the tick that makes it.
With a slack of one tick it travels during the next tick and arrives at the end of that.

    tick              t             t + 1            t + 2
    slack 0   sender  F  ──▶┐
              receiver      └▶ slot, F may run
    slack 1   sender  F  ─────────────────▶┐
              receiver                     └▶ slot, F may run
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxpipe.pipeline.table.program import Route, find
from jaxpipe.pipeline.table.slots import Slots
from jaxpipe.schedules import Action, Kind, Schedule


@dataclasses.dataclass(frozen=True)
class Transfer:
  """An output or an input gradient on its way to the next action that needs it.

  Attributes:
    gradient: whether it is an input gradient; else it is an output.
    tick: the tick that makes it, at whose end it leaves.
    source: the device that sends it.
    target: the device that receives it; the same one where it holds both stages.
    stage: the stage of the action that it is for.
    microbatch: the microbatch of the action that it is for.
  """

  gradient: bool
  tick: int
  source: int
  target: int
  stage: int
  microbatch: int

  @property
  def ring(self) -> str:
    """The ring that it arrives in."""
    return "gradients" if self.gradient else "activations"

  def offset(self, devices: int) -> int:
    """Returns receiver minus sender, modulo the number of devices."""
    return (self.target - self.source) % devices

  def arrives(self, slack: int) -> int:
    """Returns the tick at whose end it is in its slot; within a device nothing travels."""
    return self.tick + (slack if self.source != self.target else 0)


def find_transfers(schedule: Schedule, at: Mapping[Action, tuple[int, int]]) -> Iterator[Transfer]:
  """Yields all transfers of a schedule, in the order of `at`.

  Args:
    schedule: a legal schedule.
    at: action -> (device, tick).
  """
  for action, (d, tick) in at.items():
    s, m = action.stage, action.microbatch
    gradient = action.kind in (Kind.I, Kind.B)
    if action.kind is not Kind.F and not gradient:
      continue
    # Along the microbatch's own path, which may leave stages out.
    path = schedule.path(m)
    i = path.index(s) + (-1 if gradient else 1)
    # Past its ends stand embedding and head, to which nothing is sent.
    if 0 <= i < len(path):
      target = find(at, Kind.I if gradient else Kind.F, path[i], m)
      assert target is not None  # a legal schedule passes every stage of the path
      yield Transfer(gradient, tick, d, target[0], path[i], m)


def find_routes(transfers: Iterable[Transfer], devices: int) -> tuple[Route, ...]:
  """Groups transfers by their distance round the devices, in ascending order.

  Args:
    transfers: all transfers of a schedule.
    devices: P.
  """
  travels: dict[int, set[bool]] = {}
  for one in transfers:
    travels.setdefault(one.offset(devices), set()).add(one.gradient)
  return tuple(
    Route(offset, activations=False in what, gradients=True in what)
    for offset, what in sorted(travels.items())
  )


def arrival_columns(
  transfers: Iterable[Transfer],
  routes: Sequence[Route],
  slots: Slots,
  shape: tuple[int, int],
  slack: int,
) -> dict[str, np.ndarray]:
  """Returns the columns of the tick table that say where what arrives is put.

  Args:
    transfers: all transfers of a schedule.
    routes: their routes.
    slots: of the rings `activations` and `gradients`.
    shape: [ticks, P].
    slack: ticks that a transfer takes beyond the one that sends it.

  Returns:
    `arriving_activation_r` and `arriving_gradient_r` for every route r, int32 [ticks, P].
  """
  # Nowhere, until a transfer says otherwise: every device stores something on every tick.
  table = {}
  for r in range(len(routes)):
    table[f"arriving_activation_{r}"] = np.full(shape, slots.count["activations"], np.int32)
    table[f"arriving_gradient_{r}"] = np.full(shape, slots.count["gradients"], np.int32)
  number = {route.offset: r for r, route in enumerate(routes)}
  for one in transfers:
    what = "gradient" if one.gradient else "activation"
    column = table[f"arriving_{what}_{number[one.offset(shape[1])]}"]
    value = (one.stage, one.microbatch)
    column[one.arrives(slack), one.target] = slots.number[one.ring, one.target, value]
  return table


def pairs_by_tick(
  transfers: Iterable[Transfer], routes: Sequence[Route], shape: tuple[int, int], slack: int
) -> list[tuple[frozenset[tuple[int, int]], ...]]:
  """Returns, for every tick and route, the (sender, receiver) pairs that carry something.

  Args:
    transfers: all transfers of a schedule.
    routes: their routes.
    shape: [ticks, P].
    slack: ticks that a transfer takes beyond the one that sends it. With slack, an exchange belongs
      to the tick after the one that made what it sends.
  """
  ticks, P = shape
  number = {route.offset: r for r, route in enumerate(routes)}
  pairs: list[list[set[tuple[int, int]]]] = [[set() for _ in routes] for _ in range(ticks)]
  for one in transfers:
    pairs[one.arrives(slack)][number[one.offset(P)]].add((one.source, one.target))
  return [tuple(map(frozenset, by_route)) for by_route in pairs]
