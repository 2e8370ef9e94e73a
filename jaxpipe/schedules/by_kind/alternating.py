"""1F1B by kind in its own memory: ticks "X X W", where X is F or I as a device's parity says.

With P microbatches in flight, 1F1B does F on one device beside I on the next, so that its ticks
cannot be of one kind. Split, they can be of two: an X tick lasts as long as the longer of F and I,
which are much alike, and W has ticks of its own for all devices:

    tick       X X W X X W        F and I are those of 1F1B, as early as they can be;
    device 0   F I W F I W        a W tick stands wherever every device has a W that waits,
    device 1   I F W I F W        and a device that idles on an X tick does one as a guest

The time is at most P F + (2M+P-2) max(F, I) + (M-P+2) W for M >= 2P, with 1F1B's P - d
microbatches in flight.
"""

from jaxpipe.schedules.actions import Action
from jaxpipe.schedules.families.one_f_one_b import one_f_one_b
from jaxpipe.schedules.kinds import Kind
from jaxpipe.schedules.placement import Placement
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import Spec
from jaxpipe.schedules.ticks import ticks


def one_f_one_b_by_kind(spec: Spec) -> Schedule:
  """Builds 1F1B on X and W ticks.

  Args:
    spec: devices and microbatches; one stage per device.

  Returns:
    The schedule with its ticks, its backward split; deferred is the same, since W is late anyway.

  Raises:
    ValueError: a fused backward is asked for, which does not align.
  """
  if spec.backward == "fused":
    raise ValueError(
      "1f1b with a fused backward has no ticks by kind: in its memory, devices do F beside B; use"
      " backward='split', or eager-1f1b"
    )
  P, M = spec.devices, spec.microbatches
  # W takes no tick here: B stands for the I that it becomes.
  early = one_f_one_b(spec)
  x = [dict(zip(at, row, strict=True)) for at, row in zip(ticks(early), early.order, strict=True)]
  rows: list[list[tuple[int, Action]]] = [[] for _ in range(P)]
  waiting: list[list[Action]] = [[] for _ in range(P)]
  for_all = max(0, M - P + 1)  # W ticks on which every device has one
  now = 0
  for tick in range(1 + max(max(row) for row in x)):
    for d, row in enumerate(x):
      if tick in row:
        (action,) = row[tick].parts
        kind = Kind.I if action.kind is Kind.B else Kind.F
        rows[d].append((now, Action(action.stage, kind, action.microbatch)))
        if kind is Kind.I:
          waiting[d].append(Action(action.stage, Kind.W, action.microbatch))
      elif waiting[d]:
        rows[d].append((now, waiting[d].pop(0)))
    now += 1
    if all(waiting) and for_all:
      for_all -= 1
      for d in range(P):
        rows[d].append((now, waiting[d].pop(0)))
      now += 1
  while any(waiting):
    for d in range(P):
      if waiting[d]:
        rows[d].append((now, waiting[d].pop(0)))
    now += 1
  return Schedule(
    "1f1b",
    Placement.loop(P),
    M,
    tuple(tuple(action for _, action in row) for row in rows),
    ticks=tuple(tuple(at for at, _ in row) for row in rows),
  )
