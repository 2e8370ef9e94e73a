"""The request for a schedule, which is the one argument that every family's builder takes.

One value, so that a builder that needs only the sizes and a search that needs costs and memory
limits have the same signature, and the registry calls both alike.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxpipe.schedules.costs import Costs, Memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """A request for a schedule, already validated.

  Attributes:
    devices: number of devices, P.
    microbatches: number of microbatches, M.
    chunks: stages per device, V.
    costs: durations that a planner may use.
    memory: changes of the memory that a device holds by F, I and W.
    memory_limit: most memory that a device may hold, in the unit of `memory`: one number for all
      devices, or one per device; None for no limit.
    backward: what is asked of backward passes; only builders of ticks by kind read it, since all
      others are followed by `with_backward`.
    options: arguments that only one family understands, by name.
  """

  devices: int
  microbatches: int
  # From here on the defaults of the command line; most builders never look at them.
  chunks: int = 1
  costs: Costs = dataclasses.field(default_factory=Costs)
  memory: Memory = (1, 0, -1)
  memory_limit: float | Sequence[float] | None = None
  backward: str | None = None
  options: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def limits(self) -> tuple[float, ...]:
    """Returns the memory limits of the P devices, infinite where there is none.

    Raises:
      ValueError: a list of limits has not one entry per device.
    """
    return limit_by_device(self.memory_limit, self.devices)


# Share of a memory limit by which it may be passed: changes of memory that are written as floats,
# such as 1, -0.63 and -0.37, do not add up to zero exactly.
ROUNDING = 1e-9


def limit_by_device(limit: float | Sequence[float] | None, devices: int) -> tuple[float, ...]:
  """Returns one limit for each of P devices, infinite where there is none.

  Raises:
    ValueError: a list of limits has not one entry per device.
  """
  if limit is None:
    limit = float("inf")
  if not isinstance(limit, Sequence):
    return (limit,) * devices
  if len(limit) != devices:
    raise ValueError(
      f"memory_limit lists {len(limit)} devices, there are {devices}; give one number, or {devices}"
    )
  return tuple(limit)
