"""Schedules by name. A new one is one function and one line of `FAMILIES`.

Families only build; what holds for all of them (sizes that make sense, the cut of the backward
pass, legality, the memory limit) is seen to here, once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from jaxpipe.schedules.backward import with_backward
from jaxpipe.schedules.bitpipe import bitpipe
from jaxpipe.schedules.chimera import chimera
from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.dualpipe import dualpipe
from jaxpipe.schedules.dualpipe_v import dualpipe_v
from jaxpipe.schedules.gpipe import gpipe
from jaxpipe.schedules.hanayo import hanayo
from jaxpipe.schedules.interleaved import interleaved_1f1b
from jaxpipe.schedules.looped_bfs import looped_bfs
from jaxpipe.schedules.one_f_one_b import one_f_one_b
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.skippipe import skippipe
from jaxpipe.schedules.spec import Spec, limit_by_device
from jaxpipe.schedules.v_shaped import v_half, v_min, v_zb
from jaxpipe.schedules.zb_auto import zb_auto
from jaxpipe.schedules.zb_v import zb_v
from jaxpipe.schedules.zero_bubble import zb_h1, zb_h2
from jaxpipe.schedules.zeropp import zeropp


@dataclasses.dataclass(frozen=True)
class Family:
  """One named way of building schedules.

  Attributes:
    build: makes the schedule.
    summary: one line for people.
    chunks: stages per device by default.
    any_chunks: whether other numbers of stages per device are possible.
    backward: how its builder cuts the backward pass: `fused`, `split`, or `mixed`.
    options: what only this family understands: name -> what it means.
  """

  build: Callable[[Spec], Schedule]
  summary: str
  chunks: int = 1
  any_chunks: bool = False
  backward: str = "fused"
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)


# The order is that of `--list` and of tables: oldest first.
FAMILIES: dict[str, Family] = {
  "gpipe": Family(gpipe, "all forwards, then all backwards"),
  "1f1b": Family(one_f_one_b, "one forward, one backward: at most P microbatches in flight"),
  "interleaved-1f1b": Family(
    interleaved_1f1b,
    "1F1B with V chunks per device: a V-th of the bubble",
    chunks=2,
    any_chunks=True,
  ),
  "looped-bfs": Family(
    looped_bfs,
    "GPipe chunk by chunk: each chunk's weights once per step",
    chunks=2,
    any_chunks=True,
  ),
  "zb-h1": Family(
    zb_h1, "1F1B with late weight gradients, in 1F1B's memory", any_chunks=True, backward="split"
  ),
  "zb-h2": Family(
    zb_h2, "twice the warm-up and memory of zb-h1, the shortest span", backward="split"
  ),
  "zb-auto": Family(
    zb_auto, "zero bubble planned for the given costs and memory limit", backward="split"
  ),
  "zb-v": Family(
    zb_v, "zero bubble in 1F1B's memory, or any memory_limit, in a V", chunks=2, backward="split"
  ),
  "v-min": Family(v_min, "a V in about a third of 1F1B's memory", chunks=2, backward="split"),
  "v-half": Family(v_half, "a V in about half of 1F1B's memory", chunks=2, backward="split"),
  "v-zb": Family(v_zb, "a V without bubble in 1F1B's memory", chunks=2, backward="split"),
  "hanayo": Family(
    hanayo,
    "waves down and up the devices, V/2 of them: ever smaller bubbles",
    chunks=2,
    any_chunks=True,
    options={"waves": "number of waves, each 2 chunks per device"},
  ),
  "chimera": Family(chimera, "two opposite 1F1B pipelines on even P, weights held twice", chunks=2),
  "bitpipe": Family(bitpipe, "two opposite V-shaped pipelines on even P, weights twice", chunks=4),
  "dualpipe": Family(
    dualpipe,
    "opposite pipelines, forwards overlapped with backwards, even P",
    chunks=2,
    backward="mixed",
  ),
  "dualpipe-v": Family(
    dualpipe_v,
    "DualPipe cut in half: overlapped pairs on one V, weights held once",
    chunks=2,
    backward="mixed",
  ),
  "zeropp": Family(
    zeropp,
    "chunk by chunk in units: few gathers of sharded weights",
    chunks=2,
    any_chunks=True,
    backward="split",
    options={"unit": "microbatches per unit, U"},
  ),
  "skippipe": Family(
    skippipe,
    "paths that leave stages out, by search",
    options={"visits": "stages on each path"},
  ),
}


def schedule_names() -> tuple[str, ...]:
  """Names that `make_schedule` knows."""
  return tuple(FAMILIES)


def make_schedule(
  name: str,
  *,
  devices: int,
  microbatches: int,
  chunks: int | None = None,
  backward: str | None = None,
  costs: Costs | None = None,
  memory: Memory = (1, 0, -1),
  memory_limit: float | Sequence[float] | None = None,
  **options: int,
) -> Schedule:
  """Builds a schedule by name and checks it.

  Args:
    name: one of `schedule_names()`.
    devices: number of devices, P.
    microbatches: number of microbatches, M.
    chunks: stages per device, V; by default the family's own number.
    backward: `fused`, `split` or `deferred`; by default the family's own way.
    costs: durations, for schedules that are planned around them.
    memory: what an F, an I and a W change in what its device holds.
    memory_limit: most memory that any device may hold, in the unit of `memory`; one number, or one
      per device.
    options: what only this family understands, such as `waves` of `hanayo`.

  Returns:
    A legal schedule within the limit.

  Raises:
    ValueError: the name is unknown, the sizes do not fit, or the limit is too low.

  >>> make_schedule("1f1b", devices=2, microbatches=2).tokens()
  [['0F0', '0F1', '0B0', '0B1'], ['1F0', '1B0', '1F1', '1B1']]
  """
  if name not in FAMILIES:
    raise ValueError(f"unknown schedule {name!r}; known: {', '.join(FAMILIES)}")
  family = FAMILIES[name]
  # None means "the family's own"; 0 is a mistake that the check below names.
  chunks = family.chunks if chunks is None else chunks
  for word, number in (("devices", devices), ("microbatches", microbatches), ("chunks", chunks)):
    if number < 1:
      raise ValueError(f"{name} cannot run with {word}={number}; use {word}=1 or more")
  if chunks != family.chunks and not family.any_chunks:
    raise ValueError(
      f"{name} has {family.chunks} chunk(s) per device, not {chunks}; use chunks={family.chunks}"
    )
  _check_options(name, options)
  spec = Spec(
    devices=devices,
    microbatches=microbatches,
    chunks=chunks,
    costs=costs or Costs(),
    memory=memory,
    memory_limit=memory_limit,
    options=options,
  )
  # Checked although we built it: a family with a bug must not reach an executor, where it hangs.
  schedule = with_backward(family.build(spec), backward, spec.costs).check()
  # Searches keep to the limit while they plan; for all others it is a condition on the result.
  check_memory(schedule, memory, memory_limit)
  return schedule


def _check_options(name: str, options: Mapping[str, int]) -> None:
  known = FAMILIES[name].options
  for option, value in options.items():
    if option not in known:
      has = f"it has {', '.join(known)}" if known else "it has none"
      raise ValueError(f"{name} has no option {option!r}; {has}")
    if value < 1:
      raise ValueError(f"{name} cannot run with {option}={value}; use {option}=1 or more")


def check_memory(schedule: Schedule, memory: Memory, limit: float | Sequence[float] | None) -> None:
  """Raises ValueError if some device of the schedule holds more than its limit."""
  limits = limit_by_device(limit, schedule.devices)
  for d, (peak, limit) in enumerate(zip(peaks(schedule, memory).memory, limits, strict=True)):
    if not peak <= limit:  # so that a NaN is refused as well
      raise ValueError(
        f"{schedule.name} holds {peak} on device {d}, above memory_limit={limit};"
        f" use memory_limit={peak}, fewer microbatches or a thriftier schedule"
      )
