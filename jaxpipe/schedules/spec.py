"""What a schedule is asked for: the one argument that every builder takes.

One value, so that a builder that needs only the sizes and a search that needs costs and memory
limits have the same signature, and the registry calls both alike.
"""

import dataclasses

from jaxpipe.schedules.simulate import Costs, Memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """A request for a schedule, already validated.

  Attributes:
    devices: number of devices, P.
    microbatches: number of microbatches, M.
    chunks: stages per device, V.
    costs: durations that a search may plan with.
    memory: what F, I and W change in what a device holds.
    memory_limit: most memory that a device may hold, in the unit of `memory`; None for no limit.
  """

  devices: int
  microbatches: int
  # From here on the defaults of the command line; most builders never look at them.
  chunks: int = 1
  costs: Costs = dataclasses.field(default_factory=Costs)
  memory: Memory = (1, 0, -1)
  memory_limit: float | None = None
