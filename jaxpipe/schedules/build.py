"""Builds schedules by name, and does once what is common to all families.

These are: checks of sizes and options, then the family's own builder, then fusing, splitting or
deferring backwards, recompute and vocabulary passes, and at last legality and the memory limit.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence

from jaxpipe.schedules.costs import Costs, Memory
from jaxpipe.schedules.peaks import peaks
from jaxpipe.schedules.registry import FAMILIES
from jaxpipe.schedules.schedule import Schedule
from jaxpipe.schedules.spec import ROUNDING, Spec, limit_by_device
from jaxpipe.schedules.transforms.backward import BACKWARDS, with_backward
from jaxpipe.schedules.transforms.recompute import with_recompute
from jaxpipe.schedules.transforms.vocabulary import with_vocabulary

# Where actions stand in one program on all devices; the first is the default.
TICKS = ("early", "kind")


def schedule_names() -> tuple[str, ...]:
  """Returns the names that `make_schedule` knows, in the order of `--list`."""
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
  recompute: bool = False,
  head: str = "last",
  ticks: str = "early",
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
    memory: changes of the memory that a device holds by an F, an I and a W.
    memory_limit: most memory that any device may hold, in the unit of `memory`; one number, or one
      per device.
    recompute: whether recomputing is an action of its own, R, before every backward.
    head: `last`, where the last stage has it whole, or `sharded` with the embedding over all
      devices: each then runs an S and a T for every microbatch.
    ticks: of one program on all devices: `early`, each action as soon as it can run; or `kind`, so
      that all devices do the same kind of action on a tick, where the family has such ticks.
    options: arguments that only this family understands, such as `waves` of `hanayo`.

  Returns:
    A legal schedule within the limit.

  Raises:
    ValueError: the name is unknown, the sizes do not fit, the limit is too low, or there are no
      ticks by kind.

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
  if not family.offers(chunks):
    raise ValueError(
      f"{name} has {family.chunks} chunk(s) per device, not {chunks}; use chunks={family.chunks}"
    )
  if head not in ("last", "sharded"):
    raise ValueError(f"{name} cannot run with head={head!r}; use head='last' or head='sharded'")
  if ticks not in TICKS:
    raise ValueError(f"{name} cannot run with ticks={ticks!r}; use ticks='early' or ticks='kind'")
  if backward is not None and backward not in BACKWARDS:
    raise ValueError(f"unknown backward {backward!r}; known: {', '.join(BACKWARDS)}")
  build = family.build if ticks == "early" else _by_kind(name, head, backward)
  _check_options(name, options)
  spec = Spec(
    devices=devices,
    microbatches=microbatches,
    chunks=chunks,
    costs=costs or Costs(),
    memory=memory,
    memory_limit=memory_limit,
    backward=backward,
    options=options,
  )
  # Checked although we built it: a family with a bug must not reach an executor, where it hangs.
  with _no_garbage_collection():
    schedule = build(spec)
  if ticks == "early":
    schedule = with_backward(schedule, backward, spec.costs)
  if recompute:
    schedule = with_recompute(schedule, spec.costs)
  if head == "sharded":
    schedule = with_vocabulary(schedule, 1, spec.costs)
  # Ticks by kind that are as early as can be are no ticks of its own.
  schedule = schedule.check() if schedule.ticks is None else schedule.with_ticks(schedule.ticks)
  # Searches keep to the limit while they plan; for all others it is a condition on the result.
  check_memory(schedule, memory, memory_limit)
  return schedule


def _by_kind(name: str, head: str, backward: str | None) -> Callable[[Spec], Schedule]:
  """Returns the builder of a family's ticks by kind.

  Raises:
    ValueError: it has none, or none with such a head or such backwards.
  """
  build = FAMILIES[name].by_kind
  if build is None:
    have = ", ".join(other for other, family in FAMILIES.items() if family.by_kind)
    raise ValueError(f"{name} has no ticks by kind; those that have them: {have}")
  if head == "sharded":
    raise ValueError(
      f"{name} has no ticks by kind for the passes of head='sharded'; use head='last', or"
      " ticks='early'"
    )
  if FAMILIES[name].backward == "split" and backward not in (None, "split"):
    raise ValueError(
      f'{name} places weight gradients on its own; use backward="split" instead of "{backward}"'
    )
  return build


# Actions refer to nothing that refers to them; looking for cycles among half a million of them took
# a quarter of the time.
@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
  """Switches the collection of reference cycles off, and on again if it was on."""
  was = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was:
      gc.enable()


def _check_options(name: str, options: Mapping[str, int]) -> None:
  """Raises ValueError for an option that the family does not have, or that is below 1."""
  known = FAMILIES[name].options
  for option, value in options.items():
    if option not in known:
      has = f"it has {', '.join(known)}" if known else "it has none"
      raise ValueError(f"{name} has no option {option!r}; {has}")
    if value < 1:
      raise ValueError(f"{name} cannot run with {option}={value}; use {option}=1 or more")


def check_memory(schedule: Schedule, memory: Memory, limit: float | Sequence[float] | None) -> None:
  """Raises if some device of a schedule holds more than its limit.

  Args:
    schedule: a schedule.
    memory: changes of the memory that a device holds by F, I and W (and R).
    limit: most that a device may hold: one number, or one per device; None for no limit.

  Raises:
    ValueError: a device holds more, or a list has the wrong length.
  """
  limits = limit_by_device(limit, schedule.devices)
  for d, (peak, limit) in enumerate(zip(peaks(schedule, memory).memory, limits, strict=True)):
    if not peak <= limit + ROUNDING * abs(limit):  # so that a NaN is refused as well
      raise ValueError(
        f"{schedule.name} holds {peak} on device {d}, above memory_limit={limit};"
        f" use memory_limit={peak}, fewer microbatches or a thriftier schedule"
      )
